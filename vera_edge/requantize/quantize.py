"""The methods as one function: pieces of rows, scales over the whole weight, the better result kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import DataError, PlanError
from vera_edge.formats.weight import row_chunks
from vera_edge.requantize.gptq import compensate, descend
from vera_edge.requantize.gram import Floats, Gram, in_threads, one_blas_thread
from vera_edge.requantize.grids import Codes, Grid, inverse, spread
from vera_edge.requantize.hqq import half_quadratic
from vera_edge.requantize.refit import NestedScales, Normal
from vera_edge.requantize.rtn import range_scales
from vera_edge.requantize.search import search

R = TypeVar("R")
# Values of a piece of rows: each column of it is one step in Python, so fewer cost time (a quarter more at
# 1 << 18, 2048 inputs), and more only memory.
PIECE_VALUES = 1 << 20
METHODS = ("rtn", "search", "hqq", "gptq")


@dataclass(frozen=True)
class Effort:
    """How far "gptq" goes. `rounds` of refitting the scales and then `sweeps` over the codes.

    `damp` and `act_order` apply where a plain Gram matrix is given; a prepared one brings its own.
    """

    rounds: int = 2
    sweeps: int = 2
    damp: float = 0.01
    act_order: bool = False


def requantize(
    weight: Float32,
    grid: Grid,
    method: str = "gptq",
    gram: Floats | Gram | None = None,
    effort: Effort | None = None,
    threads: int = 1,
) -> Codes:
    """Put `weight` (out, in) on `grid`.

    `gram`: X^T X of the layer's inputs (in, in), at any scale; "gptq" needs it, "search" is weighted by its
    diagonal, "rtn" and "hqq" take no notice of it. threads: that pieces of rows are shared out among, which
    changes no byte. Raises PlanError for an unknown method, a missing or
    misfit Gram matrix, DataError where the weight or the statistics aren't finite.
    """
    effort = effort or Effort()
    prepared = _prepared(weight, method, gram, effort)
    with one_blas_thread():
        return _Work(weight, grid, prepared, effort, threads).run(method)


def _prepared(weight: Float32, method: str, gram: Floats | Gram | None, effort: Effort) -> Gram | None:
    if method not in METHODS:
        raise PlanError(f"no quantization method is called {method!r}; known: {', '.join(METHODS)}")
    if not np.isfinite(weight).all():
        raise DataError(
            f"a weight of shape {list(weight.shape)} holds NaN or infinities; it can't be quantized"
        )
    if gram is None:
        if method == "gptq":
            raise PlanError(
                "method gptq needs calibration statistics; pass calibration text or choose search"
            )
        return None
    if not isinstance(gram, Gram):
        gram = Gram.of(gram, effort.damp, effort.act_order)
    if gram.size != weight.shape[1]:
        raise PlanError(f"statistics of {gram.size} inputs don't fit a weight with {weight.shape[1]}")
    return gram


class _Work:
    """One weight on its way to the grid. Levels are kept as codes, one byte for each weight."""

    def __init__(
        self, weight: Float32, grid: Grid, gram: Gram | None, effort: Effort, threads: int = 1
    ) -> None:
        self.weight, self.grid, self.gram, self.effort, self.threads = weight, grid, gram, effort, threads
        self.shape = (weight.shape[0], weight.shape[1])
        self.in_rows = grid.rows(self.shape[1])
        # Blocks that run over row ends tie rows together: such a weight is one piece.
        self.pieces = (
            list(row_chunks(self.shape, values=PIECE_VALUES)) if self.in_rows else [(0, self.shape[0])]
        )
        self.scales = np.empty(grid.scales_shape(self.shape), np.float32)
        self.zeros = np.empty_like(self.scales)
        self.codes: Bytes = np.empty(self.shape, np.uint8)
        self.nested: NestedScales | None = None
        self.errors = np.empty(self.shape[0], np.float32)  # of each row, once `_improve` has begun

    def run(self, method: str) -> Codes:
        self._set_scales(method)
        if self.grid.nested:
            self._nest()
        if method == "gptq" and self.gram is not None:
            _ = self.gram.feedback  # computed once, before it is asked for by several threads
        self._each(lambda piece: self._put(piece, self._first_levels(piece, method)))
        if method == "gptq" and self.in_rows:
            self._measure()
            for turn in range(self.effort.rounds):
                # Where scales are nested, the first refit also moves the grid that they lie on.
                self._improve(self.effort.sweeps, renest=self.grid.nested and turn == 0)
            self._improve(0, renest=False)
        return self._result()

    def _each(self, work: Callable[[tuple[int, int]], R]) -> list[R]:
        """`work` of every piece, in their order; a piece depends on no other."""
        return in_threads(work, self.pieces, self.threads)

    def _set_scales(self, method: str) -> None:
        importance = None if self.gram is None else self.gram.importance

        def set_piece(piece: tuple[int, int]) -> None:
            part, rows = self.weight[slice(*piece)], self._at(piece)
            if method == "rtn":
                found = range_scales(part, self.grid)
            elif method == "hqq":
                found = half_quadratic(part, self.grid)
            else:
                found = search(part, self.grid, importance)
            self.scales[rows], self.zeros[rows] = found

        self._each(set_piece)

    def _nest(self) -> None:
        self.nested = NestedScales(self.scales)
        self.scales = self.nested.nearest(self.scales, (slice(None),) * self.scales.ndim)

    def _at(self, piece: tuple[int, int]) -> slice:
        return slice(*piece) if self.in_rows else slice(None)

    def _first_levels(self, piece: tuple[int, int], method: str) -> Float32:
        part, rows = self.weight[slice(*piece)], self._at(piece)
        scales, zeros = self.scales[rows], self.zeros[rows]
        if method == "gptq":
            assert self.gram is not None
            # Double-quantized scales lie on a grid of their own, which is fixed by now.
            adapt = self.in_rows and self.nested is None and not self.gram.act_order
            return compensate(part, self.grid, scales, zeros, self.gram, adapt)
        shape = (part.shape[0], part.shape[1])
        scaled = part * spread(inverse(scales), self.grid, shape)
        return self.grid.nearest(scaled, spread(zeros, self.grid, shape))

    def _levels(self, piece: tuple[int, int]) -> Float32:
        codes = self.codes[slice(*piece)]
        return self.grid.levels_of(codes, self._zeros_of(piece))

    def _put(self, piece: tuple[int, int], levels: Float32) -> None:
        self.codes[slice(*piece)] = self.grid.codes_of(levels, self._zeros_of(piece))

    def _zeros_of(self, piece: tuple[int, int]) -> Float32 | None:
        if not self.grid.integer:
            return None
        return spread(self.zeros[self._at(piece)], self.grid, (piece[1] - piece[0], self.shape[1]))

    def _measure(self) -> None:
        def measure(piece: tuple[int, int]) -> None:
            rows = slice(*piece)
            self.errors[rows] = self._row_errors(self.weight[rows], self._levels(piece), self.scales[rows])

        self._each(measure)

    def _improve(self, sweeps: int, renest: bool) -> None:
        """Refit the scales to the codes, then the codes to the scales; keep what lowers the error."""
        assert self.gram is not None
        nested = self.nested
        if renest:
            nested = NestedScales(np.concatenate(self._each(lambda piece: self._normal(piece).solve())))
        before = [(self.codes.copy(), self.scales.copy(), self.errors.copy())] if renest else []
        errors = [0.0, 0.0]
        for fell in self._each(lambda piece: self._improve_piece(piece, nested, sweeps, keep=not renest)):
            errors = [total + one for total, one in zip(errors, fell, strict=True)]
        if renest and errors[1] >= errors[0]:
            self.codes, self.scales, self.errors = before[0]
        elif renest:
            self.nested = nested

    def _normal(self, piece: tuple[int, int]) -> Normal:
        assert self.gram is not None
        rows = slice(*piece)
        return Normal(self.weight[rows], self._levels(piece), self.grid, self.scales[rows], self.gram)

    def _improve_piece(
        self, piece: tuple[int, int], nested: NestedScales | None, sweeps: int, keep: bool
    ) -> tuple[float, float]:
        """Improve one piece; with `keep` rows whose error rose stay as they were. Errors before and after."""
        assert self.gram is not None
        rows = slice(*piece)
        part, levels, normal = self.weight[rows], self._levels(piece), self._normal(piece)
        scales = normal.solve()
        if nested is not None:
            scales = normal.place(scales, lambda block, values: nested.nearest(values, (rows, block)))
        zeros = self.zeros[rows]
        better = descend(part, levels, self.grid, scales, zeros, self.gram, sweeps)
        before = self.errors[rows].copy()
        after = self._row_errors(part, better, scales)
        if keep:
            worse = after >= before
            better[worse], scales[worse] = levels[worse], self.scales[rows][worse]
            after[worse] = before[worse]
        self.scales[rows], self.errors[rows] = scales, after
        self._put(piece, better)
        return float(before.sum()), float(after.sum())

    def _row_errors(self, part: Float32, levels: Float32, scales: Float32) -> Float32:
        assert self.gram is not None
        difference = part - levels * spread(scales, self.grid, (part.shape[0], part.shape[1]))
        errors: Float32 = ((difference @ self.gram.values) * difference).sum(axis=1)
        return errors

    def _result(self) -> Codes:
        zeros = None if self.grid.symmetric else self.zeros.astype(np.uint8)
        nested = self.nested.stored(self.scales) if self.nested else None
        scales = nested.absmax().reshape(self.scales.shape) if nested else self.scales
        return Codes(self.grid, self.codes, scales, zeros, nested)
