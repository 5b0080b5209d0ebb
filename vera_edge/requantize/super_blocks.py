"""llama.cpp's types whose blocks have an offset, or scales that share a scale: Q4_1, Q5_1, Q4_K, Q5_K, Q6_K.

A value is `scale * level + offset`. Q4_1 and Q5_1 keep both as float16 for each 32 weights. Q4_K and Q5_K
keep them as six bits each, times two float16 for each 256 weights; their offsets are never above zero. Q6_K
has blocks of 16 without offset, whose scale is a signed byte times a float16 of 256 weights. Source:
ggml-quants.c.

Offsets are taken off the weight first; what is left is rounded as on any grid of integers. Scales are
searched for under the inputs' importance, put onto what the type can store, and refitted there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.formats.weight import row_chunks
from vera_edge.requantize.effort import Effort
from vera_edge.requantize.gptq import compensate, descend
from vera_edge.requantize.gram import Gram, in_threads
from vera_edge.requantize.grids import Codes, Grid, inverse
from vera_edge.requantize.piece import Piece

SUPER = 256  # weights that share the scale of their scales
_FACTORS = np.linspace(0.7, 1.1, 9, dtype=np.float32)
_TURNS = 2
_TINY = np.float32(1e-30)
_PIECE_VALUES = 1 << 20
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass
class _Placed:
    """Scales and offsets as the type stores them. scales, offsets: float32 (rows, blocks), what they mean.

    stored: what they are made of, by name, rows first.
    """

    scales: Float32
    offsets: Float32
    stored: dict[str, npt.NDArray[Any]]


def round_to(
    weight: Float32, grid: Grid, method: str, gram: Gram | None, effort: Effort, threads: int
) -> Codes:
    """Put `weight` (out, in) on a grid that is one of these types; `method` as in `requantize`.

    "hqq" and "rtn" search for scales as "search" does, with every input as important as the others.
    """
    importance = None if gram is None or method in ("rtn", "hqq") else gram.importance

    def work(piece: tuple[int, int]) -> Codes:
        part = weight[slice(*piece)]
        placed = place(*_search(part, grid, importance), grid)
        if method == "gptq":
            assert gram is not None
            return _compensated(part, grid, placed, gram, effort)
        return _codes(grid, _nearest(part, grid, placed), placed)

    pieces = list(row_chunks((weight.shape[0], weight.shape[1]), values=_PIECE_VALUES))
    if method == "gptq" and gram is not None:
        _ = gram.feedback  # computed once, before it is asked for by several threads
    return _joined(grid, in_threads(work, pieces, threads))


def _joined(grid: Grid, parts: list[Codes]) -> Codes:
    stored = {
        name: np.concatenate([part.stored[name] for part in parts if part.stored is not None])
        for name in (parts[0].stored or {})
    }
    codes = np.concatenate([part.codes for part in parts])
    return Codes(grid, codes, np.concatenate([part.scales for part in parts]), stored=stored)


def _codes(grid: Grid, codes: Bytes, placed: _Placed) -> Codes:
    return Codes(grid, codes, placed.scales, stored={**placed.stored, "offsets": placed.offsets})


def _spread(values: Float32, grid: Grid) -> Float32:
    found: Float32 = np.repeat(values, grid.block, axis=1)
    return found


def _middle(grid: Grid) -> np.float32:
    """The code whose level is zero."""
    return np.float32(grid.middle if grid.symmetric else 0)


def _nearest(weight: Float32, grid: Grid, placed: _Placed) -> Bytes:
    scaled = (weight - _spread(placed.offsets, grid)) * _spread(inverse(placed.scales), grid)
    found: Bytes = np.clip(np.rint(scaled + _middle(grid)), 0, grid.top).astype(np.uint8)
    return found


def _compensated(weight: Float32, grid: Grid, placed: _Placed, gram: Gram, effort: Effort) -> Codes:
    """Compensation on the scales that were placed; then they are refitted where they lie, and codes again."""
    rest = weight - _spread(placed.offsets, grid)
    zeros = np.full_like(placed.scales, _middle(grid))
    piece = Piece(rest, grid, placed.scales, zeros, gram)
    compensate(piece)
    best = piece.errors.copy(), piece.levels.copy(), piece.scales.copy()
    for _ in range(max(1, effort.rounds)):
        piece.refit(lambda block, values: _to_grid(values, grid, placed, block))
        descend(piece, max(1, effort.sweeps))
        worse = piece.errors >= best[0]
        piece.levels[:, worse], piece.scales[:, worse] = best[1][:, worse], best[2][:, worse]
        piece.set_levels(np.ascontiguousarray(piece.levels.T), np.minimum(piece.errors, best[0]))
        best = piece.errors.copy(), piece.levels.copy(), piece.scales.copy()
    scales = np.ascontiguousarray(piece.scales.T)
    codes = (piece.levels.T + _middle(grid)).astype(np.uint8)
    return _codes(grid, codes, _restored(scales, grid, placed))


def _to_grid(values: Float32, grid: Grid, placed: _Placed, block: int) -> Float32:
    """The scales nearest to `values` (rows,) that a block can have beside the others of its super-block."""
    if "sub_scales" not in placed.stored:
        return values.astype(np.float16).astype(np.float32)
    whole = placed.stored["scale"][:, block * grid.block // SUPER].astype(np.float32)
    found: Float32 = whole * np.clip(np.rint(values * inverse(whole)), *_sub_range(grid)).astype(np.float32)
    return found


def _restored(scales: Float32, grid: Grid, placed: _Placed) -> _Placed:
    """`placed` with other scales, which lie on what the type can store."""
    stored = dict(placed.stored)
    if "sub_scales" not in stored:
        stored["scale"] = scales.astype(np.float16)
    else:
        whole = np.repeat(stored["scale"].astype(np.float32), SUPER // grid.block, axis=1)
        stored["sub_scales"] = np.rint(scales * inverse(whole)).astype(stored["sub_scales"].dtype)
    return _Placed(scales, placed.offsets, stored)


def _sub_range(grid: Grid) -> tuple[int, int]:
    return (-128, 127) if grid.symmetric else (0, 63)


def place(scales: Float32, offsets: Float32, grid: Grid) -> _Placed:
    """Scales and offsets (rows, blocks) as the type stores them."""
    if not grid.ggml.endswith("_k"):
        halves = {"scale": scales.astype(np.float16), "offset": offsets.astype(np.float16)}
        return _Placed(halves["scale"].astype(np.float32), halves["offset"].astype(np.float32), halves)
    stored: dict[str, npt.NDArray[Any]] = {}
    low, high = _sub_range(grid)
    stored["scale"], stored["sub_scales"], whole = _two_levels(scales, grid, low, high)
    lowered = np.zeros_like(scales)
    if not grid.symmetric:
        stored["offset"], stored["sub_offsets"], lowered = _two_levels(-offsets, grid, low, high)
    return _Placed(whole, -lowered, stored)


def _two_levels(
    values: Float32, grid: Grid, low: int, high: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[Any], Float32]:
    """A float16 for each super-block, a small integer for each block, and their products (float32)."""
    each = SUPER // grid.block
    blocks = values.reshape(values.shape[0], -1, each)
    outer = (np.abs(blocks).max(axis=2) / np.float32(high)).astype(np.float16)
    wide = outer.astype(np.float32)[..., None]
    inner = np.clip(np.rint(blocks * inverse(wide)), low, high).astype(np.int8 if low < 0 else np.uint8)
    products: Float32 = (wide * inner.astype(np.float32)).reshape(values.shape)
    return outer, inner.reshape(values.shape), products


def _search(weight: Float32, grid: Grid, importance: Float32 | None) -> tuple[Float32, Float32]:
    """Scales and offsets (rows, blocks) that minimise each block's error, weighted by importance (in,)."""
    rows, inside = weight.shape
    blocks = weight.reshape(rows, -1, grid.block)
    cost = np.ones(inside, np.float32) if importance is None else importance / importance.mean()
    cost = np.broadcast_to(cost.reshape(1, -1, grid.block), blocks.shape)
    best = _Best(np.full(blocks.shape[:2], np.inf, np.float32), *np.zeros((2, *blocks.shape[:2]), np.float32))
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    for factor in _FACTORS:
        if grid.symmetric:
            largest = np.maximum(high, -low)
            for reach in (grid.middle, grid.middle - grid.top):
                best.offer(blocks, cost, grid, largest * (factor / np.float32(reach)), np.zeros_like(low))
            continue
        reach = (np.maximum(high, 0) if grid.ggml.endswith("_k") else high) - low
        step = reach * (factor / np.float32(grid.top))
        best.offer(blocks, cost, grid, step, low + (reach - step * np.float32(grid.top)) / 2)
    for _ in range(_TURNS):
        best.offer(blocks, cost, grid, best.scales.copy(), best.offsets.copy())
    return best.scales, best.offsets


