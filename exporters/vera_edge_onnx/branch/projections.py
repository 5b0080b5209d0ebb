"""The shared projections A and B as a graph stores them: each column and row once for the whole model.

A layer reads the first columns of A (rank, in_max) and some rows of B (out_max, rank). In fp32, A is stored
transposed, so that both are rows, and every width is a range of the same bytes. Quantized, the first columns
aren't a range; nodes on constants cut them out, which a runtime folds when it loads the graph.

The fp32 projections are overridable graph inputs. ONNX Runtime would otherwise repack a constant for every
product that reads it, 2 for each layer: more memory than the model's own weights, and no longer in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from vera_edge.adapters.projection import Projections
from vera_edge.arrays import Float32
from vera_edge.errors import PlanError
from vera_edge.formats.blocks import BLOCK_OF_A, block_of_b, quantize
from vera_edge_onnx.graph.weaver import MICROSOFT, Weaver, leading
from vera_edge_onnx.weights.linear import Blocks

DTYPES = ("fp32", "fp16", "int8", "int4")
_BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
_A, _B = "vera.A", "vera.B"


@dataclass
class StoredProjections:
    """A and B of one graph. `widest`: input width of the widest layer that reads A."""

    projections: Projections
    dtype: str
    widest: int
    _quantized: dict[str, Blocks] = field(default_factory=dict)
    _widened: dict[str, ir.Value] = field(default_factory=dict)
    _narrow: dict[int, list[ir.Value]] = field(default_factory=dict)

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
        if width == self.widest or width % 2:  # half a byte can't be cut off
            name = _A if width == self.widest else f"{_A}[:{width}]"
            blocks = self._blocks(name, self.projections.a[:, :width], BLOCK_OF_A)
            return blocks.product(weaver, x, name, f"{node}/A", before)
        whole = self._blocks(_A, self.projections.a[:, : self.widest], BLOCK_OF_A)
        count = -(-width // BLOCK_OF_A)
        narrow = Blocks(replace(whole.form, in_features=width, codes=whole.form.codes[:, :count]))
        if width not in self._narrow:
            self._narrow[width] = _columns(weaver, whole, narrow, before)
        return narrow.multiply(weaver, x, self._narrow[width], self.rank, f"{node}/A", before)

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
        return self._blocks(_B, self.projections.b, block_of_b(self.rank)).rows_product(
            weaver, x, _B, rows, node, before
        )

    def _blocks(self, name: str, matrix: Float32, block: int) -> Blocks:
        if name not in self._quantized:
            self._quantized[name] = Blocks(quantize(matrix, _BITS[self.dtype], block, symmetric=True))
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


def _columns(weaver: Weaver, whole: Blocks, narrow: Blocks, before: ir.Node) -> list[ir.Value]:
    """Codes and scales of the first columns of A, the last block filled up with zeros."""
    form, width, name = whole.form, narrow.shape[1], f"{_A}[:{narrow.shape[1]}]"
    out, count, block = narrow.form.codes.shape
    codes, scales = (weaver.initializer(*stored) for stored in whole.arrays(_A).items())
    taken, size = width * form.bits // 8, block * form.bits // 8

    def node(
        op: str, value: ir.Value, constants: Mapping[str, Any], to: str, shape: tuple[int, ...]
    ) -> ir.Value:
        inputs = [weaver.initializer(f"{to}.{key}", np.array(item)) for key, item in constants.items()]
        assert value.dtype is not None
        return weaver.node(op, [value, *inputs], to, shape, before=before, dtype=value.dtype)

    flat = node("Reshape", codes, {"shape": [out, -1]}, f"{name}/flat", (out, form.codes.shape[1] * size))
    ends = {"starts": [0], "ends": [taken], "axes": [1]}
    cut = node("Slice", flat, ends, f"{name}/Slice", (out, taken))
    if missing := count * size - taken:
        zeros = np.uint8(0x80 if form.bits == 8 else 0x88)
        padding = {"pads": [0, 0, 0, missing], "value": zeros}
        cut = node("Pad", cut, padding, f"{name}/Pad", (out, count * size))
    shaped = node("Reshape", cut, {"shape": [out, count, size]}, f"{name}/codes", (out, count, size))
    few = node("Slice", scales, ends | {"ends": [count]}, f"{name}/scales", (out, count))
    return [shaped, few]
