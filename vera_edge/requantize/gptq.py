"""Codes that make up for each other's errors, on scales that are given.

`compensate` rounds one input's weights after the other and moves the rest so as to undo the error's effect
on the output (GPTQ, https://arxiv.org/abs/2210.17323). `descend` then revisits each weight with all others
fixed and takes its best level: coordinate descent on the same error, which can't rise.

Both work on the transposed weight, so that a column of weights is contiguous, and in panels of columns, so
that most of the work is matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.requantize.gram import Gram
from vera_edge.requantize.grids import Grid, inverse, spread
from vera_edge.requantize.search import search

_PANEL = 64


@dataclass(frozen=True)
class _Columns:
    """Scale, its inverse and zero point of every weight in a column, by column."""

    scales: Float32  # (blocks, out), or (in, out) where blocks run over row ends
    inverses: Float32
    zeros: Float32
    block_of: npt.NDArray[np.intp]

    @classmethod
    def of(cls, scales: Float32, zeros: Float32, grid: Grid, shape: tuple[int, int]) -> _Columns:
        inside = shape[1]
        if grid.rows(inside):
            block_of = np.arange(inside) // grid.width(inside)
        else:
            scales, zeros = (spread(part, grid, shape) for part in (scales, zeros))
            block_of = np.arange(inside)
        upright = np.ascontiguousarray(scales.T)
        return cls(upright, inverse(upright), np.ascontiguousarray(zeros.T), block_of)

    def set(self, block: int, scales: Float32, zeros: Float32) -> None:
        """Take other scales and zero points (out, blocks) for one block."""
        self.scales[block], self.zeros[block] = scales[:, block], zeros[:, block]
        self.inverses[block] = inverse(self.scales[block])


def compensate(
    weight: Float32, grid: Grid, scales: Float32, zeros: Float32, gram: Gram, adapt: bool = False
) -> Float32:
    """Levels (out, in) float32 for weight (out, in).

    adapt: search each block's scale and zero point again for its weights as they are once they have made up
    for all blocks before it; written to `scales` and `zeros`. Blocks must lie within rows, in order.
    """
    shape = (weight.shape[0], weight.shape[1])
    columns = _Columns.of(scales, zeros, grid, shape)
    order, feedback = gram.order, gram.feedback
    rest = np.ascontiguousarray(weight.T[order])
    levels = np.empty_like(rest)
    errors = np.empty((_PANEL, shape[0]), np.float32)
    width = grid.width(shape[1])
    for begin in range(0, shape[1], _PANEL):
        end = min(begin + _PANEL, shape[1])
        for index in range(begin, end):
            column, block = rest[index], columns.block_of[order[index]]
            if adapt and index % width == 0:
                last = min(index + width, shape[1])
                pending = feedback[begin:index, index:last].T @ errors[: index - begin]
                part = np.ascontiguousarray((rest[index:last] - pending).T)
                scale, zero = search(part, grid, gram.conditional[index:last])
                scales[:, block], zeros[:, block] = scale[:, 0], zero[:, 0]
                columns.set(block, scales, zeros)
            if index > begin:
                column = column - feedback[begin:index, index] @ errors[: index - begin]
            found = grid.nearest(column * columns.inverses[block], columns.zeros[block])
            levels[order[index]] = found
            np.subtract(column, found * columns.scales[block], out=errors[index - begin])
        if end < shape[1]:
            rest[end:] -= feedback[begin:end, end:].T @ errors[: end - begin]
    return np.ascontiguousarray(levels.T)


def descend(
    weight: Float32,
    levels: Float32,
    grid: Grid,
    scales: Float32,
    zeros: Float32,
    gram: Gram,
    sweeps: int = 1,
) -> Float32:
    """Levels (out, in) with an output error no higher than that of `levels`."""
    shape = (weight.shape[0], weight.shape[1])
    columns = _Columns.of(scales, zeros, grid, shape)
    values, importance = gram.values, gram.importance
    current = np.ascontiguousarray(levels.T)
    residual = np.ascontiguousarray((weight - levels * spread(scales, grid, shape)).T)
    slope = values @ residual  # (in, out): H (W - Q)^T, kept up to date panel by panel
    steps = np.empty((_PANEL, shape[0]), np.float32)
    for _ in range(sweeps):
        for begin in range(0, shape[1], _PANEL):
            end = min(begin + _PANEL, shape[1])
            for index in range(begin, end):
                pull, block = slope[index], columns.block_of[index]
                if index > begin:
                    pull = pull - values[index, begin:index] @ steps[: index - begin]
                aim = current[index] + pull * columns.inverses[block] / importance[index]
                found = grid.nearest(aim, columns.zeros[block])
                np.multiply(found - current[index], columns.scales[block], out=steps[index - begin])
                current[index] = found
            slope -= values[:, begin:end] @ steps[: end - begin]
    return np.ascontiguousarray(current.T)
