"""int8 products in ONNX's own operators, which other kernels of ONNX Runtime than its CPU's take too.

A weight has one scale for each output, x is rounded to uint8. Dynamic: to the range that it has in that run
(DynamicQuantizeLinear), times the codes (MatMulInteger). Static: to a range that is known beforehand, written
as pairs of QuantizeLinear and DequantizeLinear around a float product. ONNX Runtime fuses both to
MatMulIntegerToFloat. What reads the same x shares its codes.

x86 without VNNI adds the products of two neighbouring inputs in 16 bits (device/runtime/int8_products.py).
So scales are as large as it takes for any two neighbours of a row to fit. Codes that are there already and
don't fit are stored as uint8 with 128 for zero, whose products all processors add in 32 bits: the same
values, slower.
Operators: https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vera_edge.arrays import Float32
from vera_edge.device.runtime.int8_products import PAIR, pairs_overflow
from vera_edge.formats.bnb8 import Int8, Int8Weight
from vera_edge.formats.weight import row_chunks
from vera_edge_onnx.graph.weaver import Dimension, Weaver, leading

_TOP = 255  # of uint8
_MIDDLE = np.uint8(128)


def _greatest_pair(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The greatest sum of two neighbours of one sign in each row, (rows,): 0 for rows of one value."""
    if rows.shape[1] < 2:
        return np.zeros(rows.shape[0])
    signs = (np.maximum(rows, 0), np.maximum(-rows, 0))
    found: npt.NDArray[np.float64] = np.max(
        [(part[:, :-1] + part[:, 1:]).max(axis=1) for part in signs], axis=0
    )
    return found


