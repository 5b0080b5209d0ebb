"""The 16 levels of NF4 and FP4, packing two codes to a byte, and the nearest code of a value.

All arithmetic is float32 in bitsandbytes' order of operations, so that the codes are its codes bit for bit.
Source of the levels: Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt

from vera_edge.tensors import Bytes, Float32

# NF4: quantiles of a normal distribution. FP4: sign, 2 exponent bits, 1 mantissa bit; in twelfths.
_NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)
_FP4 = "0 0.0625 8 12 4 6 2 3 0 -0.0625 -8 -12 -4 -6 -2 -3"
LEVELS: Mapping[str, Float32] = {
    "nf4": np.array(_NF4.split(), np.float32),
    "fp4": np.array(_FP4.split(), np.float32) / np.float32(12),
}
# Cells of the search grid over [-1, 1]; fine enough that no cell holds two of a format's 15 bounds.
_HALF_CELLS = 1024
_TINY = np.float32(1e-38)


@cache
def _search_grid(quant_type: str) -> tuple[Bytes, Float32, Bytes]:
    """For each cell: the rank of its lowest code and the one bound it may hold; then code by rank.

    A value on a bound belongs to the lower code, as `torch.bucketize` has it.
    """
    levels = LEVELS[quant_type]
    order = np.argsort(levels, kind="stable")
    bounds = (levels[order[:-1]] + levels[order[1:]]) / np.float32(2)
    edges = (np.arange(2 * _HALF_CELLS + 1) - _HALF_CELLS - 0.5) / _HALF_CELLS
    ranks = np.searchsorted(bounds, edges.astype(np.float32))
    limits = np.append(bounds, np.float32(np.inf))[ranks]
    return ranks.astype(np.uint8), limits, order.astype(np.uint8)


def nearest_codes(scaled: Float32, quant_type: str) -> Bytes:
    """The code (uint8, 0 to 15) of each value of `scaled`, which lies in [-1, 1]."""
    ranks, limits, order = _search_grid(quant_type)
    cells = (scaled * np.float32(_HALF_CELLS) + np.float32(_HALF_CELLS + 0.5)).astype(np.intp)
    return order[ranks[cells] + (scaled > limits[cells])]


def scale_blocks(values: Float32, blocksize: int) -> tuple[Float32, Float32]:
    """Flat `values` over their block's absmax, and the absmax (blocks,). The last block may be short.

    bitsandbytes multiplies whole blocks by the reciprocal and divides the short one; the bits differ.
    """
    full = values.size // blocksize * blocksize
    blocks = values[:full].reshape(-1, blocksize)
    absmax = np.abs(blocks).max(axis=1) if full else np.empty(0, np.float32)
    scaled = np.empty_like(values)
    reciprocal = np.float32(1) / np.maximum(absmax, _TINY)
    np.multiply(blocks, reciprocal[:, None], out=scaled[:full].reshape(-1, blocksize))
    if full < values.size:
        last = np.maximum(np.abs(values[full:]).max(), _TINY)
        np.divide(values[full:], last, out=scaled[full:])
        absmax = np.append(absmax, last)
    return np.clip(scaled, -1, 1, out=scaled), absmax


def pack(codes: Bytes) -> Bytes:
    """Two codes to a byte, the first in the high nibble; an odd last one is paired with the code of zero."""
    if codes.size % 2:
        raise ValueError("pad an odd number of codes before packing")
    return (codes[::2] << np.uint8(4)) | codes[1::2]


def unpack(packed: Bytes) -> Bytes:
    """The codes of packed bytes, flat."""
    codes: npt.NDArray[np.uint8] = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed, 4, out=codes[:, 0])
    np.bitwise_and(packed, 15, out=codes[:, 1])
    return codes.reshape(-1)
