"""An adapter's vectors as a graph takes them: two inputs for all layers, each cut up by one Split.

ONNX Runtime spends most of a microsecond on every input of every run, so a vector for each of some hundred
modules would cost as much as the products that they scale. Both inputs have a batch axis: one row serves all
rows of a batch, or each row brings its own adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vera_edge.exporting.onnx_adapter import LAMBDA_B, LAMBDA_D
from vera_edge_onnx.graph.groups import Group
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.weaver import Range, Weaver, leading

ROWS = "adapter_rows"


@dataclass(frozen=True)
class VectorInputs:
    """The parts of both vectors; each broadcasts against (..., size) of the group's x.

    lambda_b: (rows, 1, width) by group. lambda_d: (rows, 1, rank) by module, or (rows, 1, parts * rank) by
    group where the group is stacked.
    """

    lambda_b: dict[str, ir.Value]
    lambda_d: dict[str, ir.Value]

    @classmethod
    def of(cls, weaver: Weaver, found: Sequence[Group], rank: int, dtype: str = "float32") -> VectorInputs:
        """Give the graph both inputs, with zeros for defaults, and cut them up for the groups.

        dtype: of the inputs, "float32" or "float16"; the graph computes in float32 either way.
        """
        widths = {group.name: (group.width, group.sites[0]) for group in found}
        ranks: dict[str, tuple[int, Site]] = {}
        for group in found:
            for name in (group.name,) if group.stacked else group.modules:
                ranks.setdefault(name, (rank * len(group.modules) if group.stacked else rank, group.sites[0]))
        made = cls(parts(weaver, LAMBDA_B, widths, dtype), parts(weaver, LAMBDA_D, ranks, dtype))
        # The zeros of one are the first of the other's.
        shorter, longer = sorted((LAMBDA_B, LAMBDA_D), key=lambda name: _bytes(weaver, name))
        weaver.shared[shorter] = Range(longer)
        return made


def parts(
    weaver: Weaver, name: str, wanted: Mapping[str, tuple[int, Site]], dtype: str
) -> dict[str, ir.Value]:
    """Give the graph the input `name`, zeros by default, and cut it up: (rows, 1, size) float32 for each.

    wanted: by part its size, and the site before which it is needed.
    """
    sizes, first = [size for size, _ in wanted.values()], next(iter(wanted.values()))[1]
    whole, shape = weaver.overridable(name, np.zeros((1, 1, sum(sizes)), dtype)), (ROWS, 1, sum(sizes))
    whole.shape = ir.Shape(shape)
    if dtype != "float32":
        whole = weaver.node("Cast", [whole], f"{name}/Cast", shape, before=first.node, to=ir.DataType.FLOAT)
    kind = name.rsplit(".", 1)[-1]
    names = [f"{part}/{kind}" for part in wanted]
    pieces = weaver.split(whole, sizes, f"{name}/Split", names, before=first.node)
    return {
        part: _aligned(weaver, piece, site)
        for (part, (_, site)), piece in zip(wanted.items(), pieces, strict=True)
    }


def _aligned(weaver: Weaver, piece: ir.Value, site: Site) -> ir.Value:
    """The piece with as many axes as the site's x, which has no second one after pooling, say."""
    if len(leading(site.input)) != 1:
        return piece
    assert piece.shape is not None
    axis = weaver.initializer("vera.at.1", np.array([1], np.int64))
    size = piece.shape[2]
    assert isinstance(size, int)
    return weaver.node("Squeeze", [piece, axis], f"{piece.name}/Squeeze", (ROWS, size), before=site.node)


def _bytes(weaver: Weaver, name: str) -> int:
    tensor = weaver.model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.nbytes
