"""Half-quadratic quantization: scales and zero points for an error that forgives outliers, without data.

Minimises `|W - Q|_p^p`, p = 0.7, by splitting off the outliers E: shrink `E = W - Q` towards zero, then fit
zero point and scale to `W - E`, with a growing penalty (Badri and Shaji, Half-Quadratic Quantization, 2023,
https://mobiusml.github.io/hqq_blog/). There the zero point is a float; here it must lie on the format's grid.
"""

from __future__ import annotations

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.requantize.grids import Grid, inverse
from vera_edge.requantize.rtn import range_scales
from vera_edge.requantize.search import blocks_of

_POWER = 0.7
_TURNS = 20
_GROWTH = 1.05
_TINY = np.float32(1e-30)


def half_quadratic(weight: Float32, grid: Grid) -> tuple[Float32, Float32]:
    """Scales and zero points (both float32, shape Grid.scales_shape) for weight (out, in)."""
    shape = grid.scales_shape((weight.shape[0], weight.shape[1]))
    blocks, cost = blocks_of(weight, grid, None)
    first = range_scales(weight, grid)
    scales, zeros = (part.reshape(blocks.shape[:2]) for part in first)
    best, best_error = (scales, zeros), np.full(blocks.shape[:2], np.inf, np.float32)
    # The penalty is in units of the block's step, so that it means the same for every block.
    penalty = np.float32(10.0)
    for _ in range(_TURNS):
        levels = grid.nearest(blocks * inverse(scales)[..., None], zeros[..., None])
        residual = blocks - levels * scales[..., None]
        error = (np.abs(residual) ** np.float32(_POWER) * cost).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = (np.where(better, scales, best[0]), np.where(better, zeros, best[1]))
        target = blocks - _shrink(residual * inverse(scales)[..., None], penalty) * scales[..., None]
        scales, zeros = _fit(target, levels, scales, zeros, grid, cost)
        penalty *= np.float32(_GROWTH)
    return best[0].reshape(shape), best[1].reshape(shape)


def _shrink(values: Float32, penalty: np.float32) -> Float32:
    """The generalised soft threshold of the p-norm."""
    size = np.abs(values)
    cut = np.power(np.maximum(size, np.float32(1e-8)), np.float32(_POWER - 1)) / penalty
    return np.sign(values) * np.maximum(size - cut, 0)


def _fit(
    target: Float32, levels: Float32, scales: Float32, zeros: Float32, grid: Grid, cost: Float32
) -> tuple[Float32, Float32]:
    """Zero point, where the grid has one, then scale, by least squares on the target."""
    if not grid.symmetric:
        count = np.maximum(cost.sum(axis=2), 1)
        shift = ((levels - target * inverse(scales)[..., None]) * cost).sum(axis=2) / count
        moved = np.clip(np.rint(zeros + shift), grid.least_zero, grid.top)
        levels = levels - (moved - zeros)[..., None]
        zeros = moved
    energy = np.maximum((levels * levels * cost).sum(axis=2), _TINY)
    return (target * levels * cost).sum(axis=2) / energy, zeros
