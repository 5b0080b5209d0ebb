"""Confidence intervals by the bootstrap: whole windows are drawn again and again, with replacement.

Tokens of one window depend on each other, so resampling tokens would promise too much; windows are nearly
independent (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: percentile
intervals). The generator is seeded: the same data gives the same interval, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float64

REPLICATES = 2000
# Quantiles cost a pass over all tokens per replicate.
QUANTILE_REPLICATES = 400
CONFIDENCE = 0.95
# With fewer windows than this a percentile interval is too narrow to decide anything.
MIN_WINDOWS = 8
_SEED = 20240709
_CHUNK = 1 << 22  # elements of one block of draws


def draws(windows: int, replicates: int) -> Iterator[npt.NDArray[np.int64]]:
    """Blocks (k, windows) of how often each window is drawn, `replicates` rows in all."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    step = max(1, _CHUNK // windows)
    even = np.full(windows, 1.0 / windows)
    for start in range(0, replicates, step):
        yield generator.multinomial(windows, even, size=min(step, replicates - start))


def totals(window_sums: Float64, replicates: int = REPLICATES) -> Float64:
    """Resampled totals (replicates, columns) of per-window sums (windows, columns).

    Calls with the same number of windows draw the same windows, so figures of two comparisons over the same
    windows can be combined replicate by replicate.
    """
    return np.concatenate([block @ window_sums for block in draws(len(window_sums), replicates)])


def interval(replicates: Float64) -> tuple[float, float]:
    """The percentile interval (low, high) that holds the middle 95 % of the replicates."""
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1.0 - tail])
    return float(low), float(high)


def quantile_interval(
    values: Float64, window_of: npt.NDArray[np.int64], windows: int, fraction: float
) -> tuple[float, float]:
    """Interval of one quantile of per-token `values` (n,), token i in window `window_of[i]`."""
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], window_of[order]
    found = []
    for block in draws(windows, QUANTILE_REPLICATES):
        for counts in block:
            weight = np.cumsum(counts[owner])
            at = np.searchsorted(weight, fraction * weight[-1], side="left")
            found.append(ordered[min(int(at), len(ordered) - 1)])
    return interval(np.asarray(found))
