"""The 16 levels of NF4, FP4 and IQ4_NL, packing two codes to a byte, and the nearest code of a value.

All arithmetic is float32 in bitsandbytes' order of operations, so that the codes are its codes bit for bit.
Source of the levels: Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32

# NF4: quantiles of a normal distribution. FP4: sign, 2 exponent bits, 1 mantissa bit; in twelfths.
_NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)
_FP4 = "0 0.0625 8 12 4 6 2 3 0 -0.0625 -8 -12 -4 -6 -2 -3"
# llama.cpp's, whole numbers there (ggml-common.h, kvalues_iq4nl): of its 16 none is zero.
_IQ4_NL = "-127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113"
LEVELS: Mapping[str, Float32] = {
    "nf4": np.array(_NF4.split(), np.float32),
    "fp4": np.array(_FP4.split(), np.float32) / np.float32(12),
    "iq4_nl": np.array(_IQ4_NL.split(), np.float32) / np.float32(128),
}
# A value over its block's absmax, times this, cut to an integer, is its cell.
_CELLS = np.float32(32767)
_TINY = np.float32(1e-38)
_SMALL = np.float32(1e-30)  # below, cells are beyond float32; no real weight's absmax is
_UNSURE = 255


@dataclass(frozen=True)
class Tables:
    """What the compiled loops for 4-bit blocks take, see `compiled.FourBits`."""

    pairs: npt.NDArray[np.uint64]
    bounds: Float32
    labels: Bytes


@cache
def tables(quant_type: str) -> Tables:
    """The tables of NF4 or FP4."""
    bounds, order = _bounds(quant_type)
    ranks = np.arange(256, dtype=np.uint8)
    labels = (order[ranks >> 4] << 4) | order[ranks & 15]
    return Tables(_pairs(quant_type).reshape(-1), bounds, labels)


def levels_of(packed: Bytes, quant_type: str) -> Float32:
    """The levels of packed codes, flat: two for each byte."""
    return np.take(_pairs(quant_type), packed, mode="clip").view(np.float32)


@cache
def _pairs(quant_type: str) -> npt.NDArray[np.uint64]:
    """For each byte, the bits of its two levels."""
    codes = unpack(np.arange(256, dtype=np.uint8))
    return LEVELS[quant_type][codes].view(np.uint64)


@cache
def _bounds(quant_type: str) -> tuple[Float32, Bytes]:
    """The bounds between levels in rising order, and the code between each two of them."""
    levels = LEVELS[quant_type]
    order = np.argsort(levels, kind="stable")
    return (levels[order[:-1]] + levels[order[1:]]) / np.float32(2), order.astype(np.uint8)


@cache
def _code_of_cell(quant_type: str) -> Bytes:
    """For each cell (as its uint16 bits) the code of all its values, or _UNSURE near a bound."""
    bounds, order = _bounds(quant_type)
    cells = np.arange(1 << 16, dtype=np.uint16).view(np.int16).astype(np.int64)
    limits = (bounds * _CELLS).astype(np.int64)
    codes = order[np.searchsorted(limits, cells)]
    # Cells come from one product where exact values take two roundings: less than a cell, and two are given.
    near = np.abs(cells[:, None] - limits).min(axis=1) <= 2
    return np.where(near, np.uint8(_UNSURE), codes)


def nearest_codes(scaled: Float32, quant_type: str) -> Bytes:
    """The code (uint8, 0 to 15) of each value of `scaled`, which lies in [-1, 1].

    A value on a bound belongs to the lower code, as `torch.bucketize` has it.
    """
    bounds, order = _bounds(quant_type)
    return order[np.searchsorted(bounds, scaled)]


def block_codes(values: Float32, blocksize: int, quant_type: str) -> tuple[Bytes, Float32]:
    """The code of each of the flat finite `values` over its block's absmax, and the absmax (blocks,).

    The last block may be short; bitsandbytes divides it, and multiplies whole blocks by the reciprocal.
    """
    starts = np.arange(0, values.size, blocksize)
    # Without their signs floats are in the order of their bits, and integers are compared faster.
    absmax = np.maximum.reduceat(values.view(np.uint32) & np.uint32(0x7FFFFFFF), starts).view(np.float32)
    full = values.size // blocksize
    absmax[full:] = np.maximum(absmax[full:], _TINY)
    if ((absmax < _SMALL) & (absmax > 0)).any():
        every = np.arange(values.size)
        return nearest_codes(_scaled(values, absmax, blocksize, every), quant_type), absmax
    factors = _CELLS / np.maximum(absmax, _SMALL)
    cells = np.empty(values.size, np.int16)
    whole = full * blocksize
    np.multiply(
        values[:whole].reshape(full, blocksize),
        factors[:full, None],
        out=cells[:whole].reshape(full, blocksize),
        casting="unsafe",
    )
    if whole < values.size:
        cells[whole:] = values[whole:] * factors[full]
    codes = np.take(_code_of_cell(quant_type), cells.view(np.uint16), mode="clip")
    unsure = np.flatnonzero(codes == _UNSURE)
    codes[unsure] = nearest_codes(_scaled(values, absmax, blocksize, unsure), quant_type)
    return codes, absmax


def _scaled(values: Float32, absmax: Float32, blocksize: int, places: npt.NDArray[np.intp]) -> Float32:
    """Values at `places` over their block's absmax, rounded as bitsandbytes has it."""
    block, found = places // blocksize, values[places]
    reciprocal: Float32 = np.reciprocal(np.maximum(absmax, _TINY))
    scaled: Float32 = found * reciprocal[block]
    short = block >= values.size // blocksize
    scaled[short] = found[short] / absmax[block[short]]
    return scaled


def pack(codes: Bytes) -> Bytes:
    """Two codes to a byte, the first in the high nibble; an odd last one is paired with the code of zero."""
    if codes.size % 2:
        raise ValueError("pad an odd number of codes before packing")
    both = codes.view("<u2")  # the first code is the low byte
    return ((both << np.uint16(4)) | (both >> np.uint16(8))).astype(np.uint8)


def unpack(packed: Bytes) -> Bytes:
    """The codes of packed bytes, flat."""
    codes: npt.NDArray[np.uint8] = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed, 4, out=codes[:, 0])
    np.bitwise_and(packed, 15, out=codes[:, 1])
    return codes.reshape(-1)
