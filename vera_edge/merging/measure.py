"""How much of the adapter survives when a merged weight is rounded to its format.

retained share = <Q(W + dW) - Q(W), dW> / |dW|^2: 1 when rounding keeps the adapter's direction, 0 when the
merged weight rounds back to the base. noise = |Q(W + dW) - (W + dW)| / |dW|: rounding error in units of the
adapter's own effect. Merging onto the grid that W already lies on erases small deltas, for anything under
half a step rounds back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.formats import Weight, WeightFormat

MAX_NOISE = 1.0
MIN_RETAINED = 0.5

# Formats pack outputs in eights or 32s, and FP8 scales blocks of 128 rows.
ROWS = 128
_MEASURED = 1 << 20  # values of a layer, about, beyond which a part is measured


@dataclass(frozen=True)
class Survival:
    """Sums over the values of one or many layers, in float64, from which the shares follow.

    Of a large layer they are those of some of its rows, scaled up: see `measured_rows`.
    """

    base_square: float  # |W|^2
    delta_square: float  # |dW|^2
    kept_dot: float  # <Q(W + dW) - Q(W), dW>
    error_square: float  # |Q(W + dW) - (W + dW)|^2

    @property
    def retained(self) -> float | None:
        """The retained share; None when there is no delta."""
        return self.kept_dot / self.delta_square if self.delta_square else None

    @property
    def noise(self) -> float | None:
        """Rounding error over the delta's norm; None when there is no delta."""
        return math.sqrt(self.error_square / self.delta_square) if self.delta_square else None

    @property
    def size(self) -> float | None:
        """|dW| / |W|; None when the base is all zeros."""
        return math.sqrt(self.delta_square / self.base_square) if self.base_square else None

    @property
    def drowned(self) -> bool:
        """Whether rounding hides the adapter: noise above its effect, or less than half of it retained."""
        retained, noise = self.retained, self.noise
        return retained is not None and noise is not None and (noise > MAX_NOISE or retained < MIN_RETAINED)

    def to_dict(self) -> dict[str, Any]:
        """The shares to six digits: beyond that they depend on how a processor orders its sums."""
        shares = {"delta_size": self.size, "noise": self.noise, "retained": self.retained}
        return {name: None if value is None else float(f"{value:.6g}") for name, value in shares.items()}


def total(parts: Iterable[Survival]) -> Survival:
    """The survival of many layers taken as one."""
    rows = [(part.base_square, part.delta_square, part.kept_dot, part.error_square) for part in parts]
    return (
        Survival(*(math.fsum(column) for column in zip(*rows, strict=True))) if rows else Survival(0, 0, 0, 0)
    )


def measured_rows(shape: tuple[int, int]) -> dict[int, int]:
    """The row ranges of a weight (out, in) that are measured, last row by first: all where it isn't large."""
    step = ROWS * -(-shape[0] * shape[1] // _MEASURED)
    return {start: min(shape[0], start + ROWS) for start in range(0, shape[0], step)}


def measure(
    base: Weight,
    merged: Mapping[int, Float32],
    result: Weight,
    target: WeightFormat,
    options: Mapping[str, Any],
    on_grid: bool,
) -> Survival:
    """Hold `result` against `merged`, the exact sums it was made from: `measured_rows` by their first row.

    on_grid: the base is stored in the very format of the result, so that Q(W) is W.
    """
    sums, seen = np.zeros(4), 0
    for start, exact in merged.items():
        stop = start + len(exact)
        weight = base.rows(start, stop)
        delta = exact - weight
        rounded = result.rows(start, stop)
        # Rows quantize by themselves, but for double-quantized scales: there this is very nearly Q(W).
        grid = weight if on_grid else target.quantize(weight, options).rows(0, stop - start)
        sums += (
            _dot(weight, weight),
            _dot(delta, delta),
            _dot(rounded - grid, delta),
            _dot(*([rounded - exact] * 2)),
        )
        seen += len(exact)
    sums *= base.shape[0] / max(1, seen)  # so that a layer weighs in a sum over layers what it is
    return Survival(*(float(value) for value in sums))


def _dot(left: Float32, right: Float32) -> float:
    """The inner product: float32 within a row, float64 over rows; float64 throughout where that overflows."""
    with np.errstate(over="ignore"):
        found = float(np.einsum("ij,ij->i", left, right).sum(dtype=np.float64))
    return found if math.isfinite(found) else float(np.einsum("ij,ij->", left, right, dtype=np.float64))