@dataclass
class _Best:
    """The best scale and offset of each block so far."""

    error: Float32
    scales: Float32
    offsets: Float32

    def offer(self, blocks: Float32, cost: Float32, grid: Grid, scales: Float32, offsets: Float32) -> None:
        """Round with these, take the scales and offsets that are best for the levels, keep what is better."""
        middle = _middle(grid)
        scaled = (blocks - offsets[..., None]) * inverse(scales)[..., None]
        levels = np.clip(np.rint(scaled + middle), 0, grid.top) - middle
        scales, offsets = _fitted(blocks, cost, levels, grid)
        left = blocks - scales[..., None] * levels - offsets[..., None]
        error = np.einsum("rbw,rbw,rbw->rb", left, left, cost)
        better = error < self.error
        self.error[better] = error[better]
        self.scales[better], self.offsets[better] = scales[better], offsets[better]


def _fitted(blocks: Float32, cost: Float32, levels: Float32, grid: Grid) -> tuple[Float32, Float32]:
    """Least squares: scales alone, or scales and offsets, which K types can't have above zero."""
    squares = np.einsum("rbw,rbw,rbw->rb", levels, levels, cost)
    products = np.einsum("rbw,rbw,rbw->rb", levels, blocks, cost)
    alone = products / np.maximum(squares, _TINY)
    none = np.zeros_like(alone)
    if grid.symmetric:
        return alone, none
    total, sums = cost.sum(axis=2), np.einsum("rbw,rbw->rb", levels, cost)
    values = np.einsum("rbw,rbw->rb", blocks, cost)
    spread = total * squares - sums * sums
    sound = spread > 1e-6 * total * np.maximum(squares, _TINY)
    scales = np.where(sound, (total * products - sums * values) / np.where(sound, spread, 1), 0)
    offsets = (values - scales * sums) / total
    if grid.ggml.endswith("_k"):
        above = offsets > 0
        scales, offsets = np.where(above, alone, scales), np.where(above, none, offsets)
        scales = np.maximum(scales, 0)
    return scales.astype(np.float32), offsets.astype(np.float32)