class Span(NamedTuple):
    """The lowest and the highest value of an activation that its codes hold; what lies outside is clipped."""

    low: float
    high: float

    def grid(self) -> tuple[np.float32, np.uint8]:
        """Scale and zero point of uint8 codes, zero being one of the values, as QuantizeLinear takes them."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32((high - low) / _TOP) or np.float32(1)
        return scale, np.uint8(np.clip(np.rint(-low / scale), 0, _TOP))


@dataclass(frozen=True, eq=False)
class RowCodes:
    """A weight as int8 codes (out, in) and the float32 scale of each row (out,)."""

    codes: npt.NDArray[np.int8]
    scales: Float32

    @classmethod
    def of(cls, parts: Sequence[Int8Weight]) -> RowCodes:
        """Weights stacked by rows."""
        scales = [part.scales / np.float32(127) for part in parts]
        return cls(np.concatenate([part.codes for part in parts]), np.concatenate(scales))

    @classmethod
    def nearest(cls, matrix: Float32) -> RowCodes:
        """A float matrix rounded to nearest, for what is only looked up: its products may overflow."""
        return cls.of([Int8().quantize(matrix, {})])

    @classmethod
    def fitting(cls, matrix: Float32) -> RowCodes:
        """A float matrix (out, in) rounded to nearest, to scales with which no product overflows."""
        codes, scales = np.empty(matrix.shape, np.int8), np.empty(matrix.shape[0], np.float32)
        for start, stop in row_chunks((matrix.shape[0], matrix.shape[1])):
            part = matrix[start:stop].astype(np.float64)
            # Rounding adds half a step to each of the two, hence one less than the most that fits.
            steps = np.maximum(np.abs(part).max(axis=1) / 127, _greatest_pair(part) / (PAIR - 1))
            steps[steps < np.finfo(np.float32).tiny] = 0
            scales[start:stop] = steps
            divisors = np.where(steps == 0, np.inf, scales[start:stop])
            codes[start:stop] = np.rint(part / divisors[:, None])
        return cls(codes, scales)

    @classmethod
    def stacked(cls, parts: Sequence[RowCodes]) -> RowCodes:
        """Rows below each other."""
        return cls(
            np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts])
        )

    def values(self, weaver: Weaver, weight: str) -> tuple[ir.Value, ir.Value, np.generic]:
        """Codes (in, out) as a product takes them, scales (out,), and the code of zero.

        That is 0 for int8 and written all the same: without it `session.x64quantprecision` does nothing, or
        ends the process, in ONNX Runtime before 1.30.
        """
        scales = weaver.initializer(f"{weight}.scales", self.scales)
        if not pairs_overflow(self.codes.T):
            return weaver.initializer(f"{weight}.int8", self.codes.T), scales, np.int8(0)
        shifted = (self.codes.T.astype(np.int16) + _MIDDLE).astype(np.uint8)
        return weaver.initializer(f"{weight}.uint8", shifted), scales, _MIDDLE


@dataclass(frozen=True, eq=False)
class Dynamic:
    """int8 rows times an x that is rounded to the range of its values, those of the whole batch.

    levels: what x is divided by first (in,); the rows are of a weight that was multiplied by it.
    """

    rows: RowCodes
    levels: Float32 | None = None

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        codes, scales, middle = self.rows.values(weaver, weight)
        out, inside = self.rows.codes.shape
        x = _levelled(weaver, x, self.levels, weight, node, before)
        rounded, scale, zero = _rounded(weaver, x, inside, node, before)
        shape = (*leading(x), out)
        summed = weaver.node(
            "MatMulInteger",
            [rounded, codes, zero, weaver.initializer(f"{weight}.zero_point", np.array(middle))],
            f"{node}/MatMulInteger",
            shape,
            before=before,
            dtype=ir.DataType.INT32,
        )
        wide = weaver.node("Cast", [summed], f"{node}/Cast", shape, before=before, to=ir.DataType.FLOAT)
        both = weaver.node("Mul", [scale, scales], f"{node}/scales/Mul", (out,), before=before)
        return weaver.node("Mul", [wide, both], f"{node}/Mul", shape, before=before)


def _rounded(weaver: Weaver, x: ir.Value, width: int, node: str, before: ir.Node) -> list[ir.Value]:
    """Codes of x, their scale and zero point."""
    made = _reader(x, "DynamicQuantizeLinear")
    if made is not None:
        return list(made.outputs)
    name = f"{node}/DynamicQuantizeLinear"
    outputs: dict[str, tuple[Sequence[Dimension], ir.DataType]] = {
        f"{name}/codes": ((*leading(x), width), ir.DataType.UINT8),
        f"{name}/scale": ((), ir.DataType.FLOAT),
        f"{name}/zero_point": ((), ir.DataType.UINT8),
    }
    return weaver.outputs("DynamicQuantizeLinear", [x], name, outputs, before=before)


@dataclass(frozen=True, eq=False)
class Static:
    """int8 rows times an x that is rounded to a range known beforehand; `levels` as for Dynamic.

    span: of x divided by the levels.
    """

    rows: RowCodes
    levels: Float32 | None
    span: Span

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        codes, scales, middle = self.rows.values(weaver, weight)
        out, inside = self.rows.codes.shape
        x = _levelled(weaver, x, self.levels, weight, node, before)
        wide = weaver.node(
            "DequantizeLinear",
            [codes, scales, weaver.initializer(f"{weight}.zero_points", np.full(out, middle))],
            f"{node}/weight/DequantizeLinear",
            (inside, out),
            before=before,
            axis=1,
        )
        inputs = [self._rounded(weaver, x, weight, node, before), wide]
        return weaver.node("MatMul", inputs, f"{node}/MatMul", (*leading(x), out), before=before)

    def _rounded(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        """x on its uint8 grid, as float32."""
        made = _reader(x, "QuantizeLinear")
        if made is not None:
            (again,) = made.outputs[0].consumers()
            return again.outputs[0]
        scale, zero = self.span.grid()
        grid = [
            weaver.initializer(f"{weight}.x.scale", np.array(scale)),
            weaver.initializer(f"{weight}.x.zero_point", np.array(zero)),
        ]
        shape, name = (*leading(x), self.rows.codes.shape[1]), f"{node}/x/QuantizeLinear"
        codes = weaver.node("QuantizeLinear", [x, *grid], name, shape, before=before, dtype=ir.DataType.UINT8)
        return weaver.node(
            "DequantizeLinear", [codes, *grid], f"{node}/x/DequantizeLinear", shape, before=before
        )


def _levelled(
    weaver: Weaver, x: ir.Value, levels: Float32 | None, weight: str, node: str, before: ir.Node
) -> ir.Value:
    """x with its channels divided by `levels`."""
    if levels is None:
        return x
    name = "levels/Mul"
    made = next((user for user in x.consumers() if (user.name or "").endswith(f"/{name}")), None)
    if made is not None:
        return made.outputs[0]
    factors = weaver.initializer(f"{weight}.x.levels", np.float32(1) / levels)
    return weaver.node("Mul", [x, factors], f"{node}/{name}", (*leading(x), levels.size), before=before)


def _reader(x: ir.Value, op: str) -> ir.Node | None:
    """The node of this kind that reads x already."""
    return next((node for node in x.consumers() if node.op_type == op), None)


def look_up(weaver: Weaver, gather: ir.Node, rows: RowCodes, name: str) -> None:
    """Replace a Gather of a float table by one of int8 rows, each taken with its scale.

    rows: of the table (vocabulary, hidden). name: the table's.
    """
    ids, node = gather.inputs[1], name.removesuffix(".weight")
    assert ids is not None
    codes = weaver.initializer(f"{name}.int8", rows.codes)
    scales = weaver.initializer(f"{name}.scales", rows.scales[:, None])
    axes = leading(gather.outputs[0])
    shape, one = (*axes, rows.codes.shape[1]), (*axes, 1)
    taken = weaver.node(
        "Gather", [codes, ids], f"{node}/Gather", shape, before=gather, dtype=ir.DataType.INT8
    )
    wide = weaver.node("Cast", [taken], f"{node}/Cast", shape, before=gather, to=ir.DataType.FLOAT)
    scale = weaver.node("Gather", [scales, ids], f"{node}/scales/Gather", one, before=gather)
    weaver.take_over(gather, weaver.node("Mul", [wide, scale], f"{node}/Mul", shape, before=gather))
