"""Grids: the values a weight format can store, as levels times a scale for each block of weights.

A value is `scale * level`. For NF4 and FP4 the levels are the format's table of 16; for integers they are
`code - zero` with code in [0, top]. Blocks run along the input dimension, the last one of a row may be short
(`Grid.rows` true), except where bitsandbytes cuts blocks out of the flat weight and the width is no multiple
of the block: there blocks run over row ends (`rows` false).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import PlanError
from vera_edge.formats.blocks import IntBlocks, check_kind, in_bfloat16
from vera_edge.formats.bnb4 import Bnb4Weight
from vera_edge.formats.bnb8 import Int8Weight
from vera_edge.formats.codes4 import LEVELS, pack
from vera_edge.formats.nested import Nested

# Cells of the table that finds the nearest level; a value this near to a bound may go to either side.
_CELLS = 1 << 14
_127 = np.float32(127)


@dataclass(frozen=True)
class Grid:
    """What can be stored. `block`: weights per scale along a row, 0 for the whole row.

    `kind`: "nf4", "fp4" or "iq4_nl" (a table of levels), or "int" with `bits`. `symmetric`: no zero point is
    stored. `nested`: the scales are double-quantized as bitsandbytes does it. `half`: they are float16, in a
    type of llama.cpp's; `bfloat16`: they are float32 that bfloat16 has too (`formats.blocks`). `ggml`: the
    type's name where blocks have more than that (super_blocks.py). `options`: the format's own, kept for
    writing (storage dtype and the like). `least_zero`: the least zero point that an asymmetric one can store.
    """

    kind: str
    bits: int
    block: int
    symmetric: bool = True
    nested: bool = False
    per_row: bool = False
    half: bool = False
    bfloat16: bool = False
    ggml: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    least_zero: int = 0

    @property
    def integer(self) -> bool:
        return self.kind == "int"

    @property
    def top(self) -> int:
        """The highest code of an integer grid; LLM.int8 uses 255 of its 256 codes, so that it's symmetric."""
        return (1 << self.bits) - (2 if self.per_row else 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric integer grid."""
        return 127 if self.per_row else 1 << (self.bits - 1)

    def width(self, in_features: int) -> int:
        """Weights per scale for rows this wide."""
        return self.block or in_features

    def rows(self, in_features: int) -> bool:
        """Whether every block lies within one row."""
        return self.integer or in_features % self.block == 0

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """(out, blocks of a row), or (blocks,) where blocks run over row ends."""
        out, inside = shape
        if self.rows(inside):
            return (out, -(-inside // self.width(inside)))
        return (-(-out * inside // self.block),)

    def stored(self, scales: Float32) -> Float32:
        """The scales nearest to these that the format can store, but for double quantization."""
        if self.bfloat16:
            return in_bfloat16(scales)
        if not self.half:
            return scales
        with np.errstate(over="ignore"):
            rounded = (scales / self._unit).astype(np.float16).astype(np.float32)
        found: Float32 = rounded * self._unit
        return found

    @property
    def _unit(self) -> np.float32:
        """What a stored scale is multiplied by: IQ4_NL's levels are whole numbers in the format."""
        return np.float32(128 if self.kind == "iq4_nl" else 1)

    def halves(self, scales: Float32) -> npt.NDArray[np.float16]:
        """The float16 that the format stores for scales that lie on it."""
        found: npt.NDArray[np.float16] = (scales / self._unit).astype(np.float16)
        return found

    def nearest(self, scaled: Float32, zero: Float32 | None) -> Float32:
        """The level nearest to each value of `scaled` (weights over their scale); changes `scaled`."""
        if self.integer:
            assert zero is not None
            np.rint(scaled, out=scaled)
            np.maximum(scaled, -zero, out=scaled)
            return np.minimum(scaled, np.float32(self.top) - zero, out=scaled)
        scaled *= np.float32(_CELLS / 2)
        scaled += np.float32(_CELLS / 2)
        return _level_of_cell(self.kind).take(scaled.astype(np.intp), mode="clip")

    def codes_of(self, levels: Float32, zero: Float32 | None) -> Bytes:
        """The stored codes (uint8) of levels that lie on the grid."""
        if self.integer:
            assert zero is not None
            return (levels + zero).astype(np.uint8)
        order, ordered = _order(self.kind)
        return order[np.searchsorted(ordered, levels)]

    def levels_of(self, codes: Bytes, zero: Float32 | None) -> Float32:
        """The levels (float32) of stored codes."""
        if self.integer:
            assert zero is not None
            return codes.astype(np.float32) - zero
        return LEVELS[self.kind][codes]


def bnb_grid(quant_type: str, blocksize: int = 64, double_quant: bool = True, **options: Any) -> Grid:
    """bitsandbytes' NF4 or FP4, with absmax in float32 or double-quantized. `options`: storage, dtype."""
    return Grid(quant_type, 4, blocksize, nested=double_quant, options=tuple(sorted(options.items())))


def int_blocks(bits: int, block: int = 32, symmetric: bool = True) -> Grid:
    """Integer blocks as ONNX Runtime's MatMulNBits has them: value = (code - zero) * scale.

    Symmetric ones of 4 bits have scales that survive its kernels for Arm, see `formats.blocks.in_bfloat16`.

    Raises PlanError for a width or block that MatMulNBits doesn't know.
    """
    check_kind(bits, block)
    return Grid("int", bits, block, symmetric=symmetric, bfloat16=symmetric and bits == 4)


def int8_rows() -> Grid:
    """bitsandbytes' LLM.int8: codes -127 to 127, one scale for each row."""
    return Grid("int", 8, 0, per_row=True)


# llama.cpp's types: those of 32 weights with one float16 scale
GGML_GRIDS: Mapping[str, Grid] = {
    "q4_0": Grid("int", 4, 32, half=True),
    "q5_0": Grid("int", 5, 32, half=True),
    "q8_0": Grid("int", 8, 32, half=True),
    "iq4_nl": Grid("iq4_nl", 4, 32, half=True),
    # those with offsets, and those in super-blocks of 256
    "q4_1": Grid("int", 4, 32, symmetric=False, ggml="q4_1"),
    "q5_1": Grid("int", 5, 32, symmetric=False, ggml="q5_1"),
    "q4_k": Grid("int", 4, 32, symmetric=False, ggml="q4_k"),
    "q5_k": Grid("int", 5, 32, symmetric=False, ggml="q5_k"),
    "q6_k": Grid("int", 6, 16, ggml="q6_k"),
}


@cache
def _order(kind: str) -> tuple[Bytes, Float32]:
    """The codes in the order of their levels, equal levels once, and those levels."""
    levels, codes = np.unique(LEVELS[kind], return_index=True)
    return codes.astype(np.uint8), levels


@cache
def levels_in_order(kind: str) -> tuple[Float32, Float32]:
    """The levels of a code book in order and the middles between them, both empty for integers.

    A value above a middle is nearer to the level above. Not to be written to.
    """
    if kind == "int":
        return np.empty(0, np.float32), np.empty(0, np.float32)
    levels = np.array(_order(kind)[1], np.float32)
    return levels, (levels[1:] + levels[:-1]) / np.float32(2)


@cache
def _level_of_cell(kind: str) -> Float32:
    """The nearest level at the middle of each cell of [-1, 1]."""
    _, levels = _order(kind)
    middles = (np.arange(_CELLS) + 0.5) / _CELLS * 2 - 1
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, middles)].astype(np.float32)


