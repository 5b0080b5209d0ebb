"""LoRA side-branches: h = W x + B A x, whose pairs are inputs of the graph, zeros until an adapter is set.

Formula: Hu et al., LoRA, ICLR 2022, https://arxiv.org/abs/2106.09685; the scale lies in B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from vera_edge.exporting.branch_inputs import BranchInputs, name_of_a, name_of_b
from vera_edge_onnx.branch.vectors import ROWS
from vera_edge_onnx.graph.groups import Group
from vera_edge_onnx.graph.weaver import Range, Weaver, leading


@dataclass
class LoraBranches:
    """The side-branches of one graph, added group by group. dtype: of the inputs; it computes in float32."""

    weaver: Weaver
    inputs: BranchInputs
    dtype: str = "float32"
    _inputs: dict[str, ir.Value] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)  # bytes, by the input's name

    def delta(self, group: Group) -> ir.Value:
        """What the adapter adds to the products of the group's sites, side by side: (..., width)."""
        x, node, rank = group.sites[0].input, f"{group.name}/lora", self.inputs.rank
        axes = leading(x)
        if flat := len(axes) == 1:  # (batch, in), which a pair for each row can't multiply
            x = self._axis(
                "Unsqueeze", x, f"{node}/Unsqueeze", (axes[0], 1, group.sites[0].in_features), group
            )
            axes = (axes[0], 1)
        downs, ups = {}, []
        for module in group.modules:
            a = self._input(name_of_a(module), (self.inputs.shapes[module][1], rank), group)
            downs[module] = self._product([x, a], f"{node}/{module}/A", (*axes, rank), group)
        for part in group.parts:
            piece = (part.module, part.start, part.stop)
            b = self._input(name_of_b(piece, self.inputs.shapes), (rank, part.size), group)
            name = f"{node}/{part.module}.{part.start}/B"
            ups.append(self._product([downs[part.module], b], name, (*axes, part.size), group))
        up = ups[0]
        if len(ups) > 1:
            shape = (*axes, group.width)
            up = self.weaver.node("Concat", ups, f"{node}/up", shape, before=group.node, axis=-1)
        return self._axis("Squeeze", up, f"{node}/Squeeze", (axes[0], group.width), group) if flat else up

    def _input(self, name: str, shape: tuple[int, int], group: Group) -> ir.Value:
        """An input for half of a pair, (rows, *shape), with zeros for a default."""
        if name not in self._inputs:
            value = self.weaver.overridable(name, np.zeros((1, *shape), self.dtype))
            value.shape = ir.Shape((ROWS, *shape))
            self._inputs[name] = value
            self._share(name)
            if self.dtype != "float32":
                self._inputs[name] = self.weaver.node(
                    "Cast", [value], f"{name}/Cast", (ROWS, *shape), before=group.node, to=ir.DataType.FLOAT
                )
        return self._inputs[name]

    def _share(self, name: str) -> None:
        """Let the zeros of all inputs be those of the largest."""
        tensor = self.weaver.model.graph.initializers[name].const_value
        assert tensor is not None
        self._sizes[name] = tensor.nbytes
        largest = max(self._sizes, key=self._sizes.__getitem__)
        self.weaver.shared.pop(largest, None)
        self.weaver.shared.update({other: Range(largest) for other in self._sizes if other != largest})

    def _product(
        self, inputs: Sequence[ir.Value], name: str, shape: Sequence[int | str | None], group: Group
    ) -> ir.Value:
        return self.weaver.node("MatMul", inputs, f"{name}/MatMul", shape, before=group.node)

    def _axis(
        self, op: str, value: ir.Value, name: str, shape: Sequence[int | str | None], group: Group
    ) -> ir.Value:
        axis = self.weaver.initializer("lora.at.1", np.array([1], np.int64))
        return self.weaver.node(op, [value, axis], name, shape, before=group.node)
