"""Measure decoding speed: our exports beside what else runs the same model on a CPU.

    scripts/bench_decode [--model demo 1.2b] [--tokens 48] [--rounds 3] [--loads 4] [--threads N ...]
                         [--llama-cpp] [--only WAY ...] [--keep] [--prepare] [--write]

The models are the demo's, and a Llama of 1.2 billion random weights, which are rounded to nearest: speed
doesn't ask what they say. Beside ours run the int4 of ONNX Runtime GenAI's own builder, torch with PEFT (the
demo's model alone), and, when asked for, llama.cpp, which is compiled from the registry's source first, with
Q4_0 and Q8_0 of its own quantizer and with our GGUF files of the demo, rounded to nearest. What libraries say
goes into a log. `--write` puts the tables into docs/speed.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts import bench_drift_ways, bench_llama_cpp, bench_models, demo_model
from scripts.bench_decode_rows import (
    BUILDER,
    GGUF_WAYS,
    LARGE_GGUF_WAYS,
    LARGE_WAYS,
    PEFT,
    WAYS,
    GgufWay,
    Way,
    lost,
    read_bytes,
)
from scripts.bench_machine import read_speed
from scripts.bench_turns import (
    LONG,
    Row,
    Worker,
    footnote,
    genai,
    measure,
    quietly,
    say,
    table,
    write_section,
)
from scripts.prepare_demo import ROOT, cache_folder, prepare
from vera_edge.cores import available_cores
from vera_edge.exporting import target
from vera_edge.measuring.artefact import folder_bytes
from vera_edge.rounding.weight_rounding import Rounding

DEMO, LARGE = "demo", "1.2b"
_RANK = 256
# malloc asks for pages of 2 MB, where the system lets it.
_HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class Model:
    """What is measured. `is_demo`: docs/drift-table.md speaks of it, and PEFT runs it."""

    name: str
    base: Path
    float_base: Path
    adapter: Path
    ways: tuple[Way, ...]
    gguf_ways: tuple[GgufWay, ...]
    rounding: Rounding | None = None
    is_demo: bool = False

    @property
    def section(self) -> str:
        """Of docs/speed.md."""
        return "decode" if self.is_demo else f"decode-{LARGE}"

    def named(self) -> dict[str, Way]:
        return {way.name: way for way in self.ways}


def main() -> None:
    given = _arguments()
    for name in given.model:
        out = cache_folder() / ("bench-decode" if name == DEMO else f"bench-decode-{name}")
        out.mkdir(parents=True, exist_ok=True)
        with quietly(out / "log"):
            model = _model(name, out)
            folders = _folders(model, out, given.only, given.keep)
            ggufs = _ggufs(model, out, given.only, given.keep) if given.llama_cpp else {}
        if given.prepare:
            continue
        lines = _measured(model, folders, ggufs, given)
        say("\n".join(lines))
        if given.write:
            write_section(model.section, lines, bench="decode")


def _measured(
    model: Model, folders: Mapping[str, Path], ggufs: Mapping[str, Path], given: argparse.Namespace
) -> list[str]:
    """A table for each number of threads."""
    rows = _rows(model, folders, ggufs, given.only)
    more = (bench_llama_cpp.PACKAGE.replace("==", " "),) if ggufs else ()
    lines: list[str] = []
    for threads in given.threads:
        load = partial(_workers, model, folders, ggufs, any(row.name == PEFT for row in rows), threads)
        before = read_speed(threads)
        speeds = measure(load, given.tokens, given.rounds, given.loads)
        bandwidth = max(before, read_speed(threads))
        lines += [*table(rows, speeds, bandwidth), "", footnote(given.rounds, given.loads, threads, *more)]
        lines += [_explained(model, bandwidth), ""]
    return lines[:-1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=(DEMO, LARGE), nargs="+", default=[DEMO])
    parser.add_argument("--tokens", type=int, default=48, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=int, default=4, help="how often models are loaded anew")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, available_cores()}), help="a table for each"
    )
    parser.add_argument("--llama-cpp", action="store_true", help="compile and run llama.cpp too")
    parser.add_argument("--only", nargs="*", help="these ways alone")
    parser.add_argument("--keep", action="store_true", help="take exports that are there from an earlier run")
    parser.add_argument("--prepare", action="store_true", help="make what is measured, and stop")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/speed.md")
    return parser.parse_args()


def _model(name: str, out: Path) -> Model:
    if name == DEMO:
        demo = prepare()
        folders = (demo.base, demo.float_base, demo.adapter)
        return Model("SmolLM2-135M", *folders, WAYS, GGUF_WAYS, is_demo=True)
    say(f"{name}: making a base of random weights")
    bench_models.make(bench_models.SIZES[name], _RANK, out, ("bf16", "nf4"))
    folders = (out / "nf4", out / "bf16", out / "adapter")
    return Model(f"A random Llama, {name}", *folders, LARGE_WAYS, LARGE_GGUF_WAYS, Rounding(method="rtn"))


def _rows(
    model: Model, folders: Mapping[str, Path], ggufs: Mapping[str, Path], only: Sequence[str] | None
) -> list[Row]:
    losses = lost() if model.is_demo else {}
    ways = model.named()
    against = {way.name: way.against for way in model.ways} | {w.name: w.against for w in model.gguf_ways}
    rows = []
    for name, folder in folders.items():
        device = ways[name].device if name in ways else None
        read = read_bytes(_graph(folder), device is not None and device.four_bit != "kept")
        rows.append(Row(name, folder_bytes(folder), against.get(name), read, losses.get(name, "")))
    for name, file in ggufs.items():
        size = file.stat().st_size
        rows.append(Row(name, size, against[name], size, losses.get(name, "")))
    if model.is_demo and (not only or PEFT in only):
        size = folder_bytes(model.base) + folder_bytes(model.adapter)
        rows.append(Row(PEFT, size, "merged int4", lost="nothing, as trained"))
    return rows


def _graph(folder: Path) -> Path:
    """Ours, or that of GenAI's builder."""
    return next(path for path in (folder / "onnx" / "model.onnx", folder / "model.onnx") if path.is_file())


