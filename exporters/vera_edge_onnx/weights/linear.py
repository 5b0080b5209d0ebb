"""A linear layer's weight in the forms ONNX Runtime multiplies with, and the node that does it.

`MatMulBnb4` and `MatMulNBits` are contrib operators: their layouts are specified in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import TargetError
from vera_edge.formats.blocks import IntBlocks
from vera_edge_onnx.graph.weaver import MICROSOFT, Weaver, leading

_QUANT_TYPES = {"fp4": 0, "nf4": 1}
# Quantize the activations to int8 block by block: at 8 and 2 bits anything less is over 50 times slower.
_ACCURACY = 4


class StoredProduct(Protocol):
    """A weight (out, in) in some stored form."""

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        """x (..., in) times the weight transposed: (..., out).

        weight: the name its initializers begin with; when they are there already they are used again.
        node: the new node's name without the operator.
        """


@dataclass(frozen=True)
class Bnb4Product:
    """NF4 or FP4: bitsandbytes' own bytes.

    packed: uint8, flat, two codes a byte. absmax: float32, one for each `blocksize` values, row-major.
    """

    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    packed: Bytes
    absmax: Float32

    def __post_init__(self) -> None:
        if self.blocksize < 16 or self.blocksize & (self.blocksize - 1):
            raise TargetError(
                f"ONNX Runtime takes {self.quant_type} blocks of 16, 32, 64, ... values, and these are of "
                f"{self.blocksize}; export with --weights int8 instead"
            )

    def rows(self, start: int, stop: int) -> Bnb4Product:
        """Some rows of the weight, cut out of the bytes; raises TargetError when they don't begin a block."""
        inside, size = self.shape[1], self.blocksize
        first, last = start * inside, stop * inside
        if first % size or (last % size and stop != self.shape[0]):
            raise TargetError(
                f"rows {start} to {stop} of a weight of shape {list(self.shape)} don't fill whole blocks of "
                f"{size} values, so they can't be cut out byte for byte; export with --weights int8 instead"
            )
        packed = self.packed[first // 2 : -(-last // 2)]
        absmax = self.absmax[first // size : -(-last // size)]
        return Bnb4Product((stop - start, inside), self.quant_type, size, packed, absmax)

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        out, inside = self.shape
        packed = weaver.initializer(f"{weight}.{self.quant_type}", self.packed)
        absmax = weaver.initializer(f"{weight}.absmax", self.absmax)
        return weaver.node(
            "MatMulBnb4",
            [x, packed, absmax],
            f"{node}/MatMulBnb4",
            (*leading(x), out),
            before=before,
            domain=MICROSOFT,
            K=inside,
            N=out,
            block_size=self.blocksize,
            quant_type=_QUANT_TYPES[self.quant_type],
        )


def join_bnb4(parts: list[Bnb4Product]) -> Bnb4Product:
    """Weights stacked by rows. Their bytes are joined as they are, so each must end where a block ends.

    Raises TargetError when one doesn't, or when they differ in type or block size.
    """
    first = parts[0]
    for part in parts[:-1]:
        if part.shape[0] * part.shape[1] % part.blocksize:
            raise TargetError(
                f"a weight of shape {list(part.shape)} doesn't end at a block of {part.blocksize} values, so "
                "it can't be packed with its neighbours byte for byte; export with --weights int8 instead"
            )
    kinds = {(part.quant_type, part.blocksize, part.shape[1]) for part in parts}
    if len(kinds) > 1:
        raise TargetError("layers that are computed together differ in their 4-bit block size or type")
    return Bnb4Product(
        (sum(part.shape[0] for part in parts), first.shape[1]),
        first.quant_type,
        first.blocksize,
        np.concatenate([part.packed for part in parts]),
        np.concatenate([part.absmax for part in parts]),
    )


@dataclass(frozen=True, eq=False)
class Blocks:
    """Integers in blocks along the input, for `MatMulNBits`."""

    form: IntBlocks

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.shape

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        values = [weaver.initializer(name, array) for name, array in self.arrays(weight).items()]
        return self.multiply(weaver, x, values, self.shape[0], node, before)

    def rows_product(
        self, weaver: Weaver, x: ir.Value, weight: str, rows: tuple[int, int], node: str, before: ir.Node
    ) -> ir.Value:
        """The product with rows `start` to `stop` of the weight only: (..., stop - start)."""
        values = [weaver.rows(name, array, rows) for name, array in self.arrays(weight).items()]
        return self.multiply(weaver, x, values, rows[1] - rows[0], node, before)

    def arrays(self, weight: str) -> dict[str, Bytes | Float32]:
        """Codes (out, blocks, block * bits / 8), scales (out, blocks), zero points (out, bytes) if any."""
        form = self.form
        arrays: dict[str, Bytes | Float32] = {
            f"{weight}.int{form.bits}": pack_bits(form.codes, form.bits),
            f"{weight}.scales": form.scales,
        }
        if form.zero_points is not None:
            arrays[f"{weight}.zero_points"] = pack_bits(form.zero_points, form.bits)
        return arrays

    def multiply(
        self, weaver: Weaver, x: ir.Value, values: list[ir.Value], out: int, node: str, before: ir.Node
    ) -> ir.Value:
        """The product with the arrays of a weight of this form and `out` rows, given as values."""
        return weaver.node(
            "MatMulNBits",
            [x, *values],
            f"{node}/MatMulNBits",
            (*leading(x), out),
            before=before,
            domain=MICROSOFT,
            K=self.form.in_features,
            N=out,
            bits=self.form.bits,
            block_size=self.form.block,
            accuracy_level=_ACCURACY,
        )


def join_blocks(parts: list[Blocks]) -> Blocks:
    """Weights stacked by rows; all of one width, block size and kind."""
    forms = [part.form for part in parts]
    zeros = [form.zero_points for form in forms if form.zero_points is not None]
    return Blocks(
        IntBlocks(
            forms[0].bits,
            forms[0].in_features,
            np.concatenate([form.codes for form in forms]),
            np.concatenate([form.scales for form in forms]),
            np.concatenate(zeros) if zeros else None,
        )
    )


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """Codes of 2, 4 or 8 bits packed along the last axis, low bits first; its end is padded with zeros."""
    share = 8 // bits
    if codes.shape[-1] % share:
        padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % share)]
        codes = np.pad(codes, padding)
    packed: npt.NDArray[np.uint8] = codes[..., 0::share].copy()
    for place in range(1, share):
        packed |= codes[..., place::share] << np.uint8(place * bits)
    return packed
