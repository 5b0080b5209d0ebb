"""Some rows of a weight on their way to the grid, as the compiled loops and the matrix products want them."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vera_edge.arrays import Float32, Float64
from vera_edge.requantize.gram import Gram
from vera_edge.requantize.grids import Grid, levels_in_order, spread
from vera_edge.requantize.refit import Normal, Place
from vera_edge.requantize.search import search_columns


class State(NamedTuple):
    """levels (in, rows), scales and zeros (blocks, rows), errors (rows,): see `Piece`."""

    levels: Float32
    scales: Float32
    zeros: Float32
    errors: Float64


class Piece:
    """Rows of a weight, transposed: neighbours in memory are weights of one input, which don't wait for each
    other.

    weight, levels, residual (weight - levels * scales): float32 (in, rows). scales, zeros: float32
    (blocks, rows), or (in, rows) where blocks run over row ends; blocks: (in,), which of them is an input's.
    errors: float64 (rows,), what `tr(residual^T H residual)` is made up of, kept up to date by what each step
    is known to change; nothing until there are levels.
    """

    def __init__(self, weight: Float32, grid: Grid, scales: Float32, zeros: Float32, gram: Gram) -> None:
        """weight: (rows, in); scales, zeros: as in Grid.scales_shape. All are copied."""
        shape = (weight.shape[0], weight.shape[1])
        self.grid, self.gram, self.width = grid, gram, grid.width(shape[1])
        self.weight = np.ascontiguousarray(weight.T)
        if grid.rows(shape[1]):
            self.blocks = np.arange(shape[1]) // self.width
        else:
            scales, zeros = spread(scales, grid, shape), spread(zeros, grid, shape)
            self.blocks = np.arange(shape[1])
        self.scales, self.zeros = (np.array(part.T, np.float32, order="C") for part in (scales, zeros))
        self.levels, self.residual = np.empty_like(self.weight), np.empty_like(self.weight)
        self.errors: Float64 = np.zeros(shape[0])
        self.kernel_grid = (*levels_in_order(grid.kind), np.float32(grid.top))

    @property
    def kernels(self) -> Any:
        """The loops over columns."""
        from vera_edge.requantize import kernels  # numba comes with it

        return kernels

    @staticmethod
    def copied(values: Float32) -> Float32:
        return values.copy()

    @staticmethod
    def contiguous(values: Float32) -> Float32:
        return np.ascontiguousarray(values)

    def search_block(self, block: int, weight: Float32, costs: Float32) -> None:
        """Take the best scale and zero point for a block's weights (in, rows); costs (in,) of an error."""
        found = search_columns(weight, costs, self.grid)
        self.scales[block], self.zeros[block] = self.grid.stored(found[0][0]), found[1][0]

    def set_levels(self, levels: Float32, errors: Float64) -> None:
        """Go on from levels (rows, in) and errors that were reached before."""
        self.levels, self.errors = np.ascontiguousarray(levels.T), errors.copy()
        self._subtract()

    @cached_property
    def wanted(self) -> Float32:
        """H W^T (in, rows): what the refits compare the levels with."""
        return self.gram.values @ self.weight

    def normal(self) -> Normal:
        """The errors as functions of the scales, with the levels fixed."""
        return Normal(self.wanted, self.levels, self.width, self.scales, self.gram)

    def best_scales(self) -> Float32:
        """The scales (rows, blocks) that are best for the levels, whether the grid has them or not."""
        return self.normal().solve()

    def take(self, other: Piece, rows: Any) -> None:
        """Have what another piece of the same weights has, where `rows` (rows,) is true."""
        self.levels[:, rows], self.scales[:, rows] = other.levels[:, rows], other.scales[:, rows]
        self.errors[rows] = other.errors[rows]

    def state(self) -> State:
        """What has become of the piece."""
        return State(self.levels, self.scales, self.zeros, self.errors)

    def refit(self, place: Place | None = None) -> None:
        """Take the scales that are best for the levels; `place` puts them onto a grid of their own."""
        normal = self.normal()
        best = normal.solve()
        scales = self.grid.stored(best) if place is None else normal.place(best, place)
        self.errors += normal.rise(scales)
        self.scales = np.ascontiguousarray(scales.T)
        self._subtract()

    def _subtract(self) -> None:
        from vera_edge.requantize.kernels import subtract  # numba comes with it

        subtract(self.weight, self.levels, self.scales, self.blocks, self.residual)
