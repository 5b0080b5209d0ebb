"""Joins linear layers that read the same x into one product, before they are stored.

A decoder computes gate and up from one x. With integer weights a product rounds x to int8 before anything
else, and a node costs a microsecond or more beside it: as one product, cut in two, they take a tenth off a
step of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from vera_edge_onnx.graph.computed import joined
from vera_edge_onnx.graph.groups import joined_name
from vera_edge_onnx.graph.parts import put_together
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.weaver import Weaver, leading


def join(model: ir.Model, sites: Sequence[Site], fit: Callable[[tuple[Site, ...]], bool]) -> tuple[Site, ...]:
    """The sites, those that read one x and lie next to each other joined where they `fit` together."""
    weaver = Weaver(model)
    found: list[tuple[Site, ...]] = []
    for site in sites:
        if found and found[-1][0].input is site.input and fit((*found[-1], site)):
            found[-1] = (*found[-1], site)
        else:
            found.append((site,))
    return tuple(_joined(weaver, group) if len(group) > 1 else group[0] for group in found)


def _joined(weaver: Weaver, sites: tuple[Site, ...]) -> Site:
    name, first = joined_name(sites), sites[0]
    x, widths = first.input, [site.out_features for site in sites]
    weight = _side_by_side(f"{name}.weight", sites)
    weaver.model.graph.register_initializer(weight)
    shape = (*leading(x), sum(widths))
    product = weaver.node("MatMul", [x, weight], f"{name}/MatMul", shape, before=first.node)
    node = product.producer()
    assert node is not None
    names = [f"{site.name}/part" for site in sites]
    pieces = weaver.split(product, widths, f"{name}/Split", names, before=first.node)
    for site, piece in zip(sites, pieces, strict=True):
        weaver.take_over(site.node, piece)
    parts = put_together(part for site in sites for part in site.parts)
    return Site(name, node, parts, first.in_features)


def _side_by_side(name: str, sites: tuple[Site, ...]) -> ir.Value:
    """The weights (in, sum of out) as one initializer, put together whenever it is read."""
    stored = []
    for site in sites:
        value = site.node.inputs[1]
        assert value is not None and value.const_value is not None
        stored.append(value.const_value)
    computed = joined(stored, name)
    shape = ir.Shape([sites[0].in_features, sum(site.out_features for site in sites)])

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in stored], axis=1), name=name)

    tensor = computed or ir.LazyTensor(read, ir.DataType.FLOAT, shape, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
