"""What a start takes: processes that open a bundle and give a first token, in turns.

python -m scripts.bench_start BUNDLE... [--rounds 3] [--threads 1]   prints a table in Markdown

Once with every file read, once with what is remembered of files that haven't changed; 4-bit weights are
expanded, as by default. Processor time of a process from its launch, imports included, which leaves out what
else the machine does, and the time one waits. The files lie in memory from the first round on, and as much
memory as a start takes is written to before each: a virtual machine may have to get it from its host first,
which took seconds for a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench_turns import say
from vera_edge.device.check.hardware import processor

_PROMPT = "What is the capital of France?"
_WAYS = ("read", "remembered")
_COLUMNS = ("imports", "open", "first", "waited_open", "waited_first")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way is not None:
        print(json.dumps(_start(given.bundles[0], given.threads, given.way, given.launched)))
        return
    found: dict[tuple[Path, str], list[dict[str, Any]]] = {}
    peaks: dict[Path, int] = {}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(given.rounds + 1):
            for folder in given.bundles:
                for way in _WAYS:
                    _touch(peaks.get(folder, 0))
                    row = _process(folder, given.threads, way, cache)
                    peaks[folder] = row["peak"]
                    if number:  # the first reads the files from the disk
                        found.setdefault((folder, way), []).append(row)
    heads = ("imports, s", "open, s", "first token, s", "open, waited", "first token, waited", "peak, MB")
    say(f"| bundle | MB | verification | {' | '.join(heads)} |")
    say(f"|---|--:|---|{'--:|' * len(heads)}")
    for (folder, way), rows in found.items():
        if way == "remembered" and not rows[0]["remembered"]:
            say(f"{folder}: nothing was remembered; its files changed a moment ago")
        times = (_spread([row[name] for row in rows]) for name in _COLUMNS)
        size, peak = rows[0]["size"] / 1e6, max(row["peak"] for row in rows) / 1e6
        say(f"| {folder.name} | {size:,.0f} | {way} | {' | '.join(times)} | {peak:,.0f} |")
    say(
        "\nSeconds since the launch, the first three of processor time, medians (least to most) of "
        f"{given.rounds} rounds in turns; threads: "
        f"{given.threads}; {processor()[0]}, load {os.getloadavg()[0]:.1f} at the end."
    )


def _touch(size: int) -> None:
    """Write to so many bytes of memory, in small pages, and give them back."""
    with mmap.mmap(-1, size or mmap.PAGESIZE) as memory:
        for start in range(0, len(memory), mmap.PAGESIZE):
            memory[start] = 1


def _process(folder: Path, threads: int, way: str, cache: str) -> dict[str, Any]:
    words = ["-m", "scripts.bench_start", str(folder), "--threads", str(threads), "--way", way]
    words += ["--launched", str(time.time())]
    environment = os.environ | {"VERA_EDGE_CACHE": cache}
    done = subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def _start(folder: Path, threads: int, way: str, launched: float) -> dict[str, Any]:
    """When this process has imported, opened, and given a token: by its processor time, and since `launched`.

    launched: in seconds since the epoch.
    """
    from vera_edge.device.runtime.session import Session
    from vera_edge.memory import peak_rss

    row: dict[str, Any] = {"imports": time.process_time()}
    session = Session.open(folder, threads=threads, reread=way == "read")
    row |= {"open": time.process_time(), "waited_open": time.time() - launched}
    next(iter(session.generate(_PROMPT, max_tokens=1)), None)
    row |= {"first": time.process_time(), "waited_first": time.time() - launched}
    looked = session.verified
    assert looked is not None
    return row | {"remembered": looked.remembered, "size": looked.size, "peak": peak_rss() or 0}


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
