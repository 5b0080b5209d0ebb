"""Plain integer blocks, as ONNX Runtime's MatMulNBits computes with them; packing is the exporter's.

Each row of a weight (out, in) is cut into blocks of `block` inputs, the last one padded with zeros; a block
has one float32 scale and, when asymmetric, one integer zero point: `value = (code - zero_point) * scale`.
Source: the MatMulNBits operator, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import PlanError
from vera_edge.formats.weight import row_chunks

BITS = (2, 4, 8)
SIZES = (16, 32, 64, 128, 256)
# Values of the shared projections are uniform, so all blocks have the same scale but for chance: long blocks
# cost no precision, and the longest that the rank fills are the fastest.
BLOCK_OF_A = 128
_BLOCKS_OF_B = (256, 128, 64, 32)
_UPPER = np.uint32(0xFFFF0000)  # the bits of a float32 that bfloat16 has


def block_of_b(rank: int) -> int:
    """Values to a block of the projection B (out, rank)."""
    return next((block for block in _BLOCKS_OF_B if rank % block == 0), _BLOCKS_OF_B[-1])


def stored_bytes(shape: tuple[int, int], bits: int, block: int) -> int:
    """What a weight (out, in) in symmetric blocks takes: codes, the last block's padding too, and scales."""
    return shape[0] * -(-shape[1] // block) * (block * bits // 8 + 4)


@dataclass(frozen=True, eq=False)
class IntBlocks:
    """A weight (out, in) in integer blocks.

    codes: uint8 (out, blocks, block), from 0 to 2^bits - 1, one to a byte.
    scales: float32 (out, blocks), negative where a symmetric block's largest magnitude is positive.
    zero_points: uint8 (out, blocks); None when symmetric, where it is 2^(bits - 1) for all.
    """

    bits: int
    in_features: int
    codes: Bytes
    scales: Float32
    zero_points: Bytes | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.in_features)

    @property
    def block(self) -> int:
        """Inputs to a block."""
        return self.codes.shape[2]

    def rows(self, start: int, stop: int) -> Float32:
        """Rows as float32: an exact integer times the scale, one rounding, as MatMulNBits has it."""
        levels = self.codes[start:stop].astype(np.float32)
        if self.zero_points is None:
            levels -= np.float32(1 << (self.bits - 1))
        else:
            levels -= self.zero_points[start:stop, :, None].astype(np.float32)
        levels *= self.scales[start:stop, :, None]
        return levels.reshape(stop - start, -1)[:, : self.in_features]

    def dequantize(self) -> Float32:
        """The whole weight as float32 (out, in)."""
        whole = np.empty(self.shape, np.float32)
        for start, stop in row_chunks(self.shape):
            whole[start:stop] = self.rows(start, stop)
        return whole


def check_kind(bits: int, block: int) -> None:
    """Raise PlanError for a width or a block that MatMulNBits doesn't know."""
    if bits not in BITS:
        raise PlanError(f"integer blocks have 2, 4 or 8 bits, not {bits}")
    if block not in SIZES:
        raise PlanError(f"a block of {block} inputs can't run; choose from {', '.join(map(str, SIZES))}")


def block_within(group: int) -> int | None:
    """The longest block that fills a group of inputs a whole number of times; None when there is none."""
    return max((size for size in SIZES if group % size == 0), default=None)


def block_filling(groups: npt.NDArray[np.int64]) -> int | None:
    """The longest block that fills groups of these sizes; None when there is none.

    The last block of a row may be short, so one group may be that it doesn't fill.
    """
    short = min(1, groups.size - 1)
    return max((size for size in SIZES if np.count_nonzero(groups % size) <= short), default=None)


def quantize(weight: Float32, bits: int, block: int, symmetric: bool) -> IntBlocks:
    """Round a float32 weight (out, in) to integer blocks, to nearest.

    Symmetric: the value of largest magnitude falls on the lowest code, so that all 2^bits codes are used; at
    4 bits by scales that bfloat16 has.
    Asymmetric: the scale spans the block's range, zero included, so that zero stays exact.
    Raises PlanError on bits other than 2, 4, 8, on a block that isn't one of SIZES, and on values that
    aren't finite.
    """
    check_kind(bits, block)
    out, inside = weight.shape
    count = -(-inside // block)
    codes = np.empty((out, count, block), np.uint8)
    scales = np.empty((out, count), np.float32)
    zero_points = None if symmetric else np.empty((out, count), np.uint8)
    for start, stop in row_chunks((out, inside)):
        values = np.zeros((stop - start, count * block), np.float32)
        values[:, :inside] = weight[start:stop]
        if not np.isfinite(values).all():
            raise PlanError("a weight with NaN or infinite values can't be quantized to integers")
        parts = values.reshape(stop - start, count, block)
        if zero_points is None:
            codes[start:stop], scales[start:stop] = _symmetric(parts, bits)
        else:
            codes[start:stop], scales[start:stop], zero_points[start:stop] = _asymmetric(parts, bits)
    return IntBlocks(bits, inside, codes, scales, zero_points)


def in_bfloat16(scales: Float32) -> Float32:
    """The bfloat16 nearest to each of some finite float32, as float32, ties to even.

    On Arm ONNX Runtime's products with symmetric 4-bit blocks cut their scales to it (KleidiAI).
    """
    bits = np.ascontiguousarray(scales).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    found: Float32 = (rounded & _UPPER).view(np.float32)
    return np.where(np.isfinite(found), found, (bits & _UPPER).view(np.float32))


def _symmetric(parts: Float32, bits: int) -> tuple[Bytes, Float32]:
    half = 1 << (bits - 1)
    low, high = parts.min(axis=2), parts.max(axis=2)
    scales = np.where(high > -low, high, low) / np.float32(-half)
    scales = in_bfloat16(scales) if bits == 4 else scales
    steps = np.rint(parts / _not_zero(scales)[:, :, None]) + np.float32(half)
    return np.clip(steps, 0, 2 * half - 1).astype(np.uint8), scales


def _asymmetric(parts: Float32, bits: int) -> tuple[Bytes, Float32, Bytes]:
    top = np.float32((1 << bits) - 1)
    low, high = np.minimum(parts.min(axis=2), 0), np.maximum(parts.max(axis=2), 0)
    # Divided before subtracted: the difference of the ends alone can be too large for float32.
    scales = (high / top) - (low / top)
    divisors = _not_zero(scales)
    zeros = np.clip(np.rint(-low / divisors), 0, top)
    steps = np.rint(parts / divisors[:, :, None]) + zeros[:, :, None]
    return np.clip(steps, 0, top).astype(np.uint8), scales, zeros.astype(np.uint8)


def _not_zero(scales: Float32) -> Float32:
    return np.where(scales == 0, np.float32(1), scales)
