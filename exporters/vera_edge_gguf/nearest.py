"""Rounding to nearest into llama.cpp's types in compiled loops: one pass over the weights.

Of Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0 these are llama.cpp's own bytes, as its quantizer and the gguf package give
them. Q6_K's scales are searched for, by the loops of `vera_edge.requantize`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vera_edge.arrays import Bytes, Float32
from vera_edge.cores import available_cores
from vera_edge.formats.weight import row_chunks
from vera_edge.requantize import GGML_GRIDS
from vera_edge.requantize.compiled import compiled_as_written
from vera_edge.requantize.gram import in_threads
from vera_edge.requantize.search import search_columns
from vera_edge.requantize.super_blocks import place

_PIECE_VALUES = 1 << 20
_BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5}
_BLOCK, _SUPER = 32, 256
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)


@compiled_as_written  # for llama.cpp's bytes
def _by_largest(block: Float32, reach: Any, codes: Bytes) -> Any:
    """The codes of 32 weights whose largest becomes -reach; returns the scale."""
    largest, end = _ZERO, _ZERO
    for index in range(block.size):
        size = abs(block[index])
        if size > largest:
            largest, end = size, block[index]
    scale = end / -reach
    inverse = _ZERO if scale == _ZERO else _ONE / scale
    for index in range(block.size):
        code = np.int32(block[index] * inverse + (reach + _HALF))
        codes[index] = min(code, np.int32(2 * reach - 1))
    return scale


@compiled_as_written
def _by_range(block: Float32, top: Any, codes: Bytes) -> Any:
    """The codes of 32 weights from the lowest, 0, to the highest, `top`; returns the scale and the lowest."""
    low = high = block[0]
    for index in range(block.size):
        low, high = min(low, block[index]), max(high, block[index])
    scale = (high - low) / top
    inverse = _ZERO if scale == _ZERO else _ONE / scale
    for index in range(block.size):
        code = np.int32((block[index] - low) * inverse + _HALF)
        codes[index] = min(code, np.int32(top))
    return scale, low


@compiled_as_written
def _put(blocks: Float32, bits: int, ranged: bool, scales: Float32, lows: Float32, out: Bytes) -> None:
    """Blocks (n, 32) into out (n, bytes), where 2 bytes are left for the scale, and for the lowest value."""
    codes = np.empty(blocks.shape[1], np.uint8)
    for number in range(blocks.shape[0]):
        if ranged:
            scales[number], lows[number] = _by_range(blocks[number], np.float32((1 << bits) - 1), codes)
        else:
            scales[number] = _by_largest(blocks[number], np.float32(1 << (bits - 1)), codes)
        at = 4 if ranged else 2
        if bits == 5:
            for byte in range(4):
                fifth = np.uint8(0)
                for bit in range(8):
                    fifth |= (codes[8 * byte + bit] >> 4) << bit
                out[number, at + byte] = fifth
            at += 4
        for index in range(16):
            out[number, at + index] = (codes[index] & 15) | ((codes[index + 16] & 15) << 4)


@compiled_as_written
def _put_bytes(blocks: Float32, scales: Float32, out: Bytes) -> None:
    """Blocks (n, 32) as signed bytes into out (n, 34), halves rounded away from zero as C's roundf does."""
    for number in range(blocks.shape[0]):
        block, largest = blocks[number], _ZERO
        for index in range(block.size):
            largest = max(largest, abs(block[index]))
        scales[number] = largest / np.float32(127)
        inverse = _ZERO if scales[number] == _ZERO else _ONE / scales[number]
        for index in range(block.size):
            value = block[index] * inverse
            size = abs(value)
            whole = np.floor(size)
            whole += np.floor(np.float32(2) * (size - whole))
            out[number, 2 + index] = np.uint8(np.int8(whole if value > _ZERO else -whole))


@compiled_as_written
def _put_six_bits(blocks: Float32, scales: Float32, out: Bytes) -> None:
    """Super-blocks (n, 256) with scales (n, 16) into the codes of out (n, 210), as k_blocks has them."""
    codes = np.empty(blocks.shape[1], np.uint8)
    for number in range(blocks.shape[0]):
        for part in range(16):
            scale = scales[number, part]
            inverse = _ONE / scale if abs(scale) > np.float32(1e-30) else _ZERO
            for index in range(16 * part, 16 * part + 16):
                code = np.int32(np.rint(blocks[number, index] * inverse)) + np.int32(32)
                codes[index] = min(max(code, np.int32(0)), np.int32(63))
        for half in range(2):
            for index in range(32):
                a, b = codes[128 * half + index], codes[128 * half + 32 + index]
                c, d = codes[128 * half + 64 + index], codes[128 * half + 96 + index]
                out[number, 64 * half + index] = (a & 15) | ((c & 15) << 4)
                out[number, 64 * half + 32 + index] = (b & 15) | ((d & 15) << 4)
                upper = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
                out[number, 128 + 32 * half + index] = upper


def rounded(values: Float32, stored: str) -> Bytes:
    """`values` (rows, width) as the bytes of a type, (blocks, bytes of one), on all cores."""
    work = {"q8_0": _eight_bits, "q6_k": _six_bits}.get(stored)
    pieces = [slice(*piece) for piece in row_chunks((values.shape[0], values.shape[1]), values=_PIECE_VALUES)]

    def piece(rows: slice) -> Bytes:
        part = np.ascontiguousarray(values[rows])
        return _few_bits(part, stored) if work is None else work(part)

    found: Bytes = np.concatenate(in_threads(piece, pieces, available_cores()))
    return found


def _few_bits(values: Float32, stored: str) -> Bytes:
    blocks, bits, ranged = values.reshape(-1, _BLOCK), _BITS[stored], stored.endswith("1")
    out = np.empty((len(blocks), (4 if ranged else 2) + 4 * bits), np.uint8)
    scales, lows = np.empty((2, len(blocks)), np.float32)
    _put(blocks, bits, ranged, scales, lows, out)
    out[:, :2] = _halves(scales)
    if ranged:
        out[:, 2:4] = _halves(lows)
    return out


def _eight_bits(values: Float32) -> Bytes:
    blocks = values.reshape(-1, _BLOCK)
    out, scales = np.empty((len(blocks), 2 + _BLOCK), np.uint8), np.empty(len(blocks), np.float32)
    _put_bytes(blocks, scales, out)
    out[:, :2] = _halves(scales)
    return out


def _six_bits(values: Float32) -> Bytes:
    grid = GGML_GRIDS["q6_k"]
    scales, _ = search_columns(np.ascontiguousarray(values.T), np.ones(values.shape[1], np.float32), grid)
    placed = place(np.ascontiguousarray(scales.T), np.zeros_like(scales.T), grid)
    blocks = values.reshape(-1, _SUPER)
    out = np.empty((len(blocks), 210), np.uint8)
    _put_six_bits(blocks, placed.scales.reshape(len(blocks), -1), out)
    out[:, 192:208] = placed.stored["sub_scales"].reshape(len(blocks), -1).view(np.uint8)
    out[:, 208:] = _halves(placed.stored["scale"].reshape(-1))
    return out


def _halves(values: Any) -> Bytes:
    """float16, two bytes each, (n, 2)."""
    found: Bytes = values.astype(np.float16).reshape(-1, 1).view(np.uint8)
    return found
