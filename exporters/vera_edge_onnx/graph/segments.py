"""Runs a float graph in parts, one after the other, with the weights of one part in memory.

A part is some nodes in the graph's order whose weights take no more than so many bytes. All texts go through
one part before the next is made. Where one matrix alone takes more, a lookup takes the rows that it needs,
and a product is computed some rows of the weight at a time: without ONNX Runtime, which would hold it whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir

from vera_edge.arrays import Array
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.sessions import Feeds, opened, run

MOST = 1 << 28  # bytes of a part's weights
_FED = 1 << 16  # bytes of an initializer that isn't put into the part's own graph
Values = dict[str, Array]


class GraphPart(Protocol):
    """Some nodes."""

    @property
    def inputs(self) -> frozenset[str]:
        """The values that they read from outside."""

    def run_each(self, runs: Iterator[Values]) -> Iterator[Values]:
        """What they give to others, for the inputs of each run; the next run is taken when one is done."""


@dataclass(frozen=True)
class Nodes:
    """A part that ONNX Runtime runs. fed: initializers that it's given beside what a run brings."""

    model: onnx.ModelProto
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    fed: Mapping[str, ir.TensorProtocol]
    path: Path

    def run_each(self, runs: Iterator[Values]) -> Iterator[Values]:
        self.path.write_bytes(self.model.SerializeToString())
        session = opened(self.path)
        weights = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in self.fed.items()}
        for given in runs:
            yield dict(zip(self.outputs, run(session, self.outputs, {**weights, **given}), strict=True))


@dataclass(frozen=True)
class Lookup:
    """Rows of a table by their numbers, as a Gather takes them: for all runs in one pass over the table."""

    table: ComputedWeight
    ids: str
    output: str

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset({self.ids})

    def run_each(self, runs: Iterator[Values]) -> Iterator[Values]:
        numbers = [given[self.ids] for given in runs]
        found = [np.empty((*ids.shape, self.table.matrix_shape[1]), np.float32) for ids in numbers]
        for start, rows in self.table.pieces():
            for ids, values in zip(numbers, found, strict=True):
                here = (ids >= start) & (ids < start + len(rows))
                values[here] = rows[ids[here] - start]
        return iter([{self.output: values} for values in found])


@dataclass(frozen=True)
class Product:
    """x times a weight that is too large to hold, as a MatMul gives it: for all runs in one pass over it."""

    weight: ComputedWeight
    x: str
    output: str

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset({self.x})

    def run_each(self, runs: Iterator[Values]) -> Iterator[Values]:
        read = [given[self.x] for given in runs]
        found = [np.empty((*x.shape[:-1], self.weight.matrix_shape[0]), np.float32) for x in read]
        for start, rows in self.weight.pieces():
            for x, values in zip(read, found, strict=True):
                values[..., start : start + len(rows)] = x @ rows.T
        return iter([{self.output: values} for values in found])


@dataclass
class _Cut:
    """The nodes of the part that is being collected."""

    nodes: list[ir.Node] = field(default_factory=list)
    fed: dict[str, ir.TensorProtocol] = field(default_factory=dict)

    def with_node(self, node: ir.Node) -> int:
        """Bytes of weights that the part would have with one more node."""
        return sum(tensor.nbytes for tensor in {**self.fed, **_fed(node)}.values())

    def add(self, node: ir.Node) -> None:
        self.nodes.append(node)
        self.fed |= _fed(node)


def cut(graph: ir.Model, folder: Path, most: int, wanted: frozenset[str]) -> list[GraphPart]:
    """The parts of a graph. folder: to write to. wanted: values that are asked for, or handed on."""
    found: list[Lookup | Product | _Cut] = []
    for node in graph.graph:
        alone = _alone(node, most)
        if alone is not None:
            found.append(alone)
        elif not _is_passed_by(node, most):
            if not found or not isinstance(found[-1], _Cut) or found[-1].with_node(node) > most:
                found.append(_Cut())
            last = found[-1]
            assert isinstance(last, _Cut)
            last.add(node)
    parts: list[GraphPart] = []
    later = set(wanted)
    for number, part in reversed(tuple(enumerate(found))):
        reads, gives = _reads_and_gives(part)
        if later.isdisjoint(gives):  # as the head where nobody asks for logits
            continue
        path = folder / f"part-{number}.onnx"
        parts.append(_nodes(graph, part, frozenset(later), path) if isinstance(part, _Cut) else part)
        later |= reads
    return parts[::-1]


def _reads_and_gives(part: Lookup | Product | _Cut) -> tuple[frozenset[str], frozenset[str]]:
    """The values that a part reads from outside, and all that it makes."""
    if isinstance(part, _Cut):
        made = (value.name for node in part.nodes for value in node.outputs)
        return _reads(part.nodes), frozenset(name for name in made if name)
    return part.inputs, frozenset({part.output})


def _weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None or value.producer() is not None else value.const_value