def inverse(scales: Float32) -> Float32:
    """1 / scales, with 0 for a scale of 0: a block of zeros stays one."""
    found: Float32 = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=found, where=np.abs(scales) > 1e-30)
    return found


def spread(values: npt.NDArray[Any], grid: Grid, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """One value per block to one per weight (out, in)."""
    out, inside = shape
    if grid.rows(inside):
        return np.repeat(values, grid.width(inside), axis=1)[:, :inside]
    return np.repeat(values, grid.block)[: out * inside].reshape(out, inside)


@dataclass(frozen=True)
class Codes:
    """A requantized weight. `codes`: uint8 (out, in). `scales`: float32, see Grid.scales_shape, de-nested.

    `zeros`: uint8, of the scales' shape, for asymmetric integer grids. `nested`: the double-quantized scales.
    `stored`: by name, rows first, what scales and offsets are made of in llama.cpp's types that have more.
    """

    grid: Grid
    codes: Bytes
    scales: Float32
    zeros: Bytes | None = None
    nested: Nested | None = None
    stored: Mapping[str, npt.NDArray[Any]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self) -> Float32:
        """What the codes mean, float32 (out, in), bit for bit as the format's own reader has it."""
        if self.grid.ggml:
            assert self.stored is not None
            levels = self.codes.astype(np.float32) - np.float32(
                self.grid.middle if self.grid.symmetric else 0
            )
            offsets = spread(self.stored["offsets"], self.grid, self.shape)
            return levels * spread(self.scales, self.grid, self.shape) + offsets
        if self.grid.half:
            zeros = np.full(1, self.grid.middle, np.float32)
            levels = self.grid.levels_of(self.codes, zeros)
            return levels * spread(self.scales, self.grid, self.shape)
        if not self.grid.integer:
            return self.bnb4().rows(0, self.shape[0])
        if self.grid.per_row:
            return self.bnb8().rows(0, self.shape[0])
        return self.int_blocks().dequantize()

    def weight(self) -> Bnb4Weight | Int8Weight:
        """The weight as bitsandbytes stores it. Raises PlanError for integer blocks."""
        if self.grid.half or self.grid.ggml:
            raise PlanError("llama.cpp's blocks can't be stored in a bitsandbytes checkpoint; export to gguf")
        if self.grid.per_row:
            return self.bnb8()
        if self.grid.integer:
            raise PlanError(
                "integer blocks can't be stored in a bitsandbytes checkpoint; export them to ONNX"
            )
        return self.bnb4()

    def int_blocks(self) -> IntBlocks:
        """As integer blocks; the last block of a row is padded with codes of zero."""
        if not self.grid.integer or self.grid.per_row:
            raise PlanError(f"a {self.grid.kind} weight has no integer blocks")
        out, inside = self.shape
        blocks, width = self.scales.shape[1], self.grid.block
        padded = np.empty((out, blocks, width), np.uint8)
        zeros = self.grid.middle if self.zeros is None else self.zeros[:, -1:]
        padded[:, -1] = zeros
        padded.reshape(out, -1)[:, :inside] = self.codes
        return IntBlocks(self.grid.bits, inside, padded, self.scales, self.zeros)

    def bnb4(self) -> Bnb4Weight:
        """As bitsandbytes' NF4 or FP4."""
        options: Mapping[str, Any] = dict(self.grid.options)
        flat = self.codes.reshape(-1)
        if flat.size % 2:
            flat = np.append(flat, self.grid.codes_of(np.zeros(1, np.float32), None))
        return Bnb4Weight(
            self.shape,
            self.grid.kind,
            self.grid.block,
            pack(flat),
            self.scales.reshape(-1),
            self.nested,
            options.get("storage", "U8"),
            options.get("dtype", "float32"),
        )

    def bnb8(self) -> Int8Weight:
        """As bitsandbytes' LLM.int8, whose scale is that of code 127."""
        signed = (self.codes.astype(np.int16) - 127).astype(np.int8)
        return Int8Weight(signed, self.scales.reshape(-1) * _127)
