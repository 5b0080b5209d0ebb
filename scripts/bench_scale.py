"""What the commands cost from size to size, beside their peers: time, processor, memory, disk.

    scripts/bench_scale [--size tiny|0.13b|0.5b|1.2b|3b|8b ...] [--row NAME ...] [--source nf4|bf16 ...]
        [--layers N] [--limit MINUTES] [--memory GB] [--rank 256] [--llama-cpp] [--tokenizer FOLDER]
        [--folder DIR] [--keep] [--again] [--results FILE] [--write-docs] [--kept] [--json]

Models are Llamas made by code, with random weights, in bf16 and as NF4 with double quantization, with a VeRA
adapter on all of their linears (bench_models). Every row is a command in a process of its own, which begins
with nothing of the base in the system's memory (bench_process says what is measured; bench_scale_rows which
rows there are). Beside them are PEFT's merge, the int4 of ONNX Runtime GenAI's own builder and, when asked
for, llama.cpp's converter and quantizer, compiled from the registry's source first. The peers of exports get
the bf16 base: they know nothing of adapters.

--layers: of larger models the first N layers alone, which is said wherever it was done. --limit, --memory: a
row that takes more is ended and said to. Results are kept row by row, so that a long table can be made in
several sittings: rows that are there are left out, unless --again. --write-docs makes the table and the plots
of docs/scale.md of all results; --kept does so and measures nothing. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from scripts import bench_llama_cpp, bench_models, bench_scale_page
from scripts.bench_models import SIZES, Size
from scripts.bench_process import Cost, Limits, folder_bytes, forget, run
from scripts.bench_scale_results import Machine, Result, Results
from scripts.bench_scale_rows import Place, Row, rows
from scripts.prepare_demo import ROOT, cache_folder
from vera_edge import __version__
from vera_edge.quiet import quiet

TABLE_SIZES = ("0.13b", "0.5b", "1.2b", "3b", "8b")
RESULTS = ROOT / "docs" / "scale.json"
_DEMO_VOCABULARY = 49_152


@dataclass
class Sitting:
    """One model's rows, measured in an order in which what one reads of another's output is there."""

    name: str
    size: Size
    folder: Path
    rank: int
    limits: Limits
    results: Results
    machine: Machine
    rows: dict[str, Row]
    outputs: dict[tuple[str, str], Path] = field(default_factory=dict)

    def measure(self, wanted: Sequence[tuple[str, str]], again: bool) -> Iterator[Result]:
        """The results of the wanted (row, base)s that aren't there yet, and of those that they need."""
        left = [pair for pair in wanted if again or not self._known(pair)]
        while left:
            name, base = left.pop(0)
            needed = self.rows[name].needs
            if needed is not None and (needed, base) not in self.outputs:
                if (needed, base) in left:
                    left.remove((needed, base))
                prior = self._one(needed, base)
                yield prior
                if not prior.done:
                    say(f"{self.name}: {name} is left out, since it needs {needed}")
                    continue
            yield self._one(name, base)
            self._remove_but(left)

    def _known(self, pair: tuple[str, str]) -> bool:
        return is_known(self.results, self.name, self.size, pair, self.limits)

    def _one(self, name: str, base: str) -> Result:
        row, work = self.rows[name], self.folder / f"{name}-{base}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        place = Place(
            self.size,
            self.folder / base,
            self.folder / "adapter",
            work / "out",
            self.outputs.get((row.needs or "", base), work),
            llama_cpp_folder(),
        )
        if row.opened:
            place.out.mkdir()
        forget(place.base)
        load = os.getloadavg()[0]
        say(f"{self.name}, {base}: {row.title}")
        cost = run(row.command(place), work, self.limits, row.environment(place), row.exits)
        result = self._result(name, base, cost, place, load)
        self.results.put(result)
        self.outputs[name, base] = place.out
        return result

    def _result(self, name: str, base: str, cost: Cost, place: Place, load: float) -> Result:
        flops = self.rows[name].flops
        return Result(
            size=self.name,
            layers=self.size.layers,
            all_layers=self.size.all_layers,
            base=base,
            row=name,
            end=cost.end,
            note=_note(cost),
            rank=self.rank,
            limit=_minutes(self.limits),
            wall=cost.wall,
            cpu=cost.cpu,
            peak=cost.peak,
            anonymous=cost.anonymous,
            disk=cost.disk,
            output=folder_bytes(place.out) if place.out.exists() else 0,
            base_bytes=folder_bytes(place.base),
            float32=self.size.float32_bytes,
            load=load,
            flops=None if flops is None else float(flops(self.size, self.rank)),
            machine=self.machine,
            versions=_versions(),
        )

    def _remove_but(self, left: Sequence[tuple[str, str]]) -> None:
        """Remove the outputs that no row reads any more."""
        read = {(self.rows[name].needs, base) for name, base in left}
        for pair in [pair for pair in self.outputs if pair not in read]:
            shutil.rmtree(self.outputs.pop(pair).parent)


def is_known(results: Results, name: str, size: Size, pair: tuple[str, str], limits: Limits) -> bool:
    """Whether a (row, base) was measured, or was given up on after no less time than it would have now."""
    row, base = pair
    found = results.get((name, size.layers, base, row))
    if found is None or found.done:
        return found is not None
    least = _minutes(limits)
    return found.end == "over the time" and least is not None and (found.limit or 0) >= least


def _minutes(limits: Limits) -> float | None:
    return None if limits.seconds is None else limits.seconds / 60


