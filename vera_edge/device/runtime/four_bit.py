"""NF4 and FP4 weights as int8 blocks, level by level, for a device that opens a graph of `MatMulBnb4`.

A block of 32 values is 16 bytes of codes. Two bytes at a time are looked up: which four int8 codes they
become, and what error that makes under each of eight scales, of which a block takes the one with the least.
A scale is the absmax over one of `_STEPS`; steps above 127 serve blocks that hold no value near their absmax.
On the weights of SmolLM2 this leaves 0.45 of the squared error that rounding their values to int8 leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.device.runtime import pages

BLOCK = 32
# NF4's by a greedy search over 100 to 250 on SmolLM2; FP4's levels are twelfths, but for one.
_STEPS = {
    "nf4": (109.0, 113.7, 118.0, 118.9, 124.1, 126.1, 162.0, 174.8),
    "fp4": (96.0, 108.0, 114.0, 120.0, 126.0, 144.0, 168.0, 192.0),
}
_HALF = 128  # the code of zero
# What the mean error of four codes counts, and what counts a code that doesn't fit: more than the largest
# error of a whole block, and eight of them leave 3 of 16 bits for which scale it is.
_USUAL, _WORST = 15, 1023
_WHICH = np.arange(8, dtype=np.uint16).view(np.uint64)
_CHUNK = 1 << 14  # blocks at a time


class Each(Protocol):
    """Calls a function with every start of a run, as `map` and an executor's `map` do."""

    def __call__(self, work: Callable[[int], None], starts: Iterable[int], /) -> Iterable[None]: ...


@dataclass(frozen=True)
class _Tables:
    """By two bytes, which are four codes. errors: (steps / 4, 65536), four of 16 bits each.

    codes: (steps * 65536,), four int8 codes each.
    """

    errors: npt.NDArray[np.uint64]
    codes: npt.NDArray[np.uint32]


def can_expand(shape: tuple[int, int], blocksize: int) -> bool:
    """Whether blocks along the rows of a weight (out, in) lie within the runs that share an absmax."""
    whole = blocksize > 0 and shape[0] * shape[1] % blocksize == 0
    return whole and shape[1] % BLOCK == 0 and blocksize % BLOCK == 0


def expanded_bytes(shape: tuple[int, int]) -> int:
    """What a weight (out, in) takes as int8 blocks: codes, and float32 scales."""
    return shape[0] * shape[1] + shape[0] * shape[1] // BLOCK * 4


def expand(
    packed: Bytes,
    absmax: Float32,
    quant_type: str,
    shape: tuple[int, int],
    blocksize: int,
    each: Each = map,
) -> tuple[Bytes, Float32]:
    """Codes, uint8 (out, blocks, BLOCK) with 128 for zero, and scales, float32 (out, blocks).

    packed: a weight (out, in), two codes a byte, the first in the high bits; absmax: one for each run of
    `blocksize` values. each: how the work on runs of blocks is done, in turn or in several threads.
    """
    tables, parts = _tables(quant_type), packed.view(np.uint16).reshape(-1, BLOCK // 4)
    # Written once and read once, so that pages of 2 MB, which numpy asks for, gain little; the host of a
    # virtual machine took seconds to give a gigabyte of them.
    codes: Any = pages.zeros(parts.shape, np.dtype(np.uint32))
    chosen = np.empty(len(parts), np.uint8)

    def part(start: int) -> None:
        run = slice(start, start + _CHUNK)
        chosen[run], codes[run] = _expanded(tables, parts[run])

    for _ in each(part, range(0, len(parts), _CHUNK)):
        pass
    scales = np.repeat(absmax, blocksize // BLOCK)[: len(parts)]
    scales /= np.take(np.array(_STEPS[quant_type], np.float32), chosen)
    count = shape[1] // BLOCK
    return codes.view(np.uint8).reshape(shape[0], count, BLOCK), scales.reshape(shape[0], count)


def _expanded(tables: _Tables, parts: npt.NDArray[np.uint16]) -> tuple[Any, Any]:
    """Which scale each of n blocks takes, (n,), and its codes, uint32, of parts (n, BLOCK / 4) in that shape.

    Numpy is quick along long axes: blocks are the last one until the end.
    """
    pairs = parts.T.astype(np.intp, order="C")
    low, high = (
        (np.take(four, pairs, mode="clip").sum(axis=0) << np.uint64(3)) + which
        for four, which in zip(tables.errors, _WHICH, strict=True)
    )
    least = np.minimum(low.view(np.uint16), high.view(np.uint16))
    for _ in range(2):
        least = np.minimum(least[::2], least[1::2])
    chosen = (least & 7).astype(np.intp)
    pairs += chosen << 16
    return chosen, np.take(tables.codes, pairs, mode="clip").T


@cache
def _tables(quant_type: str) -> _Tables:
    from vera_edge.formats.codes4 import LEVELS  # a tenth of a start that few bundles need

    levels = LEVELS[quant_type].astype(np.float64)
    both = np.arange(1 << 16).astype(np.uint16).view(np.uint8)
    four = np.stack([both >> 4, both & 15], axis=1).reshape(-1, 4)
    codes, wrong = [], []
    for step in _STEPS[quant_type]:
        code = np.rint(levels * step)
        fits = np.abs(code) < _HALF
        codes.append(np.where(fits, code + _HALF, 0).astype(np.uint8)[four].view(np.uint32)[:, 0])
        wrong.append(np.where(fits, (code / step - levels) ** 2, np.inf)[four].sum(axis=1))
    usual = np.mean(wrong[0])
    errors = np.minimum(np.rint(np.stack(wrong, axis=1) / usual * _USUAL), _WORST).astype(np.uint16)
    return _Tables(errors.view(np.uint64).T.copy(), np.concatenate(codes))
