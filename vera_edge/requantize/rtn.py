"""Round to nearest: each block's range gives its scale. The baseline, and what other tools do."""

from __future__ import annotations

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.requantize.grids import Grid, inverse
from vera_edge.requantize.search import blocks_of


def range_scales(weight: Float32, grid: Grid) -> tuple[Float32, Float32]:
    """Scales and zero points (both float32, shape Grid.scales_shape) from each block's range."""
    blocks, _ = blocks_of(weight, grid, None)
    largest = np.abs(blocks).max(axis=2)
    if not grid.integer:
        scales, zeros = largest, np.zeros_like(largest)
    elif grid.symmetric:
        sign = np.where(-blocks.min(axis=2) >= largest, np.float32(1), np.float32(-1))
        scales = largest * (sign if not grid.per_row else np.float32(1)) / np.float32(grid.middle)
        zeros = np.full_like(largest, grid.middle)
    else:
        low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
        scales = (high - low) / np.float32(grid.top)
        zeros = np.clip(np.rint(-low * inverse(scales)), grid.least_zero, grid.top)
    shape = grid.scales_shape((weight.shape[0], weight.shape[1]))
    return scales.reshape(shape), zeros.reshape(shape)
