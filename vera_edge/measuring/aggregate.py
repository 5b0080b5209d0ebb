"""Figures of any number of windows, gathered in bounded memory into one Comparison.

Means, their errors and the extremes come from running sums and are exact. Quantiles are exact up to a
million tokens; beyond, they come from a uniform sample of a million (Vitter's algorithm R, seeded).
Definitions that llama.cpp's `--kl-divergence` has too are the same here (tools/perplexity/perplexity.cpp):
standard errors over tokens with n - 1, the perplexity ratio's from the covariance of both models' losses,
quantiles by linear interpolation.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float64
from vera_edge.errors import DataError
from vera_edge.measuring.comparison import (
    HISTOGRAM_EDGES,
    QUANTILES,
    Comparison,
    Distribution,
    Interval,
    WorstToken,
)
from vera_edge.measuring.metrics import TokenMetrics
from vera_edge.text import bootstrap

SAMPLE = 1 << 20
WORST = 20
# Those a limit may be set on carry an interval; each costs a second per million tokens.
_BOUNDED_QUANTILES = ("median", "p90", "p99", "p99.9")
_SEED = 1

# The columns of the running sums.
_COLUMNS = (
    "kl", "reverse_kl", "delta_p", "delta_p_squared", "nll", "reference_nll", "same_top1", "top5",
    "right_to_wrong", "wrong_to_right", "reference_right", "right", "cosine", "squared_error",
)  # fmt: skip
_AT = {name: index for index, name in enumerate(_COLUMNS)}


class Aggregate:
    """Gathers TokenMetrics window by window; `finish` makes the Comparison of all of them."""

    def __init__(self) -> None:
        width = len(_COLUMNS)
        self._sums = np.zeros(width)
        self._cross = np.zeros((width, width))
        self._windows: list[Float64] = []
        self._counts: list[int] = []
        self._sample = _Sample(SAMPLE)
        self._low = np.full(3, np.inf)
        self._high = np.full(3, -np.inf)
        self._largest_error = 0.0
        self._histogram = np.zeros(len(HISTOGRAM_EDGES) + 1, np.int64)
        self._position_sum = np.zeros(0)
        self._position_count = np.zeros(0, np.int64)
        self._worst: list[tuple[float, int, int, int, int]] = []

    def add(self, metrics: TokenMetrics) -> None:
        """Add one window's tokens, in the order of their positions."""
        table = _table(metrics)
        self._sums += table.sum(axis=0)
        self._cross += table.T @ table
        self._windows.append(table.sum(axis=0))
        self._counts.append(len(table))
        spread = np.stack([metrics.kl, metrics.reverse_kl, metrics.delta_p], axis=1)
        self._low = np.minimum(self._low, spread.min(axis=0))
        self._high = np.maximum(self._high, spread.max(axis=0))
        self._largest_error = max(self._largest_error, float(metrics.largest_error.max()))
        self._sample.add(spread, len(self._windows) - 1)
        self._histogram += np.bincount(
            np.searchsorted(HISTOGRAM_EDGES, metrics.kl, side="right"), minlength=len(self._histogram)
        )
        self._add_positions(metrics.kl)
        self._add_worst(metrics)

    def window_sums(self, column: str) -> Float64:
        """Per-window sums (windows,) of one figure, to combine with another comparison's."""
        return np.asarray(self._windows)[:, _AT[column]]

    def finish(self) -> Comparison:
        """The Comparison of everything added. Raises DataError when that is fewer than two tokens."""
        count = sum(self._counts)
        if count < 2:
            raise DataError(f"{count} scored tokens are too few to compare two models; give more text")
        return _Summary(self, count).comparison()

    def _add_positions(self, kl: Float64) -> None:
        if len(kl) > len(self._position_sum):
            grow = len(kl) - len(self._position_sum)
            self._position_sum = np.pad(self._position_sum, (0, grow))
            self._position_count = np.pad(self._position_count, (0, grow))
        self._position_sum[: len(kl)] += kl
        self._position_count[: len(kl)] += 1

    def _add_worst(self, metrics: TokenMetrics) -> None:
        window = len(self._windows) - 1
        for position in np.argsort(metrics.kl)[-WORST:].tolist():
            choices = int(metrics.reference_top1[position]), int(metrics.top1[position])
            heapq.heappush(self._worst, (float(metrics.kl[position]), -window, -position, *choices))
            if len(self._worst) > WORST:
                heapq.heappop(self._worst)


