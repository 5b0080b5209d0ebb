"""bitsandbytes' double quantization: the absmax of 4-bit blocks, stored as 8-bit codes themselves.

`absmax = code_book[code] * scale of its block of 256 + offset`, the offset being the mean of all absmax.
The code book is the dynamic 8-bit type of Dettmers, https://arxiv.org/abs/1511.04561; codes are found as
bitsandbytes 0.50 finds them on the CPU, through a table of 65536 steps over [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from vera_edge.arrays import Bytes, Float32

_STEPS = np.float32(65535)
BLOCKSIZE = 256


@dataclass(frozen=True)
class Nested:
    """Double-quantized absmax: 8-bit `codes` (blocks,), a scale for every `blocksize` of them, an offset."""

    codes: Bytes
    code_book: Float32  # (256,)
    scales: Float32
    blocksize: int
    offset: np.float32

    def absmax(self) -> Float32:
        """The absmax (blocks,) as bitsandbytes restores them: product, then sum, each rounded to float32."""
        scales = np.repeat(self.scales, self.blocksize)[: self.codes.size]
        return self.code_book[self.codes] * scales + self.offset


def quantize_absmax(absmax: Float32) -> Nested:
    """Double-quantize absmax (blocks,).

    The offset is bitsandbytes' own on an x86-64 processor where one thread adds up, as torch has it for fewer
    than 32768 blocks; more threads, a GPU, or another processor differ by a few units in the last place.
    """
    offset = torch_sum(absmax) / np.float32(absmax.size)
    values = absmax - offset
    blocks = np.zeros((-(-values.size // BLOCKSIZE), BLOCKSIZE), np.float32)
    blocks.reshape(-1)[: values.size] = values
    scales = np.abs(blocks).max(axis=1)
    # A block of zeros (all absmax alike) has no direction to divide by; code 0 times scale 0 is right.
    reciprocal = np.float32(1) / np.where(scales == 0, np.float32(1), scales)
    scaled = blocks * reciprocal[:, None]
    steps = ((scaled + np.float32(1)) * np.float32(0.5)) * _STEPS + np.float32(0.5)
    codes = np.where(scales[:, None] == 0, np.uint8(0), _code_of_step()[steps.astype(np.intp)])
    return Nested(codes.reshape(-1)[: values.size].copy(), code_book(), scales, BLOCKSIZE, offset)


_LANES, _AT_ONCE, _LEVELS = 8, 4, 4  # floats in a vector, vectors added up side by side, levels of sums


def torch_sum(values: Float32) -> np.float32:
    """The sum of values (n,) in the order in which torch adds floats on one thread (`cascade_sum`).

    Source: torch's aten/src/ATen/native/cpu/SumKernel.cpp.
    """
    width = _LANES if values.size >= _LANES else 1
    vectors = values[: values.size // width * width].reshape(-1, width)
    whole = len(vectors) // _AT_ONCE
    rows = vectors[: whole * _AT_ONCE].reshape(whole, _AT_ONCE * width)
    power = max(4, max(0, whole - 1).bit_length() // _LEVELS)
    sums = np.zeros((_LEVELS, _AT_ONCE * width), np.float32)
    for start in range(0, whole, 1 << power):
        # Along this axis numpy adds row after row.
        sums[0] = np.add.reduce(rows[start : start + (1 << power)], axis=0)
        done = start + (1 << power)
        if done > whole:
            break
        for level in range(1, _LEVELS):
            sums[level] += sums[level - 1]
            sums[level - 1] = 0
            if done & (((1 << power) - 1) << (level * power)):
                break
    side_by_side = np.add.reduce(sums, axis=0).reshape(_AT_ONCE, width)
    for vector in vectors[whole * _AT_ONCE :]:
        side_by_side[0] += vector
    lanes = np.add.reduce(side_by_side, axis=0)
    total = np.float32(0)
    for value in (*values[len(vectors) * width :], *lanes):
        total += value
    return total


@cache
def code_book() -> Float32:
    """The signed dynamic 8-bit type: 7 decades, each split into twice as many steps as the one below."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(2**exponent + 1)
        middles = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.array(values, np.float32))


def _linspace(count: int) -> Float32:
    """`torch.linspace(0.1, 1, count)`: from both ends, one rounding for each (float64 stands in for FMA)."""
    low, high = np.float64(np.float32(0.1)), np.float64(1)
    step = np.float64(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count - 1)))
    index = np.arange(count)
    return np.where(index < count // 2, low + step * index, high - step * (count - 1 - index)).astype(
        np.float32
    )


@cache
def _code_of_step() -> Bytes:
    book = code_book()
    grid = (np.arange(65536).astype(np.float32) / _STEPS) * np.float32(2) - np.float32(1)
    return np.searchsorted((book[:-1] + book[1:]) * np.float32(0.5), grid).astype(np.uint8)
