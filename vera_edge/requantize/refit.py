"""Scales that are best for given codes: all the scales of a row at once, in closed form.

With levels T (in, blocks; one block's levels to a column) a row's output error is quadratic in its scales s,
and least where `(T^T H T) s = T^T H w`. Double-quantized scales can't take these values; they are rounded one
after the other, the rest of the row making up for each one's error, as GPTQ does for weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vera_edge.arrays import Bytes, Float32, Float64
from vera_edge.formats.nested import BLOCKSIZE, Nested, code_book, quantize_absmax
from vera_edge.requantize.gram import Gram

# Pull towards the scales that are there, relative to the mean diagonal: a block of zeros keeps its scale.
RIDGE = 1e-5
_TILE = 128  # inputs that are worked on at a time: what comes of them stays in the processor's cache
# Puts the scales (rows,) of one block onto a grid of their own.
Place = Callable[[int, Float32], Float32]


class Normal:
    """Every row's quadratic in its scales: `matrix` (rows, blocks, blocks) float32, with a little ridge.

    scales: where they are now, and slope: how fast the error falls from there, halved; both (rows, blocks).
    """

    def __init__(self, wanted: Float32, levels: Float32, width: int, scales: Float32, gram: Gram) -> None:
        """wanted: H W^T, and levels, (in, rows); scales (blocks, rows)."""
        from vera_edge.requantize.normal_kernels import finish_normal  # numba comes with it

        self.matrix = _matrix(levels, width, gram)
        self.scales = np.ascontiguousarray(scales.T)
        self._ridge = np.empty(len(self.matrix), np.float32)
        finish_normal(self.matrix, RIDGE, self._ridge)
        target = np.add.reduceat(wanted * levels, np.arange(0, len(levels), width), axis=0).T
        self.slope: Float32 = target - self._times(self.scales)

    def _times(self, scales: Float32) -> Float32:
        """T^T H T times scales (rows, blocks)."""
        return (self.matrix @ scales[..., None])[..., 0] - self._ridge[:, None] * scales

    def solve(self) -> Float32:
        """The best scales (rows, blocks)."""
        from vera_edge.requantize.normal_kernels import solve_normal  # numba comes with it

        change = np.empty_like(self.scales)
        solve_normal(self.matrix, np.ascontiguousarray(self.slope), change)
        return self.scales + change

    def rise(self, scales: Float32) -> Float64:
        """By how much these scales (rows, blocks) raise each row's error (rows,)."""
        change = scales - self.scales
        rise: Float64 = (change * (self._times(change) - 2 * self.slope)).sum(axis=1, dtype=np.float64)
        return rise

    def place(self, best: Float32, place: Place) -> Float32:
        """Put `best` onto a grid, block by block, the rest making up for it: see `Place`."""
        # As in `Gram.feedback`, for a matrix of each row's own.
        reverse = self.matrix[:, ::-1, ::-1].astype(np.float64)
        upper = np.linalg.cholesky(reverse)[:, ::-1, ::-1]
        return one_after_the_other(best, upper.astype(np.float64, copy=False), place)


def one_after_the_other(best: Float32, upper: Float64, place: Place) -> Float32:
    """Scales (rows, blocks) put onto a grid, later ones making up for those before.

    upper: each row's triangular R (rows, blocks, blocks) with R R^T the matrix of its quadratic.
    """
    left, placed = np.empty(best.shape), np.empty_like(best)
    for block in range(best.shape[1]):
        shares = upper[:, :block, block] / upper[:, block, block, None]
        aim = best[:, block] + (left[:, :block] * shares).sum(axis=1)
        placed[:, block] = place(block, aim.astype(np.float32))
        left[:, block] = best[:, block].astype(np.float64) - placed[:, block]
    return placed


def _matrix(levels: Float32, width: int, gram: Gram) -> Float32:
    """T^T H T (rows, blocks, blocks) for levels (in, rows), right only from the diagonals on."""
    from vera_edge.requantize.normal_kernels import add_to_normal  # numba comes with it

    inside, rows = levels.shape
    blocks, tile = -(-inside // width), max(1, _TILE // width) * width
    matrix = np.empty((rows, blocks, blocks), np.float32)
    for row in range(blocks):
        own = slice(row * width, (row + 1) * width)
        for begin in range(own.start, inside, tile):
            at = slice(begin, begin + tile)
            products = gram.values[own, at].T @ levels[own]
            add_to_normal(products, levels[at], width, row, begin // width, matrix)
    return matrix


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
