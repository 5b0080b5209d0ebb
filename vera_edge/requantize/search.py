"""Scales, and zero points, that minimise each block's error weighted by the importance of its inputs.

Candidates shrink or stretch the block's range; each is judged after one least-squares step on its own codes:
`scale = sum h w t / sum h t^2` for levels t and importances h leaves the error
`sum h w^2 - (sum h w t)^2 / sum h t^2`. Then rounding and least squares take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.requantize.grids import Grid, inverse

_FACTORS = np.linspace(0.5, 1.1, 13, dtype=np.float32)
_TURNS = 3
_TINY = np.float32(1e-30)


def search(weight: Float32, grid: Grid, importance: Float32 | None) -> tuple[Float32, Float32]:
    """Scales and zero points (both float32, shape Grid.scales_shape) for weight (out, in)."""
    blocks, cost = blocks_of(weight, grid, importance)
    found = _Best.start(blocks, cost)
    for scales, zeros in _candidates(blocks, grid):
        found.offer(grid, scales, zeros)
    for _ in range(_TURNS):
        found.offer(grid, found.scales.copy(), found.zeros.copy())
    shape = grid.scales_shape((weight.shape[0], weight.shape[1]))
    return found.scales.reshape(shape), found.zeros.reshape(shape)


def blocks_of(weight: Float32, grid: Grid, importance: Float32 | None) -> tuple[Float32, Float32]:
    """The weight as (rows, blocks, width) and the cost of an error as (rows or 1, blocks, width).

    Padding costs nothing. Where blocks run over row ends there is one row of all blocks.
    """
    out, inside = weight.shape
    width = grid.width(inside)
    cost = np.ones(inside, np.float32) if importance is None else importance
    if not grid.rows(inside):
        weight, cost = weight.reshape(1, -1), np.tile(cost, out)
    pad = -weight.shape[1] % width
    if pad:
        weight, cost = np.pad(weight, ((0, 0), (0, pad))), np.pad(cost, (0, pad))
    return weight.reshape(weight.shape[0], -1, width), cost.reshape(1, -1, width)


def _candidates(blocks: Float32, grid: Grid) -> Iterator[tuple[Float32, Float32]]:
    largest = np.abs(blocks).max(axis=2)
    if not grid.integer:
        for factor in _FACTORS:
            yield largest * factor, np.zeros_like(largest)
    elif grid.symmetric:
        middle = np.full_like(largest, grid.middle)
        # The negative side has one code more (not in LLM.int8): try it on either side.
        sign = np.where(-blocks.min(axis=2) >= largest, np.float32(1), np.float32(-1))
        for factor in _FACTORS:
            yield largest * (factor / np.float32(grid.middle)) * sign, middle
            if not grid.per_row:
                yield largest * (-factor / np.float32(grid.top - grid.middle)) * sign, middle
    else:
        low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
        for factor in _FACTORS:
            scales = (high - low) * (factor / np.float32(grid.top))
            exact = -low * factor * inverse(scales)
            for rounded in (np.floor(exact), np.ceil(exact)):
                yield scales, np.clip(rounded, 0, grid.top)


@dataclass
class _Best:
    """The best scale of each block so far. `gain`: how much of the weight's own energy it explains."""

    blocks: Float32
    weighted: Float32
    cost: Float32
    gain: Float32
    scales: Float32
    zeros: Float32

    @classmethod
    def start(cls, blocks: Float32, cost: Float32) -> _Best:
        nothing = np.zeros(blocks.shape[:2], np.float32)
        return cls(blocks, blocks * cost, cost, nothing - 1, nothing.copy(), nothing.copy())

    def offer(self, grid: Grid, scales: Float32, zeros: Float32) -> None:
        """Take scales and zeros where they beat what is there, after a least-squares step."""
        levels = grid.nearest(self.blocks * inverse(scales)[..., None], zeros[..., None])
        product = np.einsum("rbw,rbw->rb", self.weighted, levels)
        levels *= levels
        levels *= self.cost
        energy = levels.sum(axis=2)
        fitted = product / np.maximum(energy, _TINY)
        gain = product * fitted
        better = gain > self.gain
        self.gain[better] = gain[better]
        self.scales[better] = fitted[better]
        self.zeros[better] = zeros[better]
