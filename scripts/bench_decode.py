"""Measure decoding speed of the demo's model: our exports beside what else runs it on a CPU.

    scripts/bench_decode [--tokens 48] [--rounds 3] [--loads 4] [--threads N ...] [--llama-cpp]
                         [--only WAY ...] [--write]

Beside them run the int4 of ONNX Runtime GenAI's own builder, torch with PEFT, and, when asked for, Q4_0 of
llama.cpp, which is compiled from the registry's source first. `--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from scripts import bench_llama_cpp, demo_model
from scripts.bench_turns import Row, Worker, footnote, genai, measure, say, table, write_section
from scripts.prepare_demo import ROOT, Demo, cache_folder, prepare
from vera_edge.cores import available_cores
from vera_edge.exporting import target
from vera_edge.measuring.artefact import folder_bytes

BUILDER, LLAMA_CPP, PEFT = "GenAI's builder, int4", "llama.cpp, Q4_0", "torch, PEFT on NF4"


@dataclass(frozen=True)
class Way:
    """One of our exports. `against`: the way its ratio is taken to."""

    name: str
    mode: str
    weights: str
    against: str
    options: Mapping[str, str] = field(default_factory=dict)


WAYS = (
    Way("merged int4, int4 head", "merged", "int4", BUILDER, {"head": "int4"}),
    Way("merged int4", "merged", "int4", LLAMA_CPP),
    Way("merged int4, blocks of 64", "merged", "int4", LLAMA_CPP, {"block": "64"}),
    Way("merged int4, blocks of 64, int4 head", "merged", "int4", LLAMA_CPP, {"block": "64", "head": "int4"}),
    Way("branch int4", "branch", "int4", "merged int4"),
    Way("branch int4, int4 projections", "branch", "int4", "merged int4", {"projections": "int4"}),
    Way("merged int8", "merged", "int8", "merged int4"),
    Way("merged int8, blocks of 64", "merged", "int8", "merged int8", {"block": "64"}),
    Way("branch int8", "branch", "int8", "merged int8"),
    Way("branch int8, fp32 projections", "branch", "int8", "merged int8", {"projections": "fp32"}),
    Way("branch nf4", "branch", "nf4", "merged int8"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=int, default=4, help="how often models are loaded anew")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[available_cores()], help="a table for each"
    )
    parser.add_argument("--llama-cpp", action="store_true", help="compile and run llama.cpp too")
    parser.add_argument("--only", nargs="*", help="these ways alone")
    parser.add_argument("--keep", action="store_true", help="take exports that are there from an earlier run")
    parser.add_argument("--prepare", action="store_true", help="make what is measured, and stop")
    parser.add_argument("--write", action="store_true", help="write the table into docs/speed.md")
    given = parser.parse_args()
    demo, out = prepare(), cache_folder() / "bench-decode"
    folders = _folders(demo, out, given.only, given.keep)
    gguf = _gguf(out) if given.llama_cpp else None
    if given.prepare:
        return
    sizes = {name: folder_bytes(folder) for name, folder in folders.items()}
    if gguf is not None:
        sizes[LLAMA_CPP] = gguf.stat().st_size
    if not given.only or PEFT in given.only:
        sizes[PEFT] = folder_bytes(demo.base) + folder_bytes(demo.adapter)
    against = {way.name: way.against for way in WAYS} | {PEFT: "merged int4", LLAMA_CPP: "merged int4"}
    rows = [Row(name, size, against.get(name)) for name, size in sizes.items()]
    more = (bench_llama_cpp.PACKAGE.replace("==", " "),) if gguf is not None else ()
    lines: list[str] = []
    for threads in given.threads:
        load = partial(_workers, demo, folders, gguf, PEFT in sizes, threads)
        speeds = measure(load, given.tokens, given.rounds, given.loads)
        lines += [*table(rows, speeds), "", footnote(given.rounds, given.loads, threads, *more), ""]
    say("\n".join(lines))
    if given.write:
        write_section("decode", lines[:-1])


def _workers(
    demo: Demo, folders: Mapping[str, Path], gguf: Path | None, with_peft: bool, threads: int
) -> dict[str, Worker]:
    workers = {name: genai(folder, threads) for name, folder in folders.items()}
    if gguf is not None:
        command = [str(_python()), bench_llama_cpp.__file__, str(gguf), "--threads", str(threads)]
        workers[LLAMA_CPP] = Worker(command)
    if with_peft:
        command = [sys.executable, "-m", "scripts.bench_peft", str(demo.base), str(demo.adapter)]
        workers[PEFT] = Worker([*command, "--threads", str(threads)], OMP_NUM_THREADS=str(threads))
    return workers


def _folders(demo: Demo, out: Path, only: list[str] | None, keep: bool) -> dict[str, Path]:
    """The exports by name, made where they aren't to be kept or aren't there."""
    folders = {BUILDER: out / "builder"}
    folders |= {way.name: out / way.name.replace(", ", "-").replace(" ", "-") for way in WAYS}
    folders = {name: folder for name, folder in folders.items() if not only or name in only}
    ways = {way.name: way for way in WAYS}
    for name, folder in folders.items():
        if keep and (folder / "genai_config.json").is_file():
            continue
        say(f"{name}: exporting")
        if (way := ways.get(name)) is None:
            build(demo.float_base, folder)
            continue
        adapters = [(demo.adapter, 1.0)]
        target.export(
            demo.base, adapters, folder, mode=way.mode, weights=way.weights, options=way.options, force=True
        )
    return folders


def build(source: Path, folder: Path) -> None:
    """A float folder as GenAI's own builder quantizes it to int4."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    cache = str(folder / "cache")
    options = parse_extra_options(None, str(source), str(folder), "int4", "cpu", cache, [])
    create_model(None, str(source), str(folder), "int4", "cpu", cache, **options)


def _python() -> Path:
    return bench_llama_cpp.environment(cache_folder() / "llama-cpp")


def _gguf(out: Path) -> Path:
    """The demo's model in Q4_0, quantized by llama.cpp from the GGUF that the demo's base was made of."""
    made = out / "model-q4_0.gguf"
    if not made.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            source = demo_model.download(Path(temporary))
            command = [str(_python()), bench_llama_cpp.__file__, str(source), "--quantize", str(made)]
            subprocess.run(command, check=True, cwd=ROOT)
    return made


if __name__ == "__main__":
    main()
