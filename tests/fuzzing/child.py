"""One reader, many inputs, in a process of its own: what `scripts/fuzz` starts and watches.

A process that ends early did so at the input whose number stands in its place file: it crashed, took too long
(faulthandler ends it and says where it was), or ran out of what memory it may take.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzzing.target import Seed, Target, attempt
from tests.fuzzing.targets import ALL

SECONDS = 5.0  # for an input
MEMORY = 512 << 20  # bytes over what the process held once every seed was read
TOO_LARGE = 77  # exit code
_KEPT = 3  # inputs that are saved of each kind of failure


def number(target: Target, seeds: list[Seed], seed: int, index: int) -> Seed:
    """The input of this number, the same on every machine; the seeds themselves come first."""
    if index < len(seeds):
        return seeds[index]
    return target.input(seeds, Random(f"{seed}:{target.name}:{index}"))


@dataclass
class Failures:
    """Writes inputs that failed, a few of each kind, and counts all."""

    out: Path
    count: int = 0

    def add(self, target: Target, seed: Seed, index: int, kind: str, trace: str) -> None:
        self.count += 1
        name = hashlib.sha256(kind.encode()).hexdigest()[:8]
        folder = self.out / target.name
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.glob(f"{name}-*.input*"))) < _KEPT:
            save(folder / f"{name}-{index}", seed, f"input {index}: {kind}\n{trace}")


def save(path: Path, seed: Seed, text: str) -> None:
    """`path`.input[@beside] and beside it, in a .txt, how it failed."""
    beside = "@" + seed.beside.replace("/", "+") if seed.beside else ""
    path.with_name(f"{path.name}.input{beside}").write_bytes(seed.data)
    path.with_name(f"{path.name}.txt").write_text(text, errors="backslashreplace")


def saved(path: Path) -> Seed:
    """What `save` wrote."""
    return Seed(path.read_bytes(), path.name.partition(".input")[2].removeprefix("@").replace("+", "/"))


def kind_of(error: BaseException) -> str:
    """Errors of one class from one line are one kind."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}vera_edge" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"


def run(target: Target, seed: int, first: int, count: int, out: Path, place: Path) -> dict[str, float]:
    """Read inputs `first` to `count`; what the last line of the output says of them."""
    failures, taken, slowest, start = Failures(out), 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory(dir=place.parent) as name, place.open("r+b", buffering=0) as told:
        folder = Path(name)
        target.prepare(folder)
        seeds = target.seeds()
        for one in seeds:
            attempt(target, one, folder)
        before = _limit_memory()
        for index in range(first, count):
            one = number(target, seeds, seed, index)
            _tell(told.fileno(), index, failures.count, taken, _peak() - before)
            began = time.monotonic()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                taken += attempt(target, one, folder)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of a library in Rust is no Exception
                failures.add(target, one, index, kind_of(error), traceback.format_exc())
            finally:
                faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, time.monotonic() - began)
            if _peak() - before > MEMORY:
                failures.add(target, one, index, "more than 512 MB", f"{_peak() - before} bytes")
                _tell(told.fileno(), index, failures.count, taken, _peak() - before)
                os._exit(TOO_LARGE)
        _tell(told.fileno(), count, failures.count, taken, _peak() - before)
    return {"slowest": slowest, "seconds": time.monotonic() - start}


def _tell(place: int, *numbers: int) -> None:
    os.pwrite(place, b"".join(value.to_bytes(8, "little") for value in numbers), 0)


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # KiB but on macOS


def _limit_memory() -> int:
    """Let nothing be allocated far beyond what is held now; the peak of what was."""
    status = Path("/proc/self/status")
    if status.exists():
        held = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
        most = (int(held.split()[1]) << 10) + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return _peak()


def main() -> None:
    name, seed, first, count, out, place = sys.argv[1:]
    faulthandler.enable()
    sys.stdout = sys.stderr  # what libraries print isn't for the one who reads the last line
    found = run(ALL[name], int(seed), int(first), int(count), Path(out), Path(place))
    print(json.dumps(found), file=sys.__stdout__)


if __name__ == "__main__":
    main()
