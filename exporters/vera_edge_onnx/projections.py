"""The shared projections A and B as a graph stores them: each column and row once for the whole model.

A layer reads the first columns of A (rank, in_max) and some rows of B (out_max, rank). In fp32, A is stored
transposed, so that both are rows, and every width is a range of the same bytes. Quantized, A is cut at the
widths that occur, A = [A1 | A2], and wider layers add up `A1 x1 + A2 x2`.

The fp32 projections are overridable graph inputs. ONNX Runtime would otherwise repack a constant for every
product that reads it, 2 for each layer: more memory than the model's own weights, and no longer in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from vera_edge.errors import PlanError
from vera_edge.formats.blocks import quantize
from vera_edge.projection import Projections
from vera_edge.tensors import Float32
from vera_edge_onnx.linear import Blocks
from vera_edge_onnx.weaver import MICROSOFT, Weaver, leading

DTYPES = ("fp32", "fp16", "int8", "int4")
_BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
# The values are uniform, so all blocks have the same scale but for chance: long blocks cost nothing.
_BLOCK = 128
_A, _B = "vera.A", "vera.B"


@dataclass
class StoredProjections:
    """A and B of one graph. `widths` are the distinct input widths of the layers that read A, ascending."""

    projections: Projections
    dtype: str
    widths: tuple[int, ...]
    _quantized: dict[str, Blocks] = field(default_factory=dict)
    _widened: dict[str, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise PlanError(f"projections can't be stored as {self.dtype!r}; choose from {', '.join(DTYPES)}")

    @property
    def rank(self) -> int:
        return self.projections.spec.rank

    def down(self, weaver: Weaver, x: ir.Value, width: int, node: str, before: ir.Node) -> ir.Value:
        """A[:, :width] x, (..., rank)."""
        shape = (*leading(x), self.rank)
        if self.dtype in ("fp32", "fp16"):
            weight = self._float_rows(weaver, _A, self.projections.a.T, (0, width), before)
            return weaver.node("MatMul", [x, weight], f"{node}/A/MatMul", shape, before=before)
        cuts = [0, *(cut for cut in self.widths if cut <= width)]
        pieces = self._split(weaver, x, cuts, node, before)
        total: ir.Value | None = None
        for (start, stop), piece in zip(pairwise(cuts), pieces, strict=True):
            name = f"{node}/A" if len(pieces) == 1 else f"{node}/A[{start}:{stop}]"
            blocks = self._blocks(f"{_A}[{start}:{stop}]", self.projections.a[:, start:stop])
            product = blocks.product(weaver, piece, f"{_A}[{start}:{stop}]", name, before)
            total = (
                product
                if total is None
                else weaver.node("Add", [total, product], f"{name}/Add", shape, before=before)
            )
        assert total is not None
        return total

    def up(self, weaver: Weaver, x: ir.Value, rows: tuple[int, int], node: str, before: ir.Node) -> ir.Value:
        """B[start:stop] x, (..., stop - start)."""
        if self.dtype in ("fp32", "fp16"):
            weight = self._float_rows(weaver, _B, self.projections.b, rows, before)
            shape = (*leading(x), rows[1] - rows[0])
            return weaver.node(
                "FusedMatMul",
                [x, weight],
                f"{node}/FusedMatMul",
                shape,
                before=before,
                domain=MICROSOFT,
                transB=1,
            )
        return self._blocks(_B, self.projections.b).rows_product(weaver, x, _B, rows, node, before)

    def _blocks(self, name: str, matrix: Float32) -> Blocks:
        if name not in self._quantized:
            self._quantized[name] = Blocks(quantize(matrix, _BITS[self.dtype], _BLOCK, symmetric=True))
        return self._quantized[name]

    def _float_rows(
        self, weaver: Weaver, name: str, matrix: Float32, rows: tuple[int, int], before: ir.Node
    ) -> ir.Value:
        """Rows of a float matrix as float32, whatever they are stored as."""
        if self.dtype == "fp32":
            return weaver.rows(name, matrix, rows, overridable=True)
        key = f"{name}[{rows[0]}:{rows[1]}].float32"
        if key not in self._widened:
            stored = weaver.rows(f"{name}.fp16", matrix.astype(np.float16), rows)
            shape = (rows[1] - rows[0], matrix.shape[1])
            self._widened[key] = weaver.node(
                "Cast", [stored], key, shape, before=before, to=ir.DataType.FLOAT
            )
        return self._widened[key]

    def _split(
        self, weaver: Weaver, x: ir.Value, cuts: list[int], node: str, before: ir.Node
    ) -> list[ir.Value]:
        """x cut at the given places along its last axis."""
        if len(cuts) == 2:
            return [x]
        pieces = []
        for start, stop in pairwise(cuts):
            ends = [weaver.initializer(f"vera.at.{at}", np.array([at], np.int64)) for at in (start, stop, -1)]
            shape = (*leading(x), stop - start)
            name = f"{node}/x[{start}:{stop}]"
            pieces.append(weaver.node("Slice", [x, *ends], name, shape, before=before))
        return pieces
