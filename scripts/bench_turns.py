"""What the speed benches share: runners that take turns, ratios of paired rounds, and the page they write.

All ways to run a model are loaded at once and take turns, a round each, so that what else the machine does
falls on all of them alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scripts.prepare_demo import ROOT
from vera_edge.device.bench import ratio_of_medians
from vera_edge.device.facts import processor

PAGE = ROOT / "docs" / "speed.md"
PROMPT = 32  # tokens before the clock starts


class Runner(Protocol):
    """One way to run a model."""

    def round(self, tokens: int) -> float:
        """Tokens per second of greedy decoding after a prompt of PROMPT tokens."""


class Genai:
    """A folder in ONNX Runtime GenAI, with its default adapter if it has one."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        settings = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(settings))
        self._model = og.Model(config)
        self._adapters = og.Adapters(self._model)
        file = folder / "adapters" / "default.onnx_adapter"
        self._adapted = file.is_file()
        if self._adapted:
            self._adapters.load(str(file), "default")

    def round(self, tokens: int) -> float:
        """See Runner."""
        import onnxruntime_genai as og

        params, length = og.GeneratorParams(self._model), PROMPT + tokens + 1
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(self._model, params)
        if self._adapted:
            generator.set_active_adapter(self._adapters, "default")
        generator.append_tokens(np.arange(100, 100 + PROMPT, dtype=np.int32)[None])
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return tokens / (time.perf_counter() - started)


class Worker:
    """A model in a process of its own: it gets a number of tokens on a line, and answers with its speed."""

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
        """See Runner."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        return float(self._answer())

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


def measure(runners: Mapping[str, Runner], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second by runner, one value for each round; a round more at the start warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name, runner in runners.items():
            speed = runner.round(tokens)
            if number:
                speeds[name].append(speed)
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


def footnote(rounds: int, threads: int, *more: str) -> str:
    """How it was measured, where, and with what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnxruntime-genai"))
    load = os.getloadavg()[0]
    return (
        f"{rounds} rounds in turns, {threads} threads on {os.cpu_count()} cores of {processor()[0]}, load "
        f"{load:.1f} at the end. {', '.join((packages, *more))}."
    )


def write_section(name: str, lines: Sequence[str]) -> None:
    """Put lines between the marks of a section of docs/speed.md."""
    page = PAGE.read_text(encoding="utf-8")
    first, last = f"<!-- {name}: written by scripts/bench_{name} -->", f"<!-- end of {name} -->"
    before, rest = page.split(first)
    after = rest.split(last)[1]
    PAGE.write_text("\n".join([before + first, *lines, last]) + after, encoding="utf-8")


def say(text: Any) -> None:
    """Tell how far it is."""
    print(text, flush=True)
