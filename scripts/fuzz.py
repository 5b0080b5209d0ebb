"""Fuzzes the readers: a process for each, watched, and a table of how they fared (scripts/fuzz)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzzing import child
from tests.fuzzing.target import attempt
from tests.fuzzing.targets import ALL

_MOST_ENDS = 50  # processes of one target that end early, before the rest of its inputs is given up
_UNTOLD = b"\xff" * 32
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Fared:
    """How one reader fared: inputs read, those it took, those that failed, and the most memory and time."""

    name: str
    inputs: int = 0
    taken: int = 0
    failures: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    peak: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="readers, all by default (--list)")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0, help="other inputs for another number")
    parser.add_argument("--jobs", type=int, default=1, help="readers at once")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/fuzz"), help="where inputs that failed are kept"
    )
    parser.add_argument("--list", action="store_true", help="print the readers and stop")
    parser.add_argument("--replay", type=Path, help="read one kept input again")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(ALL))
        return 0
    if unknown := [name for name in asked.targets if name not in ALL]:
        parser.error(f"no reader is called {unknown[0]}; --list names them")
    if asked.replay is not None:
        if len(asked.targets) != 1:
            parser.error("name the one reader that the input is for")
        return _replay(asked.targets[0], asked.replay)
    names = asked.targets or list(ALL)
    out = asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{'reader':28}{'inputs':>8}{'taken':>8}{'failures':>9}{'seconds':>9}{'slowest':>9}{'peak MB':>9}")
    with ThreadPoolExecutor(asked.jobs) as pool:
        fared = list(pool.map(lambda name: _fuzz(name, asked.seed, asked.inputs, out), names))
    failed = sum(one.failures for one in fared)
    if failed:
        print(f"{failed} inputs failed; some of each kind are in {out}")
    return 1 if failed else 0


def _replay(name: str, path: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        ALL[name].prepare(Path(folder))
        taken = attempt(ALL[name], child.saved(path), Path(folder))
    print("taken" if taken else "refused in one sentence")
    return 0


def _fuzz(name: str, seed: int, count: int, out: Path) -> Fared:
    """Give a reader all inputs, in as many processes as it takes."""
    fared, start, first, ends = Fared(name), time.monotonic(), 0, 0
    shutil.rmtree(out / name, ignore_errors=True)
    root = str(_SHARED_MEMORY) if os.access(_SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root, prefix="vera-edge-fuzz-") as folder:
        place = Path(folder) / "place"
        while first < count and ends < _MOST_ENDS:
            place.write_bytes(_UNTOLD)
            words = [name, seed, first, count, out, place]
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzzing.child", *map(str, words)],
                capture_output=True,
                env={**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
                check=False,
            )
            told = place.read_bytes()
            if told == _UNTOLD:
                sys.exit(f"{name} can't be begun:\n{done.stderr.decode(errors='replace')}")
            index, failures, taken, peak = (
                int.from_bytes(told[at : at + 8], "little") for at in (0, 8, 16, 24)
            )
            fared.failures, fared.taken = fared.failures + failures, fared.taken + taken
            fared.peak = max(fared.peak, peak)
            if done.returncode == 0:
                fared.slowest = max(fared.slowest, json.loads(done.stdout.splitlines()[-1])["slowest"])
                first = count
                break
            ends += 1
            if done.returncode != child.TOO_LARGE:
                fared.failures += 1
                _keep(name, seed, index, out, done.returncode, done.stderr.decode(errors="replace"))
            first = index + 1
    fared.inputs, fared.seconds = first, time.monotonic() - start
    print(
        f"{name:28}{fared.inputs:8}{fared.taken:8}{fared.failures:9}{fared.seconds:9.0f}{fared.slowest:9.2f}"
        f"{fared.peak >> 20:9}",
        flush=True,
    )
    return fared


def _keep(name: str, seed: int, index: int, out: Path, code: int, said: str) -> None:
    """Save the input that ended a process."""
    target = ALL[name]
    (out / name).mkdir(parents=True, exist_ok=True)
    one = child.number(target, target.seeds(), seed, index)
    child.save(
        out / name / f"ended-{index}", one, f"input {index} ended the process (exit {code})\n{said[-8000:]}"
    )


if __name__ == "__main__":
    sys.exit(main())
