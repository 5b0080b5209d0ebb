"""Codes that make up for each other's errors, on scales that are given.

`compensate` rounds one input's weights after the other, each so as to undo what the errors before it did to
the output (GPTQ, https://arxiv.org/abs/2210.17323). `descend` then revisits each weight with all others fixed
and takes its best level: coordinate descent on the same error, which can't rise.

Both go over ever smaller halves of the columns, so that most of the work is large matrix products; what is
left within 32 columns is a compiled loop. Arrays are numpy's, or torch's of a piece that lies on a device.
"""

from __future__ import annotations

from collections.abc import Callable

from vera_edge.arrays import Float32
from vera_edge.requantize.piece import Piece

_LOOP = 32  # columns that a compiled loop goes over
_PANEL = 256  # columns whose pulls are computed at a time


def compensate(piece: Piece, adapt: bool = False) -> None:
    """Set a piece's levels, what is left of its weight, and its errors.

    adapt: search each block's scale and zero point for its weights as they are once they have made up for
    all blocks before it. Blocks must lie within rows, and the Gram matrix must take them in order.
    """
    work = _Compensation(piece)
    inside = len(piece.weight)
    if not adapt:
        _halve(0, inside, _LOOP, work.round, work.carry)
    else:
        _halve(0, inside, piece.width, work.adapt, work.carry)
    work.finish()


class _Compensation:
    """One pass over a piece's columns in the Gram matrix's order.

    aims: (in, rows), what each column would be rounded to. It holds what the columns that are done with want
    of it, and is used up.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece, order = piece, piece.gram.order
        self.order = order if piece.gram.act_order else slice(None)  # of a slice numpy makes no copy
        self.weight, self.blocks = piece.weight[self.order], piece.blocks[order]
        self.aims = piece.copied(self.weight)
        self.levels, self.residual = (
            (piece.copied(self.aims), piece.copied(self.aims))
            if piece.gram.act_order
            else (piece.levels, piece.residual)
        )

    def carry(self, begin: int, middle: int, end: int) -> None:
        """Tell columns from `middle` on what those from `begin` to there left undone."""
        shares = self.piece.gram.feedback[begin:middle, middle:end]
        self.aims[middle:end] += shares.T @ self.residual[begin:middle]

    def round(self, begin: int, end: int) -> None:
        piece, at = self.piece, slice(begin, end)
        shares, costs = self._shares(at), piece.gram.conditional[at]
        arrays = (self.aims[at], self.weight[at], self.levels[at], self.residual[at], shares, costs)
        scales = (piece.scales, piece.zeros, self.blocks[at])
        piece.kernels.round_columns(*arrays, *scales, *piece.kernel_grid, piece.errors)

    def adapt(self, begin: int, end: int) -> None:
        """Search one block's scales, then round it."""
        piece, at = self.piece, slice(begin, end)
        aims = piece.copied(self.aims[at])
        _halve(begin, end, _LOOP, self._free, self.carry)
        piece.search_block(self.blocks[begin], self.aims[at], piece.gram.conditional[at])
        self.aims[at] = aims
        _halve(begin, end, _LOOP, self.round, self.carry)

    def _free(self, begin: int, end: int) -> None:
        """As `round`, but weights may take any value: that is what `aims` then has."""
        at = slice(begin, end)
        self.piece.kernels.free_columns(self.aims[at], self.weight[at], self.residual[at], self._shares(at))

    def _shares(self, at: slice) -> Float32:
        return self.piece.contiguous(self.piece.gram.feedback[at, at].T)

    def finish(self) -> None:
        if self.piece.gram.act_order:
            self.piece.levels[self.order], self.piece.residual[self.order] = self.levels, self.residual


def descend(piece: Piece, sweeps: int = 1) -> None:
    """Lower a piece's errors by other levels on the same scales and zero points."""
    inside = len(piece.weight)
    for _ in range(sweeps):
        for begin in range(0, inside, _PANEL):
            end = min(begin + _PANEL, inside)
            work = _Descent(piece, begin, piece.gram.values[begin:end] @ piece.residual)
            _halve(begin, end, _LOOP, work.visit, work.carry)


class _Descent:
    """One visit of the columns from `first` on. pulls: (n, rows), H times the residual, used up."""

    def __init__(self, piece: Piece, first: int, pulls: Float32) -> None:
        self.piece, self.first, self.pulls = piece, first, pulls
        self.steps = piece.copied(pulls)

    def carry(self, begin: int, middle: int, end: int) -> None:
        """Tell columns from `middle` on what those from `begin` to there changed."""
        seen = self.piece.gram.values[middle:end, begin:middle]
        first = self.first
        self.pulls[middle - first : end - first] += seen @ self.steps[begin - first : middle - first]

    def visit(self, begin: int, end: int) -> None:
        piece, at = self.piece, slice(begin, end)
        within = slice(begin - self.first, end - self.first)
        gram = piece.contiguous(piece.gram.values[at, at])
        arrays = (self.pulls[within], piece.levels[at], piece.residual[at], self.steps[within], gram)
        scales = (piece.scales, piece.zeros, piece.blocks[at])
        piece.kernels.descend_columns(*arrays, *scales, *piece.kernel_grid, piece.errors)


def _halve(
    begin: int,
    end: int,
    unit: int,
    work: Callable[[int, int], None],
    carry: Callable[[int, int, int], None],
) -> None:
    """`work(a, b)` for every `unit` columns in turn; `carry(a, b, c)` before those that come after b."""
    if end - begin <= unit:
        work(begin, end)
        return
    units = -(-(end - begin) // unit)
    middle = begin + (units + 1) // 2 * unit
    _halve(begin, middle, unit, work, carry)
    carry(begin, middle, end)
    _halve(middle, end, unit, work, carry)
