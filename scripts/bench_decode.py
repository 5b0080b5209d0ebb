"""Measure decoding speed: our exports beside what else runs the same model on a CPU.

    scripts/bench_decode [--model demo|1.2b] [--tokens 48] [--rounds 3] [--loads 4] [--threads N ...]
                         [--llama-cpp] [--only WAY ...] [--keep] [--prepare] [--write]

The model is the demo's, or a Llama of 1.2 billion random weights, which are rounded to nearest: speed doesn't
ask what they say. Beside ours run the int4 of ONNX Runtime GenAI's own builder, torch with PEFT (the demo's
model alone), and, when asked for, llama.cpp, which is compiled from the registry's source first, with Q4_0
and Q8_0 of its own quantizer and with our GGUF files of the demo, rounded to nearest. What libraries say goes
into a log. `--write` puts the demo's tables into docs/speed.md.
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

from scripts import bench_llama_cpp, bench_models, demo_model
from scripts.bench_decode_rows import BUILDER, GGUF_WAYS, PEFT, WAYS, Way, lost, read_bytes
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


@dataclass(frozen=True)
class Model:
    """What is measured. `own_loss`: whether docs/drift-table.md speaks of it."""

    name: str
    base: Path
    float_base: Path
    adapter: Path
    rounding: Rounding | None = None
    own_loss: bool = False


def main() -> None:
    given = _arguments()
    out = cache_folder() / ("bench-decode" if given.model == DEMO else f"bench-decode-{given.model}")
    out.mkdir(parents=True, exist_ok=True)
    with quietly(out / "log"):
        model = _model(given.model, out)
        folders = _folders(model, out, given.only, given.keep)
        ggufs = _ggufs(model, out, given.only, given.keep) if given.llama_cpp and model.own_loss else {}
    if given.prepare:
        return
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
    say("\n".join(lines))
    if given.write:
        write_section("decode", lines[:-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=(DEMO, LARGE), default=DEMO)
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
    given = parser.parse_args()
    if given.write and given.model != DEMO:
        parser.error("docs/speed.md has the demo's tables; --write is for them")
    return given


def _model(name: str, out: Path) -> Model:
    if name == DEMO:
        demo = prepare()
        return Model("SmolLM2-135M", demo.base, demo.float_base, demo.adapter, own_loss=True)
    say(f"{name}: making a base of random weights")
    bench_models.make(bench_models.SIZES[name], _RANK, out, ("bf16", "nf4"))
    return Model(
        f"A random Llama, {name}", out / "nf4", out / "bf16", out / "adapter", Rounding(method="rtn")
    )


def _rows(
    model: Model, folders: Mapping[str, Path], ggufs: Mapping[str, Path], only: Sequence[str] | None
) -> list[Row]:
    losses = lost() if model.own_loss else {}
    ways = {way.name: way for way in WAYS}
    against = {way.name: way.against for way in (*WAYS, *GGUF_WAYS)}
    rows = []
    for name, folder in folders.items():
        graph = next(
            path for path in (folder / "onnx" / "model.onnx", folder / "model.onnx") if path.is_file()
        )
        read = read_bytes(graph, ways[name].four_bit is not None if name in ways else False)
        rows.append(Row(name, folder_bytes(folder), against.get(name), read, losses.get(name, "")))
    for name, file in ggufs.items():
        size = file.stat().st_size
        rows.append(Row(name, size, against[name], size, losses.get(name, "")))
    if model.own_loss and (not only or PEFT in only):
        rows.append(Row(PEFT, folder_bytes(model.base) + folder_bytes(model.adapter), "merged int4"))
    return rows


def _explained(model: Model, bandwidth: float) -> str:
    """What the columns of a table are."""
    text = (
        f"{model.name}. *prompt*: tokens/s of a prompt of {LONG}, before decoding. *limit*: tokens/s were "
        f"the weights read once for each token, and no more, at {bandwidth / 1e9:.1f} GB/s, the "
        "best that so many threads read before and after (a cache that holds part of them goes above it)."
    )
    return text + (
        " *lost*: of the adapter's effect, from [drift-table.md](drift-table.md)." * model.own_loss
    )


def _workers(
    model: Model, folders: Mapping[str, Path], ggufs: Mapping[str, Path], with_peft: bool, threads: int
) -> dict[str, Worker]:
    ways = {way.name: way for way in WAYS}
    workers = {name: _worker(folder, ways.get(name), threads) for name, folder in folders.items()}
    for name, file in ggufs.items():
        command = [str(_python()), bench_llama_cpp.__file__, str(file), "--threads", str(threads)]
        workers[name] = Worker(command)
    if with_peft:
        command = [sys.executable, "-m", "scripts.bench_peft", str(model.base), str(model.adapter)]
        workers[PEFT] = Worker([*command, "--threads", str(threads)], OMP_NUM_THREADS=str(threads))
    return workers


def _worker(folder: Path, way: Way | None, threads: int) -> Worker:
    if way is None or way.four_bit is None:
        return genai(folder, threads)
    command = [sys.executable, "-m", "scripts.bench_session", str(folder), "--threads", str(threads)]
    return Worker([*command, "--four-bit", way.four_bit])


def _folders(model: Model, out: Path, only: list[str] | None, keep: bool) -> dict[str, Path]:
    """The exports by name, made where they aren't to be kept or aren't there."""
    folders = {BUILDER: out / "builder"} | {way.name: out / way.folder for way in WAYS}
    folders = {name: folder for name, folder in folders.items() if not only or name in only}
    ways, made = {way.name: way for way in WAYS}, set[Path]()
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
    """The demo's GGUF files by name: of llama.cpp's own quantizer without the adapter, ours with it merged.

    Ours are rounded to nearest, which has the bytes and the speed of any other rounding.
    """
    found = {}
    for way in GGUF_WAYS:
        if only and way.name not in only:
            continue
        folder = out / f"gguf-{way.kind.lower()}"
        found[way.name] = folder / "model.gguf" if way.ours else out / f"model-{way.kind.lower()}.gguf"
        if found[way.name].is_file() and (keep or not way.ours):
            continue
        say(f"{way.name}: exporting")
        if not way.ours:
            _quantize(found[way.name], way.kind)
            continue
        rounding, weights = Rounding(method="rtn"), way.kind.lower()
        adapters = [(model.adapter, 1.0)]
        target.export(
            model.base, adapters, folder, target="gguf", weights=weights, rounding=rounding, force=True
        )
    return found


def _quantize(made: Path, kind: str) -> None:
    """The demo's model by llama.cpp's own quantizer, from the GGUF that the demo's base was made of."""
    with tempfile.TemporaryDirectory() as temporary:
        source = demo_model.download(Path(temporary))
        command = [str(_python()), bench_llama_cpp.__file__, str(source)]
        subprocess.run([*command, "--quantize", str(made), "--kind", kind], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
