"""Codes of a few bits packed in 32-bit words, as GPTQ, AWQ and compressed-tensors store them.

The codes form one stream of bits, lowest bit first: code i of width `bits` begins at bit `i * bits` of its
row and may run over the end of a word, as 3-bit codes do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes


def unpack(words: npt.NDArray[Any], bits: int, count: int) -> Bytes:
    """The first `count` codes of each row: words (rows, n) of 32 bits -> uint8 (rows, count)."""
    stream = np.ascontiguousarray(words).view("<u4").astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return stream[:, :count]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (stream[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return codes.reshape(stream.shape[0], -1)[:, :count]
    flags = np.unpackbits(stream, axis=1, count=count * bits, bitorder="little").reshape(-1, count, bits)
    return np.packbits(flags, axis=2, bitorder="little").reshape(-1, count)


def pack(codes: Bytes, bits: int) -> npt.NDArray[np.int32]:
    """The inverse of `unpack`: uint8 (rows, count) -> int32 (rows, ceil(count * bits / 32)), padded with
    zeros.
    """
    rows, count = codes.shape
    words = -(-count * bits // 32)
    if 8 % bits == 0:
        each = 8 // bits
        padded = np.zeros((rows, words * 4 * each), np.uint8)
        padded[:, :count] = codes
        parts = padded.reshape(rows, words * 4, each) << np.arange(0, 8, bits, dtype=np.uint8)
        stream = np.bitwise_or.reduce(parts, axis=2)
    else:
        flags = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
        stream = np.zeros((rows, words * 4), np.uint8)
        packed = np.packbits(flags.reshape(rows, count * bits), axis=1, bitorder="little")
        stream[:, : packed.shape[1]] = packed
    return np.ascontiguousarray(stream).view("<i4").astype(np.int32, copy=False)
