"""Scales that are best for given codes: all the scales of a row at once, in closed form.

With levels T (in, blocks; one block's levels to a column) a row's output error is quadratic in its scales s,
and least where `(T^T H T) s = T^T H w`. Double-quantized scales can't take these values; they are rounded one
after the other, the rest of the row making up for each one's error, as GPTQ does for weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32, Float64
from vera_edge.formats.nested import BLOCKSIZE, Nested, code_book, quantize_absmax
from vera_edge.requantize.gram import Gram
from vera_edge.requantize.grids import Grid

# Pull towards the scales that are there, relative to the mean diagonal: a block of zeros keeps its scale.
_RIDGE = 1e-5


class Normal:
    """Every row's quadratic in its scales: `matrix` (out, blocks, blocks), `target` (out, blocks)."""

    def __init__(self, weight: Float32, levels: Float32, grid: Grid, scales: Float32, gram: Gram) -> None:
        inside = weight.shape[1]
        starts = np.arange(0, inside, grid.width(inside))
        self.target: Float64 = _sum_blocks((weight @ gram.values) * levels, starts)
        self.matrix: Float64 = np.empty((*self.target.shape, starts.size))
        for index, begin in enumerate(starts):
            end = min(begin + grid.width(inside), inside)
            # The matrix is symmetric: from the diagonal on will do.
            product = levels[:, begin:end] @ gram.values[begin:end, begin:]
            product *= levels[:, begin:]
            sums = _sum_blocks(product, starts[index:] - begin)
            self.matrix[:, index, index:], self.matrix[:, index:, index] = sums, sums
        diagonal = np.arange(starts.size)
        ridge = _RIDGE * self.matrix[:, diagonal, diagonal].mean(axis=1) + 1e-30
        self.matrix[:, diagonal, diagonal] += ridge[:, None]
        self.target += ridge[:, None] * scales

    def solve(self) -> Float32:
        """The best scales (out, blocks)."""
        found: Float32 = np.linalg.solve(self.matrix, self.target[..., None])[..., 0].astype(np.float32)
        return found

    def place(self, best: Float32, round_block: Callable[[int, Float32], Float32]) -> Float32:
        """Round `best` block by block with `round_block(block, scales (out,))`, the rest making up for it."""
        upper = np.linalg.inv(np.linalg.cholesky(self.matrix[:, ::-1, ::-1]))[:, ::-1, ::-1]
        rest, placed = best.astype(np.float64), np.empty_like(best)
        for block in range(best.shape[1]):
            placed[:, block] = round_block(block, rest[:, block].astype(np.float32))
            error = (rest[:, block] - placed[:, block]) / upper[:, block, block]
            rest[:, block + 1 :] -= error[:, None] * upper[:, block, block + 1 :]
        return placed


def _sum_blocks(values: Float32, starts: npt.NDArray[np.intp]) -> Float64:
    return np.add.reduceat(values, starts, axis=1).astype(np.float64)


class NestedScales:
    """The values that double-quantized scales of one weight can take: offset and block scales are fixed."""

    def __init__(self, scales: Float32) -> None:
        """Fix them as bitsandbytes would for these scales, flat or (out, blocks)."""
        self._shape = scales.shape
        self._form = quantize_absmax(scales.reshape(-1))
        spread = np.repeat(self._form.scales, BLOCKSIZE)[: scales.size]
        self._spread = spread.reshape(scales.shape)

    def codes(self, scales: Float32, index: tuple[slice | int, ...]) -> Bytes:
        """The codes (uint8) nearest to `scales`, which stand at `index` of the weight's scales."""
        step = self._spread[index]
        scaled = (scales - self._form.offset) / np.where(step == 0, np.float32(1), step)
        book = code_book()
        return np.searchsorted((book[1:] + book[:-1]) / 2, scaled).astype(np.uint8)

    def values(self, codes: Bytes, index: tuple[slice | int, ...]) -> Float32:
        """What codes at `index` mean, as bitsandbytes restores them."""
        return code_book()[codes] * self._spread[index] + self._form.offset

    def nearest(self, scales: Float32, index: tuple[slice | int, ...]) -> Float32:
        return self.values(self.codes(scales, index), index)

    def stored(self, scales: Float32) -> Nested:
        """The form to store, for scales that lie on this grid."""
        codes = self.codes(scales, (slice(None),) * scales.ndim).reshape(-1)
        form = self._form
        return Nested(codes, form.code_book, form.scales, form.blocksize, form.offset)
