"""A linear's stored weight that is made when it's woven into the graph, and not kept in memory.

Where an earlier run has finished it, its initializers are there, and only its form is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from vera_edge.formats.blocks import IntBlocks
from vera_edge_onnx.graph.weaver import Weaver
from vera_edge_onnx.weights.linear import Blocks, Bnb4Product, StoredProduct


@dataclass(frozen=True, eq=False)
class Deferred:
    """What `make` gives, when it's asked for."""

    make: Callable[[], StoredProduct]

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        spool, known = weaver.spool, set(weaver.model.graph.initializers)
        if spool is None:
            return self.make().product(weaver, x, weight, node, before)
        noted = spool.noted(weight)
        if noted is not None and spool.has(noted["initializers"]):
            found = _of_outline(noted).product(weaver, x, weight, node, before)
            if sorted(weaver.model.graph.initializers.keys() - known) != noted["initializers"]:
                raise RuntimeError(f"{weight} was made of other initializers before")
            return found
        linear = self.make()
        found = linear.product(weaver, x, weight, node, before)
        made = sorted(weaver.model.graph.initializers.keys() - known)
        outline = _outline(linear)
        if outline is not None and spool.has(made):
            spool.note(weight, outline | {"initializers": made})
        return found


def _outline(linear: StoredProduct) -> dict[str, Any] | None:
    """A weight without its values; None for a kind that isn't worth it or whose nodes depend on them."""
    if isinstance(linear, Blocks):
        form = linear.form
        zeros = None if form.zero_points is None else list(form.zero_points.shape)
        codes, scales = list(form.codes.shape), list(form.scales.shape)
        return {
            "bits": form.bits, "in": form.in_features, "codes": codes, "scales": scales, "zeros": zeros
        }  # fmt: skip
    if isinstance(linear, Bnb4Product):
        return {
            "quant_type": linear.quant_type,
            "shape": list(linear.shape),
            "blocksize": linear.blocksize,
            "packed": list(linear.packed.shape),
            "absmax": list(linear.absmax.shape),
        }
    return None


def _of_outline(outline: Mapping[str, Any]) -> StoredProduct:
    """A weight of this form, of zeros that take no memory."""

    def zeros(shape: list[int], dtype: type[np.generic]) -> Any:
        return np.broadcast_to(dtype(), shape)

    if "bits" in outline:
        return Blocks(
            IntBlocks(
                outline["bits"],
                outline["in"],
                zeros(outline["codes"], np.uint8),
                zeros(outline["scales"], np.float32),
                None if outline["zeros"] is None else zeros(outline["zeros"], np.uint8),
            )
        )
    out, inside = outline["shape"]
    packed, absmax = zeros(outline["packed"], np.uint8), zeros(outline["absmax"], np.float32)
    return Bnb4Product((out, inside), outline["quant_type"], outline["blocksize"], packed, absmax)