class _Sample:
    """A uniform sample of at most `size` tokens: (kl, reverse_kl, delta_p) and the window of each."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen = 0
        self._blocks: list[Float64] = []
        self._owners: list[npt.NDArray[np.int64]] = []
        self._generator = np.random.Generator(np.random.PCG64(_SEED))

    def add(self, rows: Float64, window: int) -> None:
        room = max(0, self._size - self._seen)
        if room:
            self._blocks.append(rows[:room])
            self._owners.append(np.full(len(rows[:room]), window, np.int64))
        late = rows[room:]
        if len(late):
            self._replace(late, window, self._seen + min(room, len(rows)))
        self._seen += len(rows)

    def _replace(self, rows: Float64, window: int, seen: int) -> None:
        values, owners = self.arrays()
        slots = self._generator.integers(0, seen + 1 + np.arange(len(rows)))
        for row, slot in zip(rows, slots, strict=True):
            if slot < self._size:
                values[slot], owners[slot] = row, window

    def arrays(self) -> tuple[Float64, npt.NDArray[np.int64]]:
        """(n, 3) values and (n,) windows; kept as one block each so that replacing is in place."""
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate(self._blocks)]
            self._owners = [np.concatenate(self._owners)]
        return self._blocks[0], self._owners[0]


def _table(m: TokenMetrics) -> Float64:
    columns: Sequence[npt.NDArray[np.generic]] = (
        m.kl, m.reverse_kl, m.delta_p, m.delta_p**2, m.nll, m.reference_nll, m.same_top1, m.top5,
        m.reference_right & ~m.right, m.right & ~m.reference_right, m.reference_right, m.right,
        m.cosine, m.squared_error,
    )  # fmt: skip
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


class _Summary:
    """The arithmetic of `Aggregate.finish`: totals in, a Comparison out."""

    def __init__(self, source: Aggregate, count: int) -> None:
        self._source = source
        self._count = count
        self._mean = source._sums / count
        # Covariance of the mean over tokens, with n - 1 as llama.cpp has it.
        spread = source._cross / count - np.outer(self._mean, self._mean)
        self._covariance = spread / (count - 1)
        counts = np.asarray(source._counts, np.float64)[:, None]
        drawn = bootstrap.totals(np.concatenate([np.asarray(source._windows), counts], axis=1))
        self._replicates = drawn[:, :-1] / drawn[:, -1:]

    def comparison(self) -> Comparison:
        source, mean = self._source, self._mean
        values, owners = source._sample.arrays()
        kl, reverse_kl, delta_p = (self._distribution(i, values[:, i], owners) for i in range(3))
        positions = source._position_sum / np.maximum(source._position_count, 1)
        worst = sorted(source._worst, key=lambda entry: (-entry[0], -entry[1], -entry[2]))
        return Comparison(
            tokens=self._count,
            windows=len(source._windows),
            kl=kl,
            reverse_kl=reverse_kl,
            same_top1=self._plain("same_top1"),
            top5=self._plain("top5"),
            right_to_wrong=self._plain("right_to_wrong"),
            wrong_to_right=self._plain("wrong_to_right"),
            flips=self._combined({"right_to_wrong": 1.0, "wrong_to_right": 1.0}),
            reference_accuracy=float(mean[_AT["reference_right"]]),
            accuracy=float(mean[_AT["right"]]),
            delta_p=delta_p,
            delta_p_rms=self._root("delta_p_squared"),
            **self._perplexities(),
            log_perplexity_correlation=self._correlation("nll", "reference_nll"),
            logit_cosine=self._plain("cosine"),
            logit_rms=self._root("squared_error"),
            logit_largest_error=source._largest_error,
            kl_histogram=tuple(int(n) for n in source._histogram),
            kl_by_position=tuple(float(value) for value in positions),
            worst=tuple(WorstToken(-entry[1], -entry[2], entry[0], *entry[3:]) for entry in worst),
        )

    def _distribution(self, index: int, values: Float64, owners: npt.NDArray[np.int64]) -> Distribution:
        found = np.quantile(values, list(QUANTILES.values()))
        windows = len(self._source._windows)
        return Distribution(
            mean=self._plain(_COLUMNS[index]),
            minimum=float(self._source._low[index]),
            maximum=float(self._source._high[index]),
            quantiles={name: float(value) for name, value in zip(QUANTILES, found, strict=True)},
            intervals={
                name: bootstrap.quantile_interval(values, owners, windows, QUANTILES[name])
                for name in (_BOUNDED_QUANTILES if index == 0 else ())
            },
        )

    def _plain(self, column: str) -> Interval:
        return self._combined({column: 1.0})

    def _combined(self, weights: Mapping[str, float]) -> Interval:
        """A weighted sum of column means."""
        vector = np.zeros(len(_COLUMNS))
        for column, weight in weights.items():
            vector[_AT[column]] = weight
        variance = float(vector @ self._covariance @ vector)
        low, high = bootstrap.interval(self._replicates @ vector)
        return Interval(float(self._mean @ vector), math.sqrt(max(variance, 0.0)), low, high)

    def _root(self, column: str) -> Interval:
        """The square root of a mean; the error by the delta method."""
        mean = self._plain(column)
        root = math.sqrt(mean.value)
        error = 0.5 * mean.standard_error / root if root > 0 else 0.0
        return Interval(root, error, math.sqrt(max(mean.low, 0.0)), math.sqrt(max(mean.high, 0.0)))

    def _perplexities(self) -> dict[str, Interval]:
        own, reference = _exponential(self._plain("nll")), _exponential(self._plain("reference_nll"))
        log_ratio = self._combined({"nll": 1.0, "reference_nll": -1.0})
        between = own.value * reference.value * self._covariance[_AT["nll"], _AT["reference_nll"]]
        variance = own.standard_error**2 + reference.standard_error**2 - 2.0 * between
        replicates = np.exp(self._replicates[:, [_AT["nll"], _AT["reference_nll"]]])
        low, high = bootstrap.interval(replicates[:, 0] - replicates[:, 1])
        difference = Interval(own.value - reference.value, math.sqrt(max(variance, 0.0)), low, high)
        return {
            "perplexity": own,
            "reference_perplexity": reference,
            "log_perplexity_ratio": log_ratio,
            "perplexity_ratio": _exponential(log_ratio),
            "perplexity_difference": difference,
        }

    def _correlation(self, a: str, b: str) -> float:
        covariance = self._covariance
        product = covariance[_AT[a], _AT[a]] * covariance[_AT[b], _AT[b]]
        return float(covariance[_AT[a], _AT[b]] / math.sqrt(product)) if product > 0 else 1.0


def _exponential(log: Interval) -> Interval:
    # A broken model's loss can pass what exp holds; e^700 says "broken" as well and stays a number.
    value, low, high = (math.exp(min(x, 700.0)) for x in (log.value, log.low, log.high))
    return Interval(value, value * log.standard_error, low, high)
