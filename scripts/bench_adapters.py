"""Measure swaps and memory of 1, 10 and 1000 adapters on one bundle of the demo's model.

    scripts/bench_adapters [--counts 1 10 1000] [--swaps 200] [--lora] [--write]

In ONNX Runtime GenAI all adapters are loaded, and each swap makes another one active in a running generator.
In vera_edge.device each swap reads and checks another file. After every swap one token is computed, untimed.
`--lora`: pairs like those of the QLoRA of examples/lora in the place of the demo's vectors.
`--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench_drift_lora import LoraDemo
from scripts.bench_turns import PROMPT, say, write_section
from scripts.prepare_demo import cache_folder, prepare
from vera_edge.bundle import contents as bundle
from vera_edge.cores import available_cores
from vera_edge.device.check.hardware import processor
from vera_edge.exporting import onnx_adapter as packing
from vera_edge.exporting import target

Swaps = Callable[[Path, list[Path], int], tuple[list[float], float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 1000])
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--lora", action="store_true", help="a LoRA's pairs in the place of VeRA's vectors")
    parser.add_argument("--write", action="store_true", help="write the table into docs/speed.md")
    parser.add_argument("--one", nargs=3, metavar=("RUNTIME", "BUNDLE", "ADAPTERS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        runtime, folder, files = given.one
        print(json.dumps(RUNTIMES[runtime](Path(folder), sorted(Path(files).iterdir()), given.swaps)))
        return
    demo, name = prepare(), "lora-adapters" if given.lora else "adapters"
    folder, adapter = cache_folder() / f"bench-{name}", demo.adapter
    if given.lora:
        adapter = LoraDemo(demo.folder).adapter
    target.export(demo.base, [(adapter, 1.0)], folder, mode="branch", weights="int8", force=True)
    lines = [
        "| runtime | adapters | swap, ms, median | 99th percentile | memory they take, MB | each |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for count in given.counts:
        with tempfile.TemporaryDirectory(dir=cache_folder()) as files:
            size = write_adapters(folder, Path(files), count)
            for runtime in RUNTIMES:
                lines.append(_row(runtime, folder, Path(files), count, given.swaps))
                say(lines[-1])
    lines += [
        "",
        f"{size / 1e6:.2f} MB of {'pairs' if given.lora else 'vectors'} each; {given.swaps} swaps on "
        f"{available_cores()} cores of {processor()[0]}.",
    ]
    if given.write:
        write_section(name, lines, bench="adapters")


def write_adapters(folder: Path, files: Path, count: int) -> int:
    """`count` adapters with random vectors in `files`; the bytes of one's vectors."""
    manifest, draw = bundle.read(folder), np.random.default_rng(0)
    first = folder / manifest.adapters["default"]["file"]
    import onnxruntime

    known = onnxruntime.AdapterFormat.read_adapter(str(first)).get_parameters()
    shapes = {name: value.shape() for name, value in known.items()}
    assert manifest.model_version is not None
    for number in range(count):
        vectors = {
            name: draw.standard_normal(shape, np.float32) * np.float32(0.1) for name, shape in shapes.items()
        }
        packing.write(files / f"{number:04}.onnx_adapter", vectors, manifest.model_version)
    return sum(array.nbytes for array in vectors.values())


def _row(runtime: str, folder: Path, files: Path, count: int, swaps: int) -> str:
    command = [sys.executable, "-m", "scripts.bench_adapters", "--swaps", str(swaps), "--one"]
    done = subprocess.run([*command, runtime, folder, files], capture_output=True, text=True, check=True)
    times, memory = json.loads(done.stdout.splitlines()[-1])
    median, slow = statistics.median(times), float(np.quantile(times, 0.99))
    return (
        f"| {runtime} | {count} | {1e3 * median:.2f} | {1e3 * slow:.2f} | {memory / 1e6:.0f} | "
        f"{memory / 1e6 / count:.2f} |"
    )


def _genai(folder: Path, files: list[Path], swaps: int) -> tuple[list[float], float]:
    """Seconds of each swap, and the bytes of memory that loading and using all adapters took."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    adapters, params = og.Adapters(model), og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=PROMPT + swaps + len(files) + 8)
    generator = og.Generator(model, params)
    generator.append_tokens(np.arange(100, 100 + PROMPT, dtype=np.int32)[None])
    generator.generate_next_token()
    before = _resident()
    for path in files:
        adapters.load(str(path), path.stem)

    def swap(path: Path) -> None:
        generator.set_active_adapter(adapters, path.stem)

    times = _swaps(swap, generator.generate_next_token, files, swaps)
    return times, _resident() - before


def _device(folder: Path, files: list[Path], swaps: int) -> tuple[list[float], float]:
    """The same in vera_edge.device, which holds the active adapter only."""
    from vera_edge.device.runtime.session import Session

    session = Session.open(folder, None)
    tokens = np.arange(100, 100 + PROMPT, dtype=np.int64)
    session.logits(tokens)
    before = _resident()
    times = _swaps(session.swap, lambda: session.logits(tokens[:1]), files, swaps)
    return times, _resident() - before


def _swaps(
    swap: Callable[[Path], None], step: Callable[[], Any], files: list[Path], swaps: int
) -> list[float]:
    """Time swaps in turn over all files, after one of each."""
    times = []
    for number in range(len(files) + swaps):
        started = time.perf_counter()
        swap(files[number % len(files)])
        if number >= len(files):
            times.append(time.perf_counter() - started)
        step()
    return times


def _resident() -> int:
    """Bytes of this process in memory, files that are mapped included (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


RUNTIMES: dict[str, Swaps] = {"ONNX Runtime GenAI": _genai, "vera_edge.device": _device}


if __name__ == "__main__":
    main()
