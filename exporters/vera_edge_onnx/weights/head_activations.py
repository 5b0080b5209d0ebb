"""What the output head reads, rounded to 16 bits instead of 8.

At accuracy level 4 `MatMulNBits` rounds what it reads to int8, by blocks of inputs. On SmolLM2 a third of
what that costs all integer products together is the head's. So the head reads two rows for one: `x` rounded
as the kernel rounds it, which the kernel then leaves as it is, and what that rounding left over, whose own
rounding is some 250 times finer: `W x = W round(x) + W (x - round(x))`. The weights are read once for both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from vera_edge_onnx.graph.weaver import Weaver, leading

KINDS = INT8, INT16 = "int8", "int16"
_LEVELS = 127  # of int8, to either side of zero: what the largest magnitude of a block becomes
_SMALLEST = 1e-30  # divides a block of zeros
_NODE = "/lm_head/int16"


def two_rows(weaver: Weaver, x: ir.Value, width: int, block: int, before: ir.Node) -> ir.Value:
    """x (..., width) float32 -> (..., 2, width): rounded to int8 in blocks, and what is left over.

    block: divides the width, and is that of the product which reads the rows.
    """
    axes, count = leading(x), width // block

    def node(op: str, name: str, inputs: list[ir.Value], *sizes: int, **attributes: Any) -> ir.Value:
        return weaver.node(op, inputs, f"{_NODE}/{name}", (*axes, *sizes), before=before, **attributes)

    def reshaped(value: ir.Value, name: str, *sizes: int) -> ir.Value:
        shape = np.array([0] * len(axes) + list(sizes), np.int64)
        return node("Reshape", name, [value, weaver.initializer(f"{_NODE}/{name}.shape", shape)], *sizes)

    def scalar(name: str, value: float) -> ir.Value:
        return weaver.initializer(f"{_NODE}/{name}", np.array(value, np.float32))

    parts = reshaped(x, "blocks", count, block)
    last = weaver.initializer(f"{_NODE}/last", np.array([-1], np.int64))
    magnitude = node("Abs", "magnitude", [parts], count, block)
    largest = node("ReduceMax", "largest", [magnitude, last], count, 1, keepdims=1)
    largest = node("Max", "nonzero", [largest, scalar("smallest", _SMALLEST)], count, 1)
    scale = node("Div", "scale", [largest, scalar("levels", _LEVELS)], count, 1)
    codes = node("Round", "codes", [node("Div", "scaled", [parts, scale], count, block)], count, block)
    rounded = node("Mul", "rounded", [codes, scale], count, block)
    rest = node("Sub", "rest", [parts, rounded], count, block)
    both = node("Concat", "both", [rounded, rest], 2 * count, block, axis=len(axes))
    return reshaped(both, "rows", 2, width)


def summed(weaver: Weaver, products: ir.Value, out: int, before: ir.Node) -> ir.Value:
    """The products of both rows, (..., 2, out), as one: (..., out)."""
    axes = leading(products)[:-1]
    second = weaver.initializer(f"{_NODE}/pair", np.array([len(axes)], np.int64))
    return weaver.node(
        "ReduceSum", [products, second], f"{_NODE}/sum", (*axes, out), before=before, keepdims=0
    )
