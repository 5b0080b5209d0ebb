"""Factors of what a layer reads and gives, as IA3 and DoRA have them: h = (1 + g) * (W ((1 + f) * x)) + c.

The gains g and f are factors less one, and c is what the layer's bias grows by: zeros by default, so that
nothing is what changes nothing. They are three inputs for all layers, cut up as VeRA's vectors are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vera_edge.exporting.branch_form import BIASES, INPUTS, OUTPUTS
from vera_edge.exporting.branch_inputs import INPUT_GAIN, OUTPUT_BIAS, OUTPUT_GAIN, BranchInputs
from vera_edge_onnx.branch.vectors import parts
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.weaver import Weaver, leading


@dataclass(frozen=True)
class Gains:
    """The gains of one graph, by the names of its sites: (rows, 1, out), of inputs (rows, 1, in)."""

    weaver: Weaver
    outputs: Mapping[str, ir.Value]
    inputs: Mapping[str, ir.Value]
    biases: Mapping[str, ir.Value]

    @classmethod
    def of(cls, weaver: Weaver, sites: Sequence[Site], inputs: BranchInputs, dtype: str) -> Gains:
        """Give the graph the inputs that are wanted. dtype: theirs; it computes in float32."""

        def cut(name: str, kind: str, by_output: bool) -> Mapping[str, ir.Value]:
            modules = inputs.modules.get(kind, frozenset())
            wanted = {
                site.name: (site.out_features if by_output else site.in_features, site)
                for site in sites
                if not modules.isdisjoint(part.module for part in site.parts)
            }
            return parts(weaver, name, wanted, dtype) if wanted else {}

        return cls(
            weaver,
            cut(OUTPUT_GAIN, OUTPUTS, True),
            cut(INPUT_GAIN, INPUTS, False),
            cut(OUTPUT_BIAS, BIASES, True),
        )

    def changes(self, site: Site) -> bool:
        """Whether the site has any."""
        return any(site.name in each for each in (self.outputs, self.inputs, self.biases))

    def read(self, site: Site) -> ir.Value:
        """What the site's own product reads: x, or (1 + f) * x."""
        if site.name not in self.inputs:
            return site.input
        added = self._scaled(site.input, self.inputs[site.name], site, "input_gain", site.in_features)
        shape = (*leading(site.input), site.in_features)
        return self.weaver.node(
            "Add", [site.input, added], f"{site.name}/input_gain/Add", shape, before=site.node
        )

    def added(self, site: Site, base: ir.Value) -> Iterator[ir.Value]:
        """What is added to the site's own product: g * (W x) and c, where it has them."""
        if site.name in self.outputs:
            yield self._scaled(base, self.outputs[site.name], site, "output_gain", site.out_features)
        if site.name in self.biases:
            yield self.biases[site.name]

    def _scaled(self, value: ir.Value, gain: ir.Value, site: Site, kind: str, width: int) -> ir.Value:
        shape = (*leading(site.input), width)
        return self.weaver.node("Mul", [value, gain], f"{site.name}/{kind}/Mul", shape, before=site.node)
