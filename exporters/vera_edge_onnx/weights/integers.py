"""A checkpoint's own integers (GPTQ, AWQ, compressed-tensors) as `MatMulNBits` blocks, not quantized again.

All store `scale * (code - zero)` with one scale for a group of inputs, and so does `MatMulNBits`; a group
longer than its blocks becomes several with the same scale. Act-order lets any inputs share a group: the
weight's columns are then put in the order of their groups, and x likewise while the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vera_edge.errors import TargetError
from vera_edge.formats.affine import Integers
from vera_edge.formats.blocks import IntBlocks, block_filling
from vera_edge.storage.files import sha256_bytes
from vera_edge_onnx.graph.weaver import Weaver, leading
from vera_edge_onnx.weights.linear import Blocks, StoredProduct, join_blocks

Order = npt.NDArray[np.int64]
INSTEAD = "export with --weights int4 or int8 instead of same"


@dataclass(frozen=True, eq=False)
class Reordered:
    """Blocks whose inputs lie in another order: column i belongs to input `order[i]` of x."""

    blocks: Blocks
    order: Order

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        # Named by content: layers that share an order (q, k, v) then share the reordered x in a runtime.
        name = f"order.{sha256_bytes(self.order.astype('<i8').tobytes())[:16]}"
        shape = (*leading(x), self.order.size)
        order = weaver.initializer(name, self.order)
        found = weaver.node("Gather", [x, order], f"{node}/Gather", shape, before=before, axis=-1)
        return self.blocks.product(weaver, found, weight, node, before)


@dataclass(frozen=True, eq=False)
class Stacked:
    """Weights stacked by rows that can't be one product: other bits, blocks or orders.

    parts: (rows, linear) each.
    """

    parts: tuple[tuple[int, StoredProduct], ...]

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        products, start = [], 0
        for size, linear in self.parts:
            rows = f"[{start}:{start + size}]"
            products.append(linear.product(weaver, x, f"{weight}{rows}", f"{node}{rows}", before))
            start += size
        return weaver.node("Concat", products, f"{node}/Concat", (*leading(x), start), before=before, axis=-1)


def of_checkpoint(found: Integers, module: str) -> tuple[IntBlocks, Order | None]:
    """A weight's own codes in blocks, and the order of its inputs where act-order changed it.

    Raises TargetError when `MatMulNBits` can't hold them as they are.
    """
    grid, bits = found.grid, found.bits
    (out, inside), groups = grid.codes.shape, grid.scales.shape[1]
    index = np.arange(inside) * groups // inside if found.index is None else found.index
    sizes = np.bincount(index, minlength=groups)
    # The group that doesn't fill its blocks, if there is one, goes last.
    block = block_filling(sizes)
    if block is None and len(set(sizes)) == 1:
        raise TargetError(
            f"{module} has groups of {sizes[0]} inputs, which no whole number of ONNX Runtime's blocks (16, "
            f"32, 64, 128, 256) fills; {INSTEAD}"
        )
    if block is None:
        raise TargetError(
            f"the groups of {module} (its g_idx) differ in size, so its inputs can't be sorted into "
            f"blocks; {INSTEAD}"
        )
    ragged = np.flatnonzero(sizes % block)
    chosen = np.concatenate([np.setdiff1d(np.flatnonzero(sizes), ragged), ragged])
    rank = np.empty(groups, np.int64)
    rank[chosen] = np.arange(chosen.size)
    order = np.argsort(rank[index], kind="stable")
    blocks = -(-sizes[chosen] // block)
    codes = np.zeros((out, blocks.sum() * block), np.uint8)
    codes[:, :inside] = grid.codes[:, order]
    scales = np.repeat(grid.scales[:, chosen], blocks, axis=1)
    zeros = np.repeat(grid.zeros[:, chosen].astype(np.uint8), blocks, axis=1)
    whole = IntBlocks(bits, inside, codes.reshape(out, -1, block), scales, zeros)
    return whole, None if np.array_equal(order, np.arange(inside)) else order


def join(parts: Sequence[tuple[IntBlocks, Order | None]]) -> StoredProduct:
    """Weights stacked by rows, in one product where they are of one kind and order."""
    first, order = parts[0]
    alike = {(part.bits, part.block) for part, _ in parts} == {(first.bits, first.block)} and all(
        np.array_equal(other, order) if order is not None and other is not None else other is order
        for _, other in parts
    )
    if not alike:
        return Stacked(tuple((part.shape[0], join([(part, own)])) for part, own in parts))
    whole = join_blocks([Blocks(part) for part, _ in parts]).form
    # Zero points that are all in the middle needn't be stored: that is what symmetric means.
    if whole.zero_points is not None and (whole.zero_points == 1 << (whole.bits - 1)).all():
        whole = replace(whole, zero_points=None)
    return Blocks(whole) if order is None else Reordered(Blocks(whole), order)
