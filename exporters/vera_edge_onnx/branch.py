"""Weaves VeRA side-branches into a graph: h = W x + diag(b) B diag(d) A x.

The base layer keeps its weight. `A x` is computed once for all layers that read the same x. Vectors are graph
inputs with zeros for defaults, so the graph without an adapter is the base itself.
Formula: Kopiczko et al., VeRA, ICLR 2024, https://arxiv.org/abs/2310.11454.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from vera_edge.packing import vector_names
from vera_edge.projection import Projections
from vera_edge_onnx.linear import Linear
from vera_edge_onnx.projections import StoredProjections
from vera_edge_onnx.sites import Part, Site
from vera_edge_onnx.weaver import Range, Weaver, leading


@dataclass
class Branches:
    """The side-branches of one graph, added site by site in graph order.

    sizes: output features of each adapted module.
    """

    weaver: Weaver
    stored: StoredProjections
    sizes: Mapping[str, int]
    _down: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _vectors: list[ir.Value] = field(default_factory=list)

    def touches(self, site: Site) -> bool:
        return any(part.module in self.sizes for part in site.parts)

    def add(self, site: Site, base: ir.Value) -> ir.Value:
        """`base`, the site's own product, plus what the adapter adds to it."""
        node, before = f"{site.name}/vera", site.node
        down = self._down_product(site)
        shape = leading(base)
        ups = [self._up_product(site, part, down) for part in site.parts]
        scales = [self._lambda_b(site, part) for part in site.parts]
        up, scale = ups[0], scales[0]
        if len(ups) > 1:
            width = site.out_features
            up = self.weaver.node("Concat", ups, f"{node}/up", (*shape, width), before=before, axis=-1)
            scale = self.weaver.node("Concat", scales, f"{node}/lambda_b", (width,), before=before, axis=0)
        width = site.out_features
        delta = self.weaver.node("Mul", [up, scale], f"{node}/Mul", (*shape, width), before=before)
        return self.weaver.node("Add", [base, delta], f"{node}/Add", (*shape, width), before=before)

    def finish(self) -> None:
        """Let all vectors' zeros be one range of the data file."""
        if not self._vectors:
            return
        longest = max(self._vectors, key=lambda value: value.const_value.nbytes if value.const_value else 0)
        for value in self._vectors:
            if value is not longest:
                assert value.name is not None and longest.name is not None
                self.weaver.shared[value.name] = Range(longest.name)

    def _down_product(self, site: Site) -> ir.Value:
        """A x, (..., rank)."""
        x = site.input
        if x not in self._down:
            self._down[x] = self.stored.down(self.weaver, x, site.in_features, f"{site.name}/vera", site.node)
        return self._down[x]

    def _up_product(self, site: Site, part: Part, down: ir.Value) -> ir.Value:
        """B diag(d) A x of the rows of one part, (..., rows)."""
        node = f"{site.name}/vera/{part.module.rsplit('.', 1)[-1]}"
        lambda_d = self._vector(vector_names(part.module)[1], self.stored.rank)
        scaled = self.weaver.node(
            "Mul", [down, lambda_d], f"{node}/lambda_d", (*leading(down), self.stored.rank), before=site.node
        )
        return self.stored.up(self.weaver, scaled, (part.start, part.stop), f"{node}/B", site.node)

    def _lambda_b(self, site: Site, part: Part) -> ir.Value:
        size = self.sizes[part.module]
        whole = self._vector(vector_names(part.module)[0], size)
        if (part.start, part.stop) == (0, size):
            return whole
        node = f"{site.name}/vera/{part.module.rsplit('.', 1)[-1]}/lambda_b"
        ends = [
            self.weaver.initializer(f"vera.at.{at}", np.array([at], np.int64))
            for at in (part.start, part.stop)
        ]
        return self.weaver.node("Slice", [whole, *ends], node, (part.size,), before=site.node)

    def _vector(self, name: str, size: int) -> ir.Value:
        value = self.weaver.overridable(name, np.zeros(size, np.float32))
        if value not in self._vectors:
            self._vectors.append(value)
        return value


def weave(
    weaver: Weaver,
    sites: Sequence[Site],
    bases: Mapping[str, Linear],
    sizes: Mapping[str, int],
    projections: Projections | None,
    dtype: str,
) -> None:
    """Give every site its stored weight, and a side-branch where one of its modules is adapted.

    bases: the stored form of a site's weight by site name; a site that isn't named keeps its float weight.
    sizes: adapted module -> output features; empty when the adapter is merged.
    dtype: how the projections are stored, "fp32", "fp16", "int8" or "int4".
    """
    branches = None
    if projections is not None and sizes:
        widths = tuple(
            sorted({site.in_features for site in sites if any(p.module in sizes for p in site.parts)})
        )
        branches = Branches(weaver, StoredProjections(projections, dtype, widths), sizes)
    for site in sites:
        if site.name in bases:
            base = bases[site.name].product(weaver, site.input, site.weight_name, site.name, site.node)
        elif branches is not None and branches.touches(site):
            base = _kept(weaver, site)
        else:
            continue
        total = branches.add(site, base) if branches is not None and branches.touches(site) else base
        weaver.take_over(site.node, total)
    if branches is not None:
        branches.finish()


def _kept(weaver: Weaver, site: Site) -> ir.Value:
    """The site's own float product, as a value of its own."""
    x, weight = site.node.inputs
    assert x is not None and weight is not None
    shape = (*leading(site.node.outputs[0]), site.out_features)
    return weaver.node("MatMul", [x, weight], f"{site.name}/base/MatMul", shape, before=site.node)
