"""Affine grids: a value is `scale * (code - zero)`, with one scale and one zero for a group of inputs.

What GPTQ, AWQ, HQQ, compressed-tensors and torchao have in common: how codes become values, and
round-to-nearest. A scale is kept to as many significant bits as leave every `scale * (code - zero)` exact in
float32; so a value says which code it was, and quantizing it again gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import PlanError
from vera_edge.formats.weight import row_chunks

_TINIEST = 2.0**-100


@dataclass(frozen=True)
class AffineParams:
    """A weight on an affine grid: codes uint8 (out, in), scales and zeros (out, groups) in float32.

    Group g is inputs `g * in / groups` up to the next group's, unless a format keeps an index beside it.
    """

    codes: Bytes
    scales: Float32
    zeros: Float32


@dataclass(frozen=True)
class Integers:
    """The codes of a stored weight, to be stored another way as they are: `bits` each, on a grid.

    index (in,): each input's group, where act-order permuted them; None for groups that lie in order.
    """

    bits: int
    grid: AffineParams
    index: npt.NDArray[np.int64] | None = None


@runtime_checkable
class HoldsIntegers(Protocol):
    """A weight in memory whose values are integers on an affine grid."""

    def integers(self) -> Integers:
        """Its codes, scales and zero points, exactly as stored."""


def values(
    codes: npt.NDArray[Any],
    scales: Float32,
    zeros: Float32 | None = None,
    index: npt.NDArray[np.int64] | None = None,
) -> Float32:
    """`scale * (code - zero)` in float32: the difference is rounded first, then the product.

    codes (n, in); scales and zeros (n, groups); index (in,): each input's group, None when groups lie in
    order.
    """
    result = codes.astype(np.float32)
    if index is not None:
        if zeros is not None:
            result -= zeros[:, index]
        result *= scales[:, index]
        return result
    grouped = result.reshape(codes.shape[0], scales.shape[1], -1)
    if zeros is not None:
        grouped -= zeros[:, :, None]
    grouped *= scales[:, :, None]
    return result


def keep_bits(scales: Float32, bits: int) -> Float32:
    """Round positive scales down to `bits` significant bits."""
    mask = np.uint32(0xFFFFFFFF << (24 - bits) & 0xFFFFFFFF)
    return (np.ascontiguousarray(scales, np.float32).view(np.uint32) & mask).view(np.float32)


def floor_fp16(scales: Float32) -> Float32:
    """Round positive scales down to float16 values, kept within its finite, nonzero range."""
    limits = np.finfo(np.float16)
    near = np.clip(scales, limits.smallest_subnormal, limits.max).astype(np.float16)
    above = near.astype(np.float32) > scales
    near[above] = np.nextafter(near[above], np.float16(0))
    return np.maximum(near, limits.smallest_subnormal).astype(np.float32)


def fit(
    weight: Float32, bits: int, groups: int, symmetric: bool, fp16: bool = False, least_zero: int = 0
) -> AffineParams:
    """Round a weight (out, in) to the nearest points of a grid that spans each group's values.

    symmetric: zero is `2 ** (bits - 1)`. Otherwise the grid runs from the group's least value (or 0) to its
    greatest (or 0), and zero, at least `least_zero`, is the code of 0. fp16: scales are float16 values, else
    they have 16 significant bits. Raises PlanError on values that aren't finite.
    """
    out, inside = weight.shape
    codes = np.empty((out, inside), np.uint8)
    scales = np.empty((out, groups), np.float32)
    zeros = np.empty((out, groups), np.float32)
    for start, stop in row_chunks(weight.shape):
        part = weight[start:stop].reshape(stop - start, groups, -1)
        if not np.isfinite(part).all():
            raise PlanError("a weight with NaN or infinite values can't be quantized to integers")
        s, z = _span(part, bits, symmetric, fp16, least_zero)
        scaled = part / s[:, :, None]
        # Halves are rounded away from zero: both ends of the span then get a code of their own.
        nearest = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled) + z[:, :, None]
        codes[start:stop] = np.clip(nearest, 0, 2**bits - 1).reshape(stop - start, inside).astype(np.uint8)
        scales[start:stop], zeros[start:stop] = s, z
    return AffineParams(codes, scales, zeros)


def _span(part: Float32, bits: int, symmetric: bool, fp16: bool, least_zero: int) -> tuple[Float32, Float32]:
    top, half = np.float32(2**bits - 1), np.float32(2 ** (bits - 1))
    low, high = np.minimum(part.min(axis=2), 0), np.maximum(part.max(axis=2), 0)
    if symmetric:
        scales = np.maximum(high / (half - 1), -low / half)
    else:
        # Divided before subtracted: the difference of the ends alone can be too large for float32.
        scales = np.maximum(high / top - low / top, high / (top - np.float32(least_zero)))
    scales = np.where(scales < _TINIEST, np.float32(1), scales)
    scales = floor_fp16(scales) if fp16 else keep_bits(scales, 16)
    if symmetric:
        return scales, np.full_like(scales, half)
    return scales, np.clip(np.floor(-low / scales + np.float32(0.5)), least_zero, top)
