"""Scales, and zero points, that minimise each block's error weighted by the importance of its inputs.

Candidates shrink or stretch the block's range; each is judged after one least-squares step on its own codes:
`scale = sum h w t / sum h t^2` for levels t and importances h leaves the error
`sum h w^2 - (sum h w t)^2 / sum h t^2`. Then rounding and least squares take turns.
"""

from __future__ import annotations

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.requantize.grids import Grid, levels_in_order

FACTORS = np.linspace(0.5, 1.1, 13, dtype=np.float32)
TURNS = 3
_CODE_BOOK, _ASYMMETRIC, _SYMMETRIC, _EVEN, _UNEVEN_BOOK = range(5)  # as kernels.search_block calls them


def search(weight: Float32, grid: Grid, importance: Float32 | None) -> tuple[Float32, Float32]:
    """Scales and zero points (both float32, shape Grid.scales_shape) for weight (out, in)."""
    if not grid.rows(weight.shape[1]):
        (blocks,), (costs,) = blocks_of(weight, grid, importance)
        found = search_columns(np.ascontiguousarray(blocks.T), np.ascontiguousarray(costs.T), grid)
        return found[0][0], found[1][0]
    costs = np.ones(weight.shape[1], np.float32) if importance is None else importance
    scales, zeros = search_columns(np.ascontiguousarray(weight.T), costs, grid)
    return np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T)


def search_columns(weight: Float32, costs: Float32, grid: Grid) -> tuple[Float32, Float32]:
    """Scales and zero points (blocks, rows) for weight (in, rows); costs of an error: (in,) or (in, rows)."""
    from vera_edge.requantize.kernels import search_block  # numba comes with it

    inside, rows = weight.shape
    width = grid.width(inside)
    scales = np.empty((-(-inside // width), rows), np.float32)
    zeros = np.empty_like(scales)
    ends = (np.float32(grid.middle), np.float32(grid.top), np.float32(grid.least_zero))
    constants = (*ends, kind_of(grid), *levels_in_order(grid.kind))
    for block, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        at = slice(block * width, (block + 1) * width)
        cost = costs[at] if costs.ndim == 2 else np.repeat(costs[at], rows).reshape(-1, rows)
        search_block(weight[at], cost, FACTORS, TURNS, *constants, scale, zero)
    return scales, zeros


def kind_of(grid: Grid) -> int:
    if not grid.integer:
        return _UNEVEN_BOOK if grid.kind == "iq4_nl" else _CODE_BOOK
    if not grid.symmetric:
        return _ASYMMETRIC
    return _EVEN if grid.per_row else _SYMMETRIC


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
