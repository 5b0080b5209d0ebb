"""The bytes of llama.cpp's super-blocks of 256 weights: Q4_K, Q5_K and Q6_K.

Source: ggml-common.h (block_q4_K, block_q5_K, block_q6_K) and the loops of ggml-quants.c that read them.
"""

from __future__ import annotations

import numpy as np

from vera_edge.arrays import Bytes
from vera_edge.requantize import Codes


def packed(codes: Codes) -> Bytes:
    """Codes of one of these types as the file has them, (super-blocks, bytes of one)."""
    assert codes.stored is not None
    count = codes.codes.size // 256
    scale = codes.stored["scale"].reshape(count, 1).view(np.uint8)
    whole = codes.codes.reshape(count, 256)
    if codes.grid.ggml == "q6_k":
        inner = codes.stored["sub_scales"].reshape(count, 16).view(np.uint8)
        return np.concatenate([*_six_bits(whole), inner, scale], axis=1)
    offset = codes.stored["offset"].reshape(count, 1).view(np.uint8)
    inner = _scales(
        codes.stored["sub_scales"].reshape(count, 8), codes.stored["sub_offsets"].reshape(count, 8)
    )
    blocks = whole.reshape(count, 4, 2, 32)  # two blocks of 32 share their bytes
    low = blocks & np.uint8(0x0F)
    nibbles = (low[:, :, 0] | (low[:, :, 1] << np.uint8(4))).reshape(count, 128)
    high = [_fifth_bits(whole)] if codes.grid.bits == 5 else []
    found: Bytes = np.concatenate([scale, offset, inner, *high, nibbles], axis=1)
    return found


def _scales(scales: Bytes, offsets: Bytes) -> Bytes:
    """Six bits each of 8 scales and 8 offsets in 12 bytes: the last four's upper bits lie over the first."""
    upper = np.uint8(0x30)
    first = scales[:, :4] | ((scales[:, 4:] & upper) << np.uint8(2))
    second = offsets[:, :4] | ((offsets[:, 4:] & upper) << np.uint8(2))
    third = (scales[:, 4:] & np.uint8(0x0F)) | ((offsets[:, 4:] & np.uint8(0x0F)) << np.uint8(4))
    found: Bytes = np.concatenate([first, second, third], axis=1)
    return found


def _fifth_bits(codes: Bytes) -> Bytes:
    """Byte i has the fifth bit of weight i of each of the 8 blocks."""
    bits = (codes >> np.uint8(4)).reshape(-1, 8, 32)
    found: Bytes = np.packbits(bits, axis=1, bitorder="little").reshape(-1, 32)
    return found


def _six_bits(codes: Bytes) -> tuple[Bytes, Bytes]:
    """The lower four bits of all (128 bytes) and the upper two (64), each half of 128 weights by itself."""
    quarters = codes.reshape(-1, 2, 4, 32)
    low = quarters & np.uint8(0x0F)
    nibbles = np.concatenate([low[:, :, :2] | (low[:, :, 2:] << np.uint8(4))], axis=2)
    pairs = np.zeros((len(quarters), 2, 32), np.uint8)
    for quarter in range(4):
        pairs |= (quarters[:, :, quarter] >> np.uint8(4)) << np.uint8(2 * quarter)
    return nibbles.reshape(-1, 128), pairs.reshape(-1, 64)
