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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from scripts.prepare_demo import ROOT
from vera_edge.device.check.bench import ratio_of_medians
from vera_edge.device.check.hardware import processor

_TERMINAL = os.fdopen(os.dup(1), "w")  # also while `quietly` sends other things elsewhere
PAGE = ROOT / "docs" / "speed.md"
PROMPT = 32  # tokens of a short prompt
LONG = 512  # tokens of the prompt whose speed is measured too


class Speed(NamedTuple):
    """Tokens per second: of a prompt of LONG tokens, and of greedy decoding after it."""

    prompt: float
    decode: float


class Worker:
    """A model in a process of its own: it gets a number of tokens on a line, and answers with its Speed."""

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

    def round(self, tokens: int) -> Speed:
        """Feed a prompt, and decode `tokens` more."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        prompt, decode = self._answer().split()
        return Speed(float(prompt), float(decode))

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
    """A line of a table of speeds.

    against: the row its ratio is taken to. read: bytes that a decoded token reads at least. lost: of the
    adapter's effect, as words.
    """

    name: str
    size: int
    against: str | None
    read: int | None = None
    lost: str = ""


def genai(folder: Path, threads: int) -> Worker:
    """A folder in ONNX Runtime GenAI, with its default adapter if it has one."""
    return Worker([sys.executable, "-m", "scripts.bench_genai", str(folder), "--threads", str(threads)])


def measure(
    load: Callable[[], Mapping[str, Worker]], tokens: int, rounds: int, loads: int
) -> dict[str, list[Speed]]:
    """The speeds by worker, by load and round; a round more at each start warms up."""
    speeds: defaultdict[str, list[Speed]] = defaultdict(list)
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


def table(
    rows: Sequence[Row], speeds: Mapping[str, Sequence[Speed]], bandwidth: float | None = None
) -> list[str]:
    """Lines of Markdown: median speeds, the ratio of decoding with its 95 % interval, the limit, the loss.

    bandwidth: bytes a second that this many threads read; without it there is no limit to show.
    """
    heads = ["way", "MB", "prompt", "tokens/s, median", "lowest to highest", "ratio", "95 %", "to"]
    marks = ["---", "--:", "--:", "--:", "---", "--:", "---", "---"]
    if bandwidth is not None:
        heads, marks = [*heads, "limit", "of it", "lost"], [*marks, "--:", "--:", "--:"]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(marks)}|"]
    for row in rows:
        found = [speed.decode for speed in speeds[row.name]]
        cells = [
            row.name,
            f"{row.size / 1e6:,.0f}",
            f"{statistics.median(speed.prompt for speed in speeds[row.name]):.0f}",
            f"{statistics.median(found):.1f}",
            f"{min(found):.1f} to {max(found):.1f}",
        ]
        if row.against is not None and row.against in speeds:
            ratio, low, high = ratio_of_medians(found, [speed.decode for speed in speeds[row.against]])
            cells += [f"**{ratio:.2f}**", f"{low:.2f} to {high:.2f}", row.against]
        else:
            cells += ["", "", ""]
        if bandwidth is not None:
            cells += [*_limit(row, found, bandwidth), row.lost]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _limit(row: Row, found: Sequence[float], bandwidth: float) -> tuple[str, str]:
    """Tokens per second that the memory allows, and what part of it was reached."""
    if row.read is None:
        return "", ""
    most = bandwidth / row.read
    return f"{most:.0f}", f"{statistics.median(found) / most:.2f}"


def footnote(rounds: int, loads: int, threads: int, *more: str) -> str:
    """How it was measured, where, and with what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnxruntime-genai"))
    load, processors = os.getloadavg()[0], f"{os.cpu_count()} cores of {processor()[0]}"
    return (
        f"{rounds} rounds in turns after each of {loads} loads, {threads} thread{'s' * (threads > 1)} on "
        f"{processors}, load {load:.1f} at the end. {', '.join((packages, *more))}."
    )


def write_section(name: str, lines: Sequence[str], file: Path = PAGE, bench: str = "") -> None:
    """Put lines between the marks of a section of docs/speed.md, or of another page.

    bench: the script that writes it, where the section has another name.
    """
    page = file.read_text(encoding="utf-8")
    first, last = f"<!-- {name}: written by scripts/bench_{bench or name} -->", f"<!-- end of {name} -->"
    before, rest = page.split(first)
    after = rest.split(last)[1]
    file.write_text("\n".join([before + first, *lines, last]) + after, encoding="utf-8")


def say(text: Any) -> None:
    """Tell how far it is."""
    print(text, file=_TERMINAL, flush=True)


@contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Send what libraries write meanwhile to `log`, from Python or not; `say` still reaches the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        with log.open("ab") as stream:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            yield
    except BaseException:
        say(f"what was said before it failed is in {log}")
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, number)
            os.close(kept)