def _fed(node: ir.Node) -> dict[str, ir.TensorProtocol]:
    """The large initializers that a node reads, and those that nodes within it do."""
    return {
        value.name: tensor
        for value in _values(node)
        if value.name and (tensor := _weight(value)) is not None and tensor.nbytes > _FED
    }


def _values(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what nodes within it do."""
    for value in node.inputs:
        if value is not None:
            yield value
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _values(inner)


def _reads(nodes: Sequence[ir.Node]) -> frozenset[str]:
    """The values that nodes read and none of them gives, initializers left out."""
    own = {value for node in nodes for value in node.outputs}
    inside = {
        value
        for node in nodes
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for inner in attribute.as_graph()
        for value in inner.outputs
    }
    return frozenset(
        value.name
        for node in nodes
        for value in _values(node)
        if value not in own and value not in inside and value.name
        if value.const_value is None or value.is_graph_input()
    )


def _alone(node: ir.Node, most: int) -> Lookup | Product | None:
    """A node whose matrix is too large for ONNX Runtime, as a part of its own."""
    if node.op_type == "Gather" and node.domain == "" and node.inputs[0] is not None:
        table, turned = node.inputs[0], False
        producer = table.producer()
        if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
            table, turned = producer.inputs[0], True
        weight, ids = _weight(table), node.inputs[1]
        if isinstance(weight, ComputedWeight) and weight.nbytes > most and weight.transposed == turned:
            assert ids is not None and ids.name and node.outputs[0].name
            return Lookup(weight, ids.name, node.outputs[0].name)
    if node.op_type == "MatMul" and node.domain == "":
        x, weight = node.inputs[0], _weight(node.inputs[1])
        if isinstance(weight, ComputedWeight) and weight.nbytes > most and weight.transposed:
            assert x is not None and x.name and node.outputs[0].name
            return Product(weight, x.name, node.outputs[0].name)
    return None


def _is_passed_by(node: ir.Node, most: int) -> bool:
    """Whether a node is needed by none: only lookups read it, which take their rows themselves."""
    weight = _weight(node.inputs[0]) if node.op_type == "Transpose" else None
    users = [user for value in node.outputs for user in value.consumers()]
    return isinstance(weight, ComputedWeight) and all(_alone(user, most) is not None for user in users)


def _nodes(graph: ir.Model, part: _Cut, later: frozenset[str], path: Path) -> Nodes:
    inputs = _reads(part.nodes)
    outputs = [value for node in part.nodes for value in node.outputs if value.name in later]
    read = {value for node in part.nodes for value in _values(node)}
    names = {value.name: value for value in read}
    fed = part.fed | {  # what a run may bring, and has a value of its own otherwise
        name: tensor for name in inputs if (tensor := _weight(names[name])) is not None
    }
    proto = onnx.GraphProto(name="part")
    proto.node.extend(ir.to_proto(node) for node in part.nodes)
    for value in sorted(read, key=lambda value: value.name or ""):
        tensor = _weight(value)
        if tensor is not None and value.name not in fed:
            proto.initializer.append(ir.to_proto(ir.Tensor(tensor.numpy(), name=value.name)))
    proto.input.extend(_info(names[name]) for name in sorted({*inputs, *fed}))
    proto.output.extend(_info(value) for value in outputs)
    model = onnx.ModelProto(ir_version=graph.ir_version, graph=proto)
    for domain, version in graph.graph.opset_imports.items():
        model.opset_import.append(onnx.OperatorSetIdProto(domain=domain, version=version))
    return Nodes(model, inputs, tuple(value.name or "" for value in outputs), fed, path)


def _info(value: ir.Value) -> onnx.ValueInfoProto:
    """A value's name and type."""
    dtype = value.dtype if value.dtype is not None else ir.DataType.FLOAT
    return onnx.helper.make_tensor_value_info(value.name or "", int(dtype), None)


def run_parts(
    parts: Sequence[GraphPart],
    chains: Sequence[Sequence[Feeds]],
    handed_on: Mapping[str, str],
    names: Collection[str],
) -> Iterator[list[Values]]:
    """The values called `names` of each run of each chain of runs, one chain at a time.

    handed_on: for an input, the output of the run before it in its chain that it's given.
    """
    states: list[list[Values]] = [[dict(feeds) for feeds in chain] for chain in chains]
    last_use = {name: number for number, part in enumerate(parts) for name in part.inputs}
    for number, part in enumerate(parts):
        given = (
            {name: state[name] for name in part.inputs if name in state}
            for chain in states
            for state in chain
        )
        results = part.run_each(given)
        for chain in states:
            for state, following in zip_longest(chain, chain[1:]):
                made = next(results)
                if following is not None:
                    following |= {past: made[now] for past, now in handed_on.items() if now in made}
                state |= {
                    name: made[name] for name in made if last_use.get(name, -1) > number or name in names
                }
                for name in [
                    name for name in state if last_use.get(name, -1) <= number and name not in names
                ]:
                    del state[name]
            if number + 1 == len(parts):
                yield [{name: state[name] for name in names} for state in chain]
                chain.clear()