def _note(cost: Cost) -> str:
    """What a row says of itself, or why it failed."""
    if cost.end == "failed":
        return cost.said
    lines = cost.output.strip().splitlines()
    try:
        told = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return ""
    return str(told.get("note", "")) if isinstance(told, dict) else ""


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "onnxruntime", "onnxruntime-genai", "numpy")
    return {name: version(name) for name in names} | {"vera-edge": __version__}


def llama_cpp_folder() -> Path:
    return cache_folder() / "llama-cpp"


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def speeds(folder: Path) -> Machine:
    """What the machine does now."""
    say("measuring the machine")
    told = run([sys.executable, "-m", "scripts.bench_machine", folder], folder)
    if told.end != "done":
        raise SystemExit(f"the machine's speed can't be measured: {told.said}")
    return Machine(**json.loads(told.output))


def wanted_rows(given: argparse.Namespace, known: dict[str, Row]) -> list[tuple[str, str]]:
    """The (row, base) pairs that were asked for."""
    names = given.row or [name for name in known if given.llama_cpp or not name.startswith("llama-")]
    for name in names:
        if name not in known:
            raise SystemExit(f"no row is called {name}; known: {', '.join(known)}")
    sources = given.source or ["nf4", "bf16"]
    return [(name, base) for name in known if name in names for base in known[name].bases if base in sources]


def main() -> None:
    given = _arguments()
    # A row is a process group of its own: it would go on after this one was ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Results(given.results)
    failed = False
    if not given.kept:
        for result in _measure(given, results):
            failed |= result.end == "failed"
            print(json.dumps(asdict(result)) if given.json else told(result), flush=True)
    if given.kept or given.write_docs:
        bench_scale_page.write(list(results))
    raise SystemExit(1 if failed else 0)


def _measure(given: argparse.Namespace, results: Results) -> Iterator[Result]:
    known = rows()
    pairs = wanted_rows(given, known)
    if any(name.startswith("llama-") for name, _ in pairs):
        bench_llama_cpp.environment(llama_cpp_folder())
        bench_llama_cpp.converter(llama_cpp_folder())
    limits = Limits(given.limit * 60 if given.limit else None, int((given.memory or _most_memory()) * 1e9))
    sizes = {
        name: size
        for name in given.size or TABLE_SIZES
        for size in [SIZES[name].of_layers(given.layers)]
        if given.again or not all(is_known(results, name, size, pair, limits) for pair in pairs)
    }
    if not sizes:
        return
    with ExitStack() as held:
        folder = given.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-scale-")))
        folder.mkdir(parents=True, exist_ok=True)
        machine = speeds(folder)
        for name, size in sizes.items():
            place = folder / f"{name}-{size.layers}"
            say(f"{name}: making the models")
            needed = sorted({base for _, base in pairs})
            with quiet():
                bench_models.make(size, given.rank, place, needed, _tokenizer(given.tokenizer, size))
            if "bf16" not in needed:  # what the other was made of: room for the exports
                shutil.rmtree(place / "bf16", ignore_errors=True)
            sitting = Sitting(name, size, place, given.rank, limits, results, machine, known)
            yield from sitting.measure(pairs, given.again)
            if not given.keep:
                shutil.rmtree(place)


def _tokenizer(given: Path | None, size: Size) -> Path | None:
    """The tokenizer's folder: the one that was given, or the demo's where it is there and fits."""
    demo = cache_folder() / "demo" / "smollm2"
    fits = size.vocabulary >= _DEMO_VOCABULARY and (demo / bench_models.TOKENIZER_FILES[0]).is_file()
    return given or (demo if fits else None)


def _most_memory() -> float:
    """GB that a row may take unless told otherwise: nine tenths of what is free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(line for line in lines if line.startswith("MemAvailable"))
    return 0.9 * int(free.split()[1]) * 1024 / 1e9


def told(result: Result) -> str:
    """A result as a line for a person."""
    layers = "" if result.layers == result.all_layers else f" ({result.layers} of {result.all_layers} layers)"
    where = f"{result.size}{layers}, {result.base}: {result.row}: "
    cost = (
        f"{result.wall:.1f} s, {result.cpu:.1f} s of CPU, {result.peak / 1e9:.2f} GB of memory "
        f"({result.peak / result.float32:.2f} x float32), {result.disk / 1e9:.2f} GB of disk"
    )
    if result.flops:
        cost += f", {result.wall / (result.flops / result.machine.gflops / 1e9):.1f} x its products' time"
    note = "".join(f", {word}" for word in (result.end if not result.done else "", result.note) if word)
    return where + cost + note


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", action="append", choices=SIZES, help=f"default: {', '.join(TABLE_SIZES)}")
    parser.add_argument("--row", action="append", help="these rows alone")
    parser.add_argument("--source", action="append", choices=["nf4", "bf16"])
    parser.add_argument("--layers", type=int, help="make no more layers than this")
    parser.add_argument("--limit", type=float, metavar="MINUTES", help="end a row that takes longer")
    parser.add_argument("--memory", type=float, metavar="GB", help="end a row that takes more")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--llama-cpp", action="store_true", help="llama.cpp too, compiled first")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer files for all models")
    parser.add_argument("--folder", type=Path, help="where the models are made")
    parser.add_argument("--keep", action="store_true", help="leave the models in --folder")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file that keeps the rows")
    parser.add_argument("--write-docs", action="store_true", help="write docs/scale.md")
    parser.add_argument("--kept", action="store_true", help="measure nothing, write docs/scale.md")
    parser.add_argument("--json", action="store_true", help="print each row as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
