"""What the speed benches share: workers that take turns, ratios of paired rounds, and the page they write.

All ways to run a model are loaded at once, each in a process of its own, and take turns, a round each, so
that what else the machine does falls on all of them alike. Where in memory a model's weights come to lie
changes its speed by a fifth and more; so all are loaded anew several times.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.prepare_demo import ROOT
from vera_edge.device.check.bench import ratio_of_medians
from vera_edge.device.check.hardware import processor

PAGE = ROOT / "docs" / "speed.md"
PROMPT = 32  # tokens before the clock starts


class Worker:
    """A model in a process of its own: it gets a number of tokens on a line, and answers with its speed.

    That is tokens per second of greedy decoding after a prompt of PROMPT tokens.
    """

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._command = " ".join(command)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | environment,
            cwd=ROOT,
        )
        self._answer()  # when the model is loaded

    def round(self, tokens: int) -> float:
        """Tokens per second."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._command} ended; run it by hand to see why")
        return line


@dataclass(frozen=True)
class Row:
    """A line of a table of speeds. `against`: the row its ratio is taken to."""

    name: str
    size: int
    against: str | None


def genai(folder: Path, threads: int) -> Worker:
    """A folder in ONNX Runtime GenAI, with its default adapter if it has one."""
    return Worker([sys.executable, "-m", "scripts.bench_genai", str(folder), "--threads", str(threads)])


def measure(
    load: Callable[[], Mapping[str, Worker]], tokens: int, rounds: int, loads: int
) -> dict[str, list[float]]:
    """Tokens per second by worker, by load and round; a round more at each start warms up."""
    speeds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(loads):
        workers = load()
        for number in range(rounds + 1):
            for name, worker in workers.items():
                speed = worker.round(tokens)
                if number:
                    speeds[name].append(speed)
        for worker in workers.values():
            worker.close()
    return speeds


def table(rows: Sequence[Row], speeds: Mapping[str, list[float]]) -> list[str]:
    """Lines of Markdown: median speed, its spread, and the ratio with its 95 % interval."""
    lines = [
        "| way | MB | tokens/s, median | lowest to highest | ratio | 95 % | to |",
        "|---|--:|--:|---|--:|---|---|",
    ]
    for row in rows:
        found = speeds[row.name]
        cells = [
            row.name,
            f"{row.size / 1e6:,.0f}",
            f"{statistics.median(found):.1f}",
            f"{min(found):.1f} to {max(found):.1f}",
        ]
        if row.against is not None and row.against in speeds:
            ratio, low, high = ratio_of_medians(found, speeds[row.against])
            cells += [f"**{ratio:.2f}**", f"{low:.2f} to {high:.2f}", row.against]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def footnote(rounds: int, loads: int, threads: int, *more: str) -> str:
    """How it was measured, where, and with what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnxruntime-genai"))
    load, processors = os.getloadavg()[0], f"{os.cpu_count()} cores of {processor()[0]}"
    return (
        f"{rounds} rounds in turns after each of {loads} loads, {threads} thread{'s' * (threads > 1)} on "
        f"{processors}, load {load:.1f} at the end. {', '.join((packages, *more))}."
    )


def write_section(name: str, lines: Sequence[str], file: Path = PAGE) -> None:
    """Put lines between the marks of a section of docs/speed.md, or of another page."""
    page = file.read_text(encoding="utf-8")
    first, last = f"<!-- {name}: written by scripts/bench_{name} -->", f"<!-- end of {name} -->"
    before, rest = page.split(first)
    after = rest.split(last)[1]
    file.write_text("\n".join([before + first, *lines, last]) + after, encoding="utf-8")


def say(text: Any) -> None:
    """Tell how far it is."""
    print(text, flush=True)
