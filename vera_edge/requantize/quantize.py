"""The methods as one function: pieces of rows, scales over the whole weight, the better result kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from vera_edge.arrays import Bytes, Float32, Float64
from vera_edge.errors import DataError, PlanError
from vera_edge.formats.weight import row_chunks
from vera_edge.requantize import super_blocks
from vera_edge.requantize.effort import Effort
from vera_edge.requantize.gptq import compensate, descend
from vera_edge.requantize.gram import Floats, Gram, in_threads, one_blas_thread
from vera_edge.requantize.grids import Codes, Grid, inverse, spread
from vera_edge.requantize.hqq import half_quadratic
from vera_edge.requantize.piece import Piece
from vera_edge.requantize.refit import NestedScales
from vera_edge.requantize.rtn import range_scales
from vera_edge.requantize.search import search

R = TypeVar("R")
Rows = tuple[int, int]  # begin, end
# Values of a piece of rows: matrix products are the faster the more rows there are, and take more memory.
PIECE_VALUES = 1 << 20
_NORMAL_VALUES = 1 << 24  # of the matrices of a piece's rows
_ON_DEVICE = 16  # times as much at a time, on a device that loses more by each call than by any memory
METHODS = ("rtn", "search", "hqq", "gptq")
CALIBRATED = ("search", "gptq")  # those that round by what text says of the inputs


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
        if grid.ggml:
            return super_blocks.round_to(weight, grid, method, prepared, effort, threads)
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
        self.pieces = list(_pieces(self.shape, grid, gram)) if self.in_rows else [(0, self.shape[0])]
        self.scales = np.empty(grid.scales_shape(self.shape), np.float32)
        self.zeros = np.empty_like(self.scales)
        self.codes: Bytes = np.empty(self.shape, np.uint8)
        self.nested: NestedScales | None = None
        self.errors: Float64 = np.zeros(self.shape[0])  # of each row, where "gptq" rounds

    def run(self, method: str) -> Codes:
        if method == "gptq":
            assert self.gram is not None
            self.gram.prepare()
            self._compensated()
        else:
            self._each(lambda piece: self._set_scales(piece, method))
            self._nest()
            self._each(self._to_nearest)
        return self._result()

    def _each(self, work: Callable[[Rows], R]) -> list[R]:
        """`work` of every piece, in their order; a piece depends on no other."""
        return in_threads(work, self.pieces, self.threads)

    def _at(self, piece: Rows) -> slice:
        return slice(*piece) if self.in_rows else slice(None)

    def _set_scales(self, piece: Rows, method: str) -> None:
        part, rows = self.weight[slice(*piece)], self._at(piece)
        if method == "rtn":
            found = range_scales(part, self.grid)
        elif method == "hqq":
            found = half_quadratic(part, self.grid)
        else:
            found = search(part, self.grid, None if self.gram is None else self.gram.importance)
        self.scales[rows], self.zeros[rows] = self.grid.stored(found[0]), found[1]

    def _nest(self) -> None:
        if self.grid.nested:
            self.nested = NestedScales(self.scales)
            self.scales = self.nested.nearest(self.scales, (slice(None),) * self.scales.ndim)

    def _to_nearest(self, piece: Rows) -> None:
        part, rows = self.weight[slice(*piece)], self._at(piece)
        shape = (part.shape[0], part.shape[1])
        scaled = part * spread(inverse(self.scales[rows]), self.grid, shape)
        levels = self.grid.nearest(scaled, spread(self.zeros[rows], self.grid, shape))
        self.codes[slice(*piece)] = self.grid.codes_of(levels, self._zeros_of(piece))

    def _zeros_of(self, piece: Rows) -> Float32 | None:
        if not self.grid.integer:
            return None
        return spread(self.zeros[self._at(piece)], self.grid, (piece[1] - piece[0], self.shape[1]))

    def _compensated(self) -> None:
        """Compensation, and rounds of refitting and descent where a row's scales are its own."""
        assert self.gram is not None
        if self.in_rows and not self.grid.nested and not self.gram.act_order:
            self._each(self._whole)  # compensation searches the scales
            return
        self._each(lambda piece: self._set_scales(piece, "search"))
        self._nest()
        if not self.grid.nested:
            self._each(self._whole)
            return
        wanted = dict(zip(self.pieces, self._each(self._first), strict=True))
        if not self.in_rows:
            return
        for turn in range(self.effort.rounds):
            # The first refit also moves the grid that double-quantized scales lie on.
            self._improve_nested(wanted, self.effort.sweeps, renest=turn == 0)
        self._improve_nested(wanted, 0, renest=False)

    def _whole(self, piece: Rows) -> None:
        """Everything for a piece whose scales may take any value."""
        work = self._piece(piece)
        compensate(work, adapt=self.in_rows and not work.gram.act_order)
        if self.in_rows:
            for _ in range(self.effort.rounds):
                work.refit()
                descend(work, self.effort.sweeps)
            work.refit()
        self._put(piece, work)

    def _first(self, piece: Rows) -> Float32 | None:
        """Compensation on double-quantized scales, which are fixed; what refits want."""
        work = self._piece(piece)
        compensate(work)
        self._put(piece, work)
        return work.wanted if self.in_rows else None

    def _piece(self, piece: Rows) -> Piece:
        assert self.gram is not None
        rows = self._at(piece)
        weight = self.weight[slice(*piece)]
        return _kind_of_piece(self.gram)(weight, self.grid, self.scales[rows], self.zeros[rows], self.gram)

    def _resumed(self, piece: Rows, wanted: Float32 | None) -> Piece:
        work = self._piece(piece)
        levels = self.grid.levels_of(self.codes[slice(*piece)], self._zeros_of(piece))
        work.set_levels(levels, self.errors[slice(*piece)])
        if wanted is not None:
            work.wanted = wanted
        return work

    def _put(self, piece: Rows, work: Piece) -> None:
        rows, done = slice(*piece), work.state()
        if self.in_rows:
            self.scales[rows], self.zeros[rows] = done.scales.T, done.zeros.T
        self.errors[rows] = done.errors
        self.codes[rows] = self.grid.codes_of(done.levels.T, self._zeros_of(piece))

    def _improve_nested(self, wanted: Mapping[Rows, Float32 | None], sweeps: int, renest: bool) -> None:
        """Refit double-quantized scales to the codes, then descend from there; keep what lowers the error.

        renest: also fix anew what the scales' own quantization rests on, if that lowers the whole error.
        """
        nested = self.nested
        assert nested is not None
        if renest:
            best = self._each(lambda piece: self._resumed(piece, wanted[piece]).best_scales())
            nested = NestedScales(np.concatenate(best))
        before = (self.codes.copy(), self.scales.copy(), self.errors.copy()) if renest else None

        def improve(piece: Rows) -> None:
            work, rows = self._resumed(piece, wanted[piece]), slice(*piece)
            work.refit(lambda block, values: nested.nearest(values, (rows, block)))
            descend(work, sweeps)
            if not renest and (worse := work.state().errors >= self.errors[rows]).any():
                work.take(self._resumed(piece, wanted[piece]), worse)
            self._put(piece, work)

        self._each(improve)
        if before is not None and self.errors.sum() >= before[2].sum():
            self.codes, self.scales, self.errors = before
        else:
            self.nested = nested

    def _result(self) -> Codes:
        zeros = None if self.grid.symmetric else self.zeros.astype(np.uint8)
        nested = self.nested.stored(self.scales) if self.nested else None
        scales = nested.absmax().reshape(self.scales.shape) if nested else self.scales
        return Codes(self.grid, self.codes, scales, zeros, nested)


def _kind_of_piece(gram: Gram) -> type[Piece]:
    """What rows are worked on as: where the Gram matrix lies, in whatever order it takes its columns."""
    if gram.device is None:
        return Piece
    from vera_edge.requantize.torch_piece import TorchPiece  # torch comes with it

    return TorchPiece


def _pieces(shape: tuple[int, int], grid: Grid, gram: Gram | None) -> Iterator[Rows]:
    """Rows to be worked on at a time: their weights, and the equations for their scales, have a bound."""
    more = 1 if gram is None or gram.device is None else _ON_DEVICE
    blocks = -(-shape[1] // grid.width(shape[1]))
    most = max(1, more * _NORMAL_VALUES // blocks**2)
    return row_chunks(shape, values=min(more * PIECE_VALUES, most * shape[1]))
