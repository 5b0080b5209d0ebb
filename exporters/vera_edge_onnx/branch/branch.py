"""Weaves side-branches into a graph: VeRA's, h = W x + diag(b) B diag(d) A x, LoRA's, and factors.

The base layer keeps its weight. `A x` is computed once for all layers that read the same x, and layers of one
size among them share one product with B. Beside the products it is the number of nodes and inputs that costs.
Formula: Kopiczko et al., VeRA, ICLR 2024, https://arxiv.org/abs/2310.11454.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from vera_edge.adapters.projection import Projections
from vera_edge.exporting.branch_form import PAIRS, VECTORS
from vera_edge.exporting.branch_inputs import BranchInputs
from vera_edge_onnx.branch.gains import Gains
from vera_edge_onnx.branch.pairs import LoraBranches
from vera_edge_onnx.branch.projections import StoredProjections
from vera_edge_onnx.branch.vectors import VectorInputs
from vera_edge_onnx.graph.groups import Group, groups
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.weaver import Weaver, leading
from vera_edge_onnx.weights.linear import StoredProduct


@dataclass
class Branches:
    """The side-branches of one graph, added group by group."""

    weaver: Weaver
    stored: StoredProjections
    vectors: VectorInputs
    _down: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def delta(self, group: Group) -> ir.Value:
        """What the adapter adds to the products of the group's sites, side by side: (..., width)."""
        node, down = f"{group.name}/vera", self._down_product(group)
        up = self._stacked(group, down) if group.stacked else self._side_by_side(group, down)
        scale = self.vectors.lambda_b[group.name]
        return self._node("Mul", [up, scale], f"{node}/Mul", (*leading(down), group.width), group)

    def _down_product(self, group: Group) -> ir.Value:
        """A x, (..., rank)."""
        x, width = group.sites[0].input, group.sites[0].in_features
        if x not in self._down:
            self._down[x] = self.stored.down(self.weaver, x, width, f"{group.name}/vera", group.node)
        return self._down[x]

    def _stacked(self, group: Group, down: ir.Value) -> ir.Value:
        """B diag(d) A x of all parts by one product, (..., parts * rows): the weight is read once."""
        node, axes = f"{group.name}/vera", leading(down)
        count, rank, rows = len(group.parts), self.stored.rank, (0, group.parts[0].size)
        wide = self._node("Concat", [down] * count, f"{node}/repeat", (*axes, count * rank), group, axis=-1)
        scale = self.vectors.lambda_d[group.name]
        scaled = self._node("Mul", [wide, scale], f"{node}/lambda_d", (*axes, count * rank), group)
        stacked = self._reshape(scaled, f"{node}/stack", (*axes, count, rank), group)
        up = self.stored.up(self.weaver, stacked, rows, f"{node}/B", group.node)
        return self._reshape(up, f"{node}/unstack", (*axes, count * rows[1]), group)

    def _side_by_side(self, group: Group, down: ir.Value) -> ir.Value:
        """B diag(d) A x, part by part, (..., width)."""
        node, axes = f"{group.name}/vera", leading(down)
        scaled, ups = {}, []
        for module in group.modules:
            scale, name = self.vectors.lambda_d[module], module.rsplit(".", 1)[-1]
            shape = (*axes, self.stored.rank)
            scaled[module] = self._node("Mul", [down, scale], f"{node}/{name}/lambda_d", shape, group)
        for part in group.parts:
            name, rows = part.module.rsplit(".", 1)[-1], (part.start, part.stop)
            ups.append(self.stored.up(self.weaver, scaled[part.module], rows, f"{node}/{name}/B", group.node))
        if len(ups) == 1:
            return ups[0]
        return self._node("Concat", ups, f"{node}/up", (*axes, group.width), group, axis=-1)

    def _reshape(
        self, value: ir.Value, name: str, shape: tuple[int | str | None, ...], group: Group
    ) -> ir.Value:
        """Other axes behind the leading ones of x, which stay (0 in ONNX's terms)."""
        kept = len(leading(group.sites[0].input))
        sizes = [0] * kept + [size for size in shape[kept:] if isinstance(size, int)]
        constant = self.weaver.initializer(
            f"vera.shape.{'.'.join(map(str, sizes))}", np.array(sizes, np.int64)
        )
        return self._node("Reshape", [value, constant], name, shape, group)

    def _node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: tuple[int | str | None, ...],
        group: Group,
        **attributes: Any,
    ) -> ir.Value:
        return self.weaver.node(op, inputs, name, shape, before=group.node, **attributes)


