"""Weights as the bytes of llama.cpp's types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import PlanError
from vera_edge.formats.dense import to_dtype
from vera_edge.merging.computed import Rows
from vera_edge.requantize import GGML_GRIDS, Codes, requantize
from vera_edge_gguf import k_blocks, tensor_types

_FLOATS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def size(stored: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    block, each = gguf.GGML_QUANT_SIZES[tensor_types.ggml_type(stored)]
    count = int(np.prod(shape))
    return count // block * each


def rounded(name: str, values: Float32, stored: str) -> npt.NDArray[Any]:
    """`values` (rows, width) to nearest, as llama.cpp's own quantizer gives them: the bytes of the file."""
    if stored in _FLOATS:
        found = to_dtype(values, _FLOATS[stored])
        if stored == "fp16" and not np.isfinite(found.array()).all():
            raise PlanError(f"{name} has values beyond fp16's largest, 65504; choose --weights bf16 or fp32")
        return found.data
    if stored in (*tensor_types.LEGACY, "q6_k"):
        from vera_edge_gguf import nearest  # numba comes with it

        return nearest.rounded(values, stored)
    return packed(requantize(values, GGML_GRIDS[stored], "search"))


def rounded_rows(name: str, pieces: Iterable[Rows], stored: str, shape: tuple[int, ...]) -> Bytes:
    """As `rounded`, of a matrix that comes some rows at a time: (the first row's number, the rows)."""
    found = np.empty((shape[0], size(stored, shape) // shape[0]), np.uint8)
    for start, rows in pieces:
        data = rounded(name, rows, stored)
        found[start : start + len(rows)] = data.reshape(len(rows), -1).view(np.uint8)
    return found


def packed(codes: Codes) -> Bytes:
    """Codes on one of GGML_GRIDS as the file has them: of each block its scale, then its codes."""
    if codes.grid.ggml.endswith("_k"):
        return k_blocks.packed(codes)
    count, bits = codes.codes.size // 32, codes.grid.bits
    scales = codes.grid.halves(codes.scales).reshape(count, 1).view(np.uint8)
    if codes.stored is not None:
        scales = np.concatenate([scales, codes.stored["offset"].reshape(count, 1).view(np.uint8)], axis=1)
    blocks = codes.codes.reshape(count, 32)
    if bits == 8:
        parts = [scales, blocks ^ np.uint8(0x80)]  # from an offset of 128 to a sign
    else:
        # The lower four bits of the first 16 weights, and above them those of the last.
        low = blocks & np.uint8(0x0F)
        halves = low[:, :16] | (low[:, 16:] << np.uint8(4))
        high = [np.packbits(blocks >> np.uint8(4), axis=1, bitorder="little")] if bits == 5 else []
        parts = [scales, *high, halves]
    found: Bytes = np.concatenate(parts, axis=1)
    return found
