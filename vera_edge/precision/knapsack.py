"""A multiple-choice knapsack: one option for every unit, least loss for a size, least size for a loss.

Dynamic programming over whole Pareto fronts: the front of the first k units, every option of the next one
added to every point, what is dominated removed. Sizes and losses stay exact. A model's layers are alike, so
few different sizes occur and fronts stay short; one that outgrows the cap is thinned, and then a Lagrangian
bound says how far from the best the answer can be at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float64, Int64

CAP = 20_000


@dataclass(frozen=True)
class Option:
    """What a unit may become. size: bytes. loss: at least 0, summed over units.

    time: nanoseconds of a token's products, where it was asked for; it can take the place of the size.
    """

    size: int
    loss: float
    time: int = 0


@dataclass(frozen=True, eq=False)
class Front:
    """Pareto-optimal choices for all units: `sizes` ascending, `losses` strictly descending.

    exact: no point was left out on the way, so that each is the best of its size.
    """

    units: Sequence[Sequence[Option]]
    sizes: Int64
    losses: Float64
    exact: bool
    _steps: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]]

    def __len__(self) -> int:
        return len(self.sizes)

    def picks(self, point: int) -> tuple[int, ...]:
        """The option of each unit, by its place, that gives this point."""
        found = []
        for parents, options in reversed(self._steps):
            found.append(int(options[point]))
            point = int(parents[point])
        return tuple(reversed(found))

    def within_size(self, limit: float) -> int | None:
        """The point of least loss that is no larger than `limit`; None when there is none."""
        place = int(np.searchsorted(self.sizes, limit, side="right")) - 1
        return place if place >= 0 else None

    def within_loss(self, limit: float) -> int | None:
        """The smallest point whose loss is at most `limit`; None when there is none."""
        places = np.flatnonzero(self.losses <= limit)
        return int(places[0]) if len(places) else None

    def loss_gap(self, point: int) -> float:
        """By what share of its loss the point can lie above the least loss for its size, at most."""
        found = float(self.losses[point])
        if self.exact or found <= 0:
            return 0.0
        return max(0.0, 1 - least_loss(self.units, int(self.sizes[point])) / found)

    def size_gap(self, point: int) -> float:
        """By what share of its size the point can lie above the least size for its loss, at most."""
        found = float(self.sizes[point])
        if self.exact or found <= 0:
            return 0.0
        return max(0.0, 1 - least_size(self.units, float(self.losses[point])) / found)


def front(units: Sequence[Sequence[Option]], cap: int = CAP) -> Front:
    """The Pareto front of all ways to give every unit one of its options. At least one option each."""
    sizes, losses, exact = np.zeros(1, np.int64), np.zeros(1), True
    steps: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]] = []
    for unit in units:
        more = np.array([option.size for option in unit], np.int64)
        worse = np.array([option.loss for option in unit])
        all_sizes, all_losses = (sizes[:, None] + more).ravel(), (losses[:, None] + worse).ravel()
        kept = _undominated(all_sizes, all_losses)
        if len(kept) > cap:
            kept, exact = kept[_thinned(all_sizes[kept], cap)], False
        sizes, losses = all_sizes[kept], all_losses[kept]
        steps.append(((kept // len(unit)).astype(np.int32), (kept % len(unit)).astype(np.int8)))
    return Front(units, sizes, losses, exact, steps)


def _undominated(sizes: Int64, losses: Float64) -> Int64:
    """Places of the points that none is as small and as good as, by ascending size."""
    order = np.lexsort((losses, sizes))
    best = np.minimum.accumulate(losses[order])
    return order[np.concatenate([[True], best[1:] < best[:-1]])]


def _thinned(sizes: Int64, cap: int) -> Int64:
    """The places of at most `cap` points: both ends, and of each range of sizes the best."""
    span = max(1, int(sizes[-1] - sizes[0]))
    bucket = (sizes - sizes[0]) * (cap - 2) // span
    last = np.flatnonzero(np.concatenate([bucket[1:] != bucket[:-1], [True]]))
    return np.unique(np.concatenate([[0], last]))


def least_loss(units: Sequence[Sequence[Option]], size: float) -> float:
    """A bound: no choice of at most `size` bytes has less loss (Lagrangian relaxation)."""
    pairs = [[(float(option.size), option.loss) for option in unit] for unit in units]
    return _bound(pairs, size)


def least_size(units: Sequence[Sequence[Option]], loss: float) -> float:
    """A bound: no choice with at most `loss` is smaller (Lagrangian relaxation)."""
    pairs = [[(option.loss, float(option.size)) for option in unit] for unit in units]
    return _bound(pairs, loss)


def _bound(units: Sequence[Sequence[tuple[float, float]]], limit: float) -> float:
    """max over m >= 0 of `sum_u min_o (value + m * cost) - m * limit`, which is concave in m.

    Options are (cost, value). It is piecewise linear, so the maximum lies where two options of a unit tie.
    """
    multipliers = {0.0}
    for unit in units:
        for cost, value in unit:
            multipliers |= {(value - v) / (c - cost) for c, v in unit if c > cost and value > v}
    tried = np.array(sorted(multipliers))
    total = -tried * limit
    for unit in units:
        total += np.min([value + tried * cost for cost, value in unit], axis=0)
    return float(total.max())
