"""What the machine can do, for benches whose goals are relative to it: float32 products, and copies of files.

    python -m scripts.bench_machine FOLDER     JSON: gflops, copied (bytes a second), cores, processor

All are the best of several tries, since another program's load makes a try slower and never faster.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scripts.bench_process import forget
from vera_edge.arrays import Array
from vera_edge.cores import available_cores
from vera_edge.device.check.hardware import processor

_SIDE = 3072
_FILE = 512 << 20
_READ = 256 << 20  # bytes for each thread, more than caches hold
_TRIES = 5


def main() -> None:
    folder = Path(sys.argv[1])
    cores = available_cores()
    measured = {"gflops": product_speed(cores), "copied": copy_speed(folder)}
    print(json.dumps(measured | {"cores": cores, "processor": processor()[0]}))


def product_speed(threads: int) -> float:
    """10^9 float32 operations a second of torch's product of two square matrices, on so many threads."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE)
    out, best = torch.empty(_SIDE, _SIDE), float("inf")
    for _ in range(_TRIES):
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - begun)
    return float(2 * _SIDE**3 / best / 1e9)


def read_speed(threads: int) -> float:
    """Bytes a second that so many threads read from memory, each its own array."""
    arrays = [np.ones(_READ // 8, np.uint64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_TRIES):
            begun = time.perf_counter()
            list(pool.map(_read, arrays))  # numpy lets go of the interpreter meanwhile
            best = min(best, time.perf_counter() - begun)
    return _READ * threads / best


def _read(array: Array) -> int:
    return int(array.max())


def copy_speed(folder: Path) -> float:
    """Bytes a second of a file's copy, read from the disk and flushed to it."""
    place = folder / "copied"
    place.mkdir()
    source, target, best = place / "source", place / "target", float("inf")
    try:
        piece = os.urandom(1 << 24)
        with source.open("wb") as stream:
            for _ in range(_FILE // len(piece)):
                stream.write(piece)
        for _ in range(3):
            target.unlink(missing_ok=True)
            forget(place)
            begun = time.perf_counter()
            shutil.copyfile(source, target)
            with target.open("rb+") as stream:
                os.fsync(stream.fileno())
            best = min(best, time.perf_counter() - begun)
    finally:
        shutil.rmtree(place)
    return _FILE / best


if __name__ == "__main__":
    main()
