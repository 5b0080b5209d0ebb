"""A linear whose product is corrected: a low-rank term and a bias (vera_edge/requantize/correction.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vera_edge.arrays import Float32
from vera_edge.errors import PlanError
from vera_edge.requantize.correction import Correction
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.weaver import Weaver, leading
from vera_edge_onnx.weights.linear import StoredProduct


@dataclass(frozen=True, eq=False)
class Corrected:
    """`linear` and what its output gets besides; the low-rank term is stored in float16."""

    linear: StoredProduct
    correction: Correction
    out: int

    def product(self, weaver: Weaver, x: ir.Value, weight: str, node: str, before: ir.Node) -> ir.Value:
        total = self.linear.product(weaver, x, weight, node, before)
        found, name, shape = self.correction, f"{node}/correction", (*leading(x), self.out)
        if found.up is not None and found.down is not None:
            inner = (*leading(x), found.down.shape[0])
            down = weaver.widened(f"{weight}.low_rank_down", found.down.T, before)
            narrow = weaver.node("MatMul", [x, down], f"{name}/down/MatMul", inner, before=before)
            up = weaver.widened(f"{weight}.low_rank_up", found.up.T, before)
            term = weaver.node("MatMul", [narrow, up], f"{name}/up/MatMul", shape, before=before)
            total = weaver.node("Add", [total, term], f"{name}/Add", shape, before=before)
        if found.bias is not None:
            bias = weaver.initializer(f"{weight}.bias_correction", found.bias)
            total = weaver.node("Add", [total, bias], f"{name}/bias/Add", shape, before=before)
        return total


def correct(
    stored: Mapping[str, StoredProduct], sites: Sequence[Site], corrections: Mapping[str, Correction]
) -> dict[str, StoredProduct]:
    """`stored` with the corrections of its sites' modules.

    Raises PlanError when one has no place: its layer's weight isn't in the graph as it was rounded.
    """
    found, placed = dict(stored), set()
    for site in sites:
        modules = {part.module for part in site.parts} & corrections.keys()
        if modules and site.name in stored:
            found[site.name] = Corrected(stored[site.name], _joined(site, corrections), site.out_features)
            placed |= modules
    if lost := sorted(corrections.keys() - placed):
        raise PlanError(
            f"{lost[0]} can't be given a low-rank term or a bias: the graph doesn't hold its weight as it "
            "was rounded; leave them out of --recover"
        )
    return found


def _joined(site: Site, corrections: Mapping[str, Correction]) -> Correction:
    """The corrections of a site's parts as one: biases end to end, up block by block beside the diagonal."""
    parts = [(part, corrections.get(part.module, Correction())) for part in site.parts]
    ups: list[tuple[int, Float32]] = []
    downs: list[Float32] = []
    biases, start = np.zeros(site.out_features, np.float32), 0
    for part, found in parts:
        if found.up is not None and found.down is not None:
            ups.append((start, found.up[part.start : part.stop]))
            downs.append(found.down)
        if found.bias is not None:
            biases[start : start + part.size] = found.bias[part.start : part.stop]
        start += part.size
    bias = biases if any(found.bias is not None for _, found in parts) else None
    if not downs:
        return Correction(bias=bias)
    up, column = np.zeros((site.out_features, sum(len(down) for down in downs)), np.float32), 0
    for row, block in ups:
        up[row : row + block.shape[0], column : column + block.shape[1]] = block
        column += block.shape[1]
    return Correction(up, np.concatenate(downs), bias)
