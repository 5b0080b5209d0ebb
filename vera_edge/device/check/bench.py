"""Speed and memory of a bundle on this device, over repeated rounds, alone or against another bundle.

Each round is a process of its own. Two bundles take turns, round by round, so that a machine whose speed
wanders slows both alike; the ratio is that of medians, with a bootstrap interval over pairs of rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge import import_path
from vera_edge.bundle import contents as bundles
from vera_edge.bundle.manifest import Manifest
from vera_edge.cores import available_cores
from vera_edge.device.check.hardware import hardware_info
from vera_edge.device.check.products import ProductTime, measure, parse_formats, shapes_of
from vera_edge.errors import BundleError, DataError
from vera_edge.progress import Progress, silent

# figure -> its unit
FIGURES: Mapping[str, str] = {
    "load": "s",
    "first_token": "s",
    "prefill": "tokens/s",
    "decode": "tokens/s",
    "peak_rss": "bytes",
    "energy": "J/token",
}
_RESAMPLES = 2000
_LIMIT = 3600.0  # seconds for one round


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds: its 10th percentile, median and 90th percentile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class BenchRound:
    """A bundle of `size` bytes at one number of threads. figures: by name, those this system can tell.

    token_ms: milliseconds of one decoded token, all rounds together: percentile ("50", "95", "99") -> value.
    """

    bundle: Path
    size: int
    mode: str
    weights: str
    threads: int
    figures: Mapping[str, Spread]
    token_ms: Mapping[str, float]


@dataclass(frozen=True)
class Ratio:
    """The bundle's median of a figure over the other bundle's, with the 95 % interval."""

    threads: int
    figure: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Bench:
    """Everything that was measured, and on what."""

    measured: tuple[BenchRound, ...]
    ratios: tuple[Ratio, ...]
    rounds: int
    prompt: int
    new: int
    device: Mapping[str, Any]
    products: tuple[ProductTime, ...] = ()
    resident: bool = False
    huge_pages: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        value = asdict(self)
        for row in value["measured"]:
            row["bundle"] = str(row["bundle"])
        return value | {"units": dict(FIGURES)}


def bench(
    bundle: Path,
    against: Path | None = None,
    threads: Sequence[int] = (),
    rounds: int = 5,
    prompt: int = 128,
    new: int = 64,
    progress: Progress = silent,
    products: Sequence[str] = (),
    resident: bool = False,
    huge_pages: bool = False,
) -> Bench:
    """Measure `bundle`, and `against` in turn with it, at each number of threads (none given: all cores).

    prompt, new: tokens fed and generated in each round. products: formats to time the layers' products in,
    like "int8:128". resident, huge_pages: how `bundle` is opened, as by `Session.open`; `against` isn't.
    Raises BundleError when a bundle can't be opened, or has no adapter to be resident, DataError when the
    numbers make no sense or don't fit its context.
    """
    if rounds < 1 or prompt < 1 or new < 2 or any(count < 1 for count in threads):
        raise DataError("give 1 or more rounds, prompt tokens and threads, and 2 or more new tokens")
    formats = parse_formats(products)
    folders = [bundle] if against is None else [bundle, against]
    manifests = [bundles.verify(folder, deep=False) for folder in folders]
    shapes = shapes_of(manifests[0]) if formats else ()
    counts = list(threads) or [0]
    how = [*(["resident"] if resident else []), *(["huge_pages"] if huge_pages else [])]
    measured: list[BenchRound] = []
    ratios: list[Ratio] = []
    for at, count in enumerate(counts):
        found: list[list[dict[str, Any]]] = [[] for _ in folders]
        for number in range(rounds):
            progress("measuring", at * rounds + number, len(counts) * rounds)
            for place, folder in enumerate(folders):
                found[place].append(_round(folder, prompt, new, count, () if place else how))
        pairs = [
            _summary(folder, manifest, rows)
            for folder, manifest, rows in zip(folders, manifests, found, strict=True)
        ]
        measured += pairs
        if against is not None:
            ratios += _ratios(found[0], found[1])
    used = [count or available_cores() for count in counts]
    times = measure(shapes, formats, used, progress)
    return Bench(
        tuple(measured), tuple(ratios), rounds, prompt, new, hardware_info(), times, resident, huge_pages
    )


def _round(folder: Path, prompt: int, new: int, threads: int, how: Sequence[str]) -> dict[str, Any]:
    """One round in a process of its own."""
    words = [str(folder), str(prompt), str(new), str(threads), *how]
    command = [sys.executable, "-P", "-m", "vera_edge.device.check.bench_round", *words]
    environment = os.environ | import_path.child_environment()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT, check=False, env=environment
        )
        result: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise BundleError(f"{folder} took over an hour for one round; give fewer tokens") from None
    except ValueError:
        last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BundleError(f"{folder} can't be measured, its process ended: {last[-1][:300]}") from None
    if "error" in result:
        raise BundleError(result["error"])
    return result


def _values(rows: Sequence[Mapping[str, Any]], figure: str) -> list[float]:
    """The figure of every round; empty when a round couldn't tell."""
    values = [row[figure] for row in rows]
    return [] if any(value is None for value in values) else [float(value) for value in values]


def _summary(folder: Path, manifest: Manifest, rows: Sequence[Mapping[str, Any]]) -> BenchRound:
    figures = {}
    for figure in FIGURES:
        if values := _values(rows, figure):
            low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
            figures[figure] = Spread(float(low), float(median), float(high))
    steps = np.concatenate([row["steps"] for row in rows])
    token_ms = {str(share): float(np.percentile(steps, share)) for share in (50, 95, 99)}
    threads = int(rows[0]["threads"])
    return BenchRound(folder, manifest.size, manifest.mode, manifest.weights, threads, figures, token_ms)


def _ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    found = []
    for figure in FIGURES:
        one, other = _values(ours, figure), _values(theirs, figure)
        if one and other and min(other) > 0:
            found.append(Ratio(int(ours[0]["threads"]), figure, *ratio_of_medians(one, other)))
    return found


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """median(ours) / median(theirs) of paired rounds, and its 95 % bootstrap interval, resampling pairs."""
    pairs = np.array([ours, theirs], np.float64)
    picks = np.random.default_rng(0).integers(0, pairs.shape[1], (_RESAMPLES, pairs.shape[1]))
    ratios = np.median(pairs[0][picks], axis=1) / np.median(pairs[1][picks], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(pairs[0]) / np.median(pairs[1])), float(low), float(high)
