"""Kills a merge at random moments, again and again, and looks at what it leaves.

    python scripts/soak_merge.py BASE ADAPTER [--kills 200] [--workers N] [--seed 0] [--to bf16]

After each kill the target must be absent or whole, and the same command must go on and end with the bytes of
a merge that nobody disturbed. A merge that a kill came too late for is begun anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from vera_edge.merging import stage


@dataclass(frozen=True)
class Merge:
    """The command. `folder`: where its output, "out", and an undisturbed one, "whole", are written."""

    base: Path
    adapter: Path
    folder: Path
    options: tuple[str, ...] = ()
    workers: int = 1

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, name: str = "out", workers: int | None = None) -> subprocess.Popen[bytes]:
        """Begin it, in a session of its own."""
        words = ["merge", str(self.base), str(self.adapter), "-o", str(self.folder / name), "--method", "rtn"]
        words += [*self.options, "--workers", str(workers or self.workers)]
        return subprocess.Popen([sys.executable, "-m", "vera_edge", *words], stdout=subprocess.DEVNULL)


@dataclass
class Found:
    """kills: that hit a run. finished: runs that ended by themselves before. resumed: runs that began with
    units already journaled. strays: files left beside the outputs at the end."""

    kills: int = 0
    finished: int = 0
    resumed: int = 0
    strays: int = 0
    seconds: float = 0.0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def soak(merge: Merge, kills: int, seed: int = 0) -> Found:
    """Kill `merge` that many times; raises AssertionError when anything is lost, or only looks finished.

    Every other kill waits for the journal to grow: most of a small merge's time goes to starting the program.
    """
    found, rng, begun = Found(), random.Random(seed), time.monotonic()
    assert _timed(merge, "warm")[0] == 0
    status, took = _timed(merge, "whole")
    assert status == 0, "the undisturbed merge fails"
    whole = contents(merge.folder / "whole")
    while found.kills < kills:
        found.resumed += _journaled(merge) > 0
        if rng.random() < 0.5:
            _run_and_kill(merge, rng.uniform(0.3, 1.1) * took, found)
        else:
            _run_and_kill(merge, rng.expovariate(1 / 0.01), found, _journaled(merge) + rng.randrange(1, 9))
        if merge.out.exists():
            _check(merge, whole, f"after kill {found.kills}, the target is there and isn't whole")
            stage.tidy(merge.out)
            shutil.rmtree(merge.out)
    found.resumed += _journaled(merge) > 0
    assert merge.start().wait() == 0, "the merge doesn't end after the last kill"
    _check(merge, whole, "the resumed merge has other bytes")
    left = {path.name for path in merge.folder.iterdir()} - {"out", "whole", "warm"}
    found.strays, found.seconds = len(left), round(time.monotonic() - begun, 1)
    return found


def _check(merge: Merge, whole: dict[str, bytes], what: str) -> None:
    now = contents(merge.out)
    wrong = sorted(name for name in now.keys() | whole.keys() if now.get(name) != whole.get(name))
    assert not wrong, f"{what}: {', '.join(wrong)}"


def _timed(merge: Merge, name: str) -> tuple[int, float]:
    begun = time.monotonic()
    return merge.start(name, 1).wait(), time.monotonic() - begun


def _journaled(merge: Merge) -> int:
    """Units that the next run finds in the journal."""
    journal = stage.folder_of(merge.out) / "journal"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def _run_and_kill(merge: Merge, after: float, found: Found, units: int = 0) -> None:
    """Kill a run `after` seconds from its start, or from the moment that `units` are journaled."""
    running = merge.start()
    while _journaled(merge) < units and running.poll() is None:
        time.sleep(0.001)
    try:
        status = running.wait(after)
    except subprocess.TimeoutExpired:
        os.kill(running.pid, signal.SIGKILL)
        found.kills += running.wait() == -signal.SIGKILL
        return
    assert status == 0, "a run that nobody killed fails"
    found.finished += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", default="bf16", help="the format, as vera-edge merge has it")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-merge-") as folder:
        merge = Merge(words.base, words.adapter, Path(folder), ("--to", words.to), words.workers)
        print(json.dumps(asdict(soak(merge, words.kills, words.seed))))


if __name__ == "__main__":
    main()
