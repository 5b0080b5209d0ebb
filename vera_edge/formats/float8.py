"""Eight-bit floats, which numpy lacks: E4M3 without infinities, and E5M2, as torch and safetensors have them.

Source: Micikevicius et al., FP8 formats for deep learning, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import numpy as np

from vera_edge.arrays import Bytes, Float32

MAX = 448.0  # the largest E4M3 value


def _table(exponent_bits: int, bias: int) -> Float32:
    """The value of each of the 256 codes."""
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (codes & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    values = np.where(exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias))
    return np.where(codes & 0x80, -values, values).astype(np.float32)


_E4M3 = _table(4, 7)
_E4M3[[0x7F, 0xFF]] = np.nan
_E5M2 = _table(5, 15)
_E5M2[[0x7C, 0xFC]] = [np.inf, -np.inf]
_E5M2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
TABLES = {"F8_E4M3": _E4M3, "F8_E5M2": _E5M2}


def decode(codes: Bytes, dtype: str) -> Float32:
    """The values of F8_E4M3 or F8_E5M2 codes, in the codes' shape (exact)."""
    return TABLES[dtype][codes]


def encode(values: Float32) -> Bytes:
    """Round to E4M3 codes, to nearest with ties to even; what is over 448 becomes 448. Values must be
    finite.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    sign = (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)
    size = np.minimum(np.abs(values), np.float32(MAX))
    bits = np.ascontiguousarray(size, np.float32).view(np.uint32)
    # Keep 3 of 23 mantissa bits; the exponent goes from bias 127 to bias 7.
    rounded = bits + (np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1)))
    normal = (rounded >> np.uint32(20)).astype(np.int32) - (120 << 3)
    subnormal = np.rint(size * np.float32(512)).astype(np.int32)  # multiples of 2 ** -9
    code = np.where(size < np.float32(2**-6), subnormal, np.minimum(normal, 0x7E))
    return code.astype(np.uint8) | sign