def weave(
    weaver: Weaver,
    sites: Sequence[Site],
    bases: Mapping[str, StoredProduct],
    inputs: BranchInputs,
    projections: Projections | None,
    dtype: str,
    vector_dtype: str = "float32",
) -> None:
    """Give every site its stored weight, and a side-branch where one of its modules is adapted.

    bases: the stored form of a site's weight by site name; a site that isn't named keeps its float weight.
    inputs: which modules take what of an adapter; none when it is merged. projections: VeRA's, stored as
    `dtype`: "fp32", "fp16", "int8" or "int4". vector_dtype: of all inputs, see `VectorInputs.of`.
    """
    deltas, gains = dict[str, list[ir.Value]](), Gains.of(weaver, sites, inputs, vector_dtype)
    for kind, found, delta_of in _kinds(weaver, sites, inputs, projections, dtype, vector_dtype):
        for group in found:
            for site, delta in zip(group.sites, _parts(weaver, group, delta_of(group), kind), strict=True):
                deltas.setdefault(site.name, []).append(delta)
    for site in sites:
        if site.name not in bases and site.name not in deltas and not gains.changes(site):
            continue
        total = base = _base(weaver, site, bases, gains.read(site))
        shape = (*leading(base), site.out_features)
        for number, delta in enumerate([*deltas.get(site.name, []), *gains.added(site, base)]):
            name = f"{site.name}/vera/Add" if not number else f"{site.name}/vera/Add.{number}"
            total = weaver.node("Add", [total, delta], name, shape, before=site.node)
        weaver.take_over(site.node, total)


def _kinds(
    weaver: Weaver,
    sites: Sequence[Site],
    inputs: BranchInputs,
    projections: Projections | None,
    dtype: str,
    vector_dtype: str,
) -> Iterator[tuple[str, Sequence[Group], Callable[[Group], ir.Value]]]:
    """The kinds of sums that there are, the groups that take them, and what makes one of a group."""
    vectors = groups(sites, inputs.sizes(VECTORS))
    if vectors and projections is not None:
        widest = max(group.sites[0].in_features for group in vectors)
        stored = StoredProjections(projections, dtype, widest)
        cut = VectorInputs.of(weaver, vectors, stored.rank, vector_dtype)
        yield "vera", vectors, Branches(weaver, stored, cut).delta
    if pairs := groups(sites, inputs.sizes(PAIRS)):
        yield "lora", pairs, LoraBranches(weaver, inputs, vector_dtype).delta


def _parts(weaver: Weaver, group: Group, delta: ir.Value, kind: str) -> Sequence[ir.Value]:
    """The delta cut up for the group's sites."""
    if len(group.sites) == 1:
        return [delta]
    widths = [site.out_features for site in group.sites]
    names = [f"{site.name}/{kind}/part" for site in group.sites]
    return weaver.split(delta, widths, f"{group.name}/{kind}/Split", names, before=group.node)


def _base(weaver: Weaver, site: Site, bases: Mapping[str, StoredProduct], x: ir.Value) -> ir.Value:
    """The site's own product with `x`, as a value of its own."""
    if site.name in bases:
        return bases[site.name].product(weaver, x, site.weight_name, site.name, site.node)
    weight = site.node.inputs[1]
    assert weight is not None
    shape = (*leading(site.node.outputs[0]), site.out_features)
    return weaver.node("MatMul", [x, weight], f"{site.name}/base/MatMul", shape, before=site.node)