def _explained(model: Model, bandwidth: float) -> str:
    """What the columns of a table are."""
    text = (
        f"{model.name}. *prompt*: tokens/s of a prompt of {LONG}, before decoding. *limit*: tokens/s were "
        f"the weights read once for each token, and no more, at {bandwidth / 1e9:.1f} GB/s, the "
        "best that so many threads read before and after (a cache that holds part of them goes above it). "
    )
    if model.is_demo:
        return text + "*lost*: of the adapter's effect, from [drift-table.md](drift-table.md)."
    return (
        text
        + "Random weights say nothing that could be lost; what blocks and heads lose, the demo's rows say."
    )


def _workers(
    model: Model, folders: Mapping[str, Path], ggufs: Mapping[str, Path], with_peft: bool, threads: int
) -> dict[str, Worker]:
    ways = model.named()
    workers = {name: _worker(folder, ways.get(name), threads) for name, folder in folders.items()}
    huge = {way.name for way in model.gguf_ways if way.huge_pages}
    for name, file in ggufs.items():
        command = [str(_python()), bench_llama_cpp.__file__, str(file), "--threads", str(threads)]
        workers[name] = Worker(command, **(_HUGE if name in huge else {}))
    if with_peft:
        command = [sys.executable, "-m", "scripts.bench_peft", str(model.base), str(model.adapter)]
        workers[PEFT] = Worker([*command, "--threads", str(threads)], OMP_NUM_THREADS=str(threads))
    return workers


def _worker(folder: Path, way: Way | None, threads: int) -> Worker:
    if way is None or way.device is None:
        return genai(folder, threads)
    command = [sys.executable, "-m", "scripts.bench_session", str(folder), "--threads", str(threads)]
    return Worker([*command, *way.device.words()])


def _folders(model: Model, out: Path, only: list[str] | None, keep: bool) -> dict[str, Path]:
    """The exports by name, made where they aren't to be kept or aren't there."""
    folders = {BUILDER: out / "builder"} | {way.name: out / way.folder for way in model.ways}
    folders = {name: folder for name, folder in folders.items() if not only or name in only}
    ways, made = model.named(), set[Path]()
    for name, folder in folders.items():
        if folder in made or (keep and (folder / "genai_config.json").is_file()):
            continue
        say(f"{name}: exporting")
        made.add(folder)
        if (way := ways.get(name)) is None:
            build(model.float_base, folder)
        else:
            _export(model, way, folder)
    return folders


def _export(model: Model, way: Way, folder: Path) -> None:
    if way.planned:
        say("  after planning, which takes a quarter of an hour")
        bench_drift_ways.plan_blocks(prepare(), folder)
        return
    target.export(
        model.base,
        [(model.adapter, 1.0)],
        folder,
        mode=way.mode,
        weights=way.weights,
        options=way.options,
        rounding=model.rounding if way.weights != "nf4" else None,
        force=True,
    )


def build(source: Path, folder: Path) -> None:
    """A float folder as GenAI's own builder quantizes it to int4."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    cache = str(folder / "cache")
    options = parse_extra_options(None, str(source), str(folder), "int4", "cpu", cache, [])
    create_model(None, str(source), str(folder), "int4", "cpu", cache, **options)


def _python() -> Path:
    return bench_llama_cpp.environment(cache_folder() / "llama-cpp")


def _ggufs(model: Model, out: Path, only: Sequence[str] | None, keep: bool) -> dict[str, Path]:
    """The GGUF files by name: of llama.cpp's own quantizer, and ours with the adapter merged.

    Ours are rounded to nearest, which has the bytes and the speed of any other rounding.
    """
    found = {}
    for way in model.gguf_ways:
        if only and way.name not in only:
            continue
        folder = out / f"gguf-{way.kind.lower()}"
        found[way.name] = folder / "model.gguf" if way.ours else out / f"model-{way.kind.lower()}.gguf"
        if found[way.name].is_file() and (keep or not way.ours):
            continue
        say(f"{way.name}: exporting")
        if way.ours:
            _export_gguf(model, way.kind, folder)
        else:
            _quantize(model, found[way.name], way.kind)
    return found


def _export_gguf(model: Model, kind: str, folder: Path) -> None:
    rounding = Rounding(method="rtn") if kind != "F16" else None
    adapters = [(model.adapter, 1.0)]
    target.export(
        model.base, adapters, folder, target="gguf", weights=kind.lower(), rounding=rounding, force=True
    )


def _quantize(model: Model, made: Path, kind: str) -> None:
    """A model by llama.cpp's own quantizer: from the GGUF that the demo's base was made of, or from ours."""
    with tempfile.TemporaryDirectory(dir=made.parent) as temporary:
        if model.is_demo:
            source = demo_model.download(Path(temporary))
        else:
            source = Path(temporary) / "f16" / "model.gguf"
            _export_gguf(model, "F16", source.parent)
        command = [str(_python()), bench_llama_cpp.__file__, str(source)]
        subprocess.run([*command, "--quantize", str(made), "--kind", kind], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
