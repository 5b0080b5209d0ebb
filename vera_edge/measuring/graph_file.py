"""A graph on disk in pieces that can be put together anew: nodes, weights and values as the file has them.

Read without the onnx package, as what runs a bundle does; field numbers as in `device.runtime.onnx_file`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.device.runtime.graph import GraphPorts, Port, Shape
from vera_edge.device.runtime.onnx_file import BITS, fields, initializer, spans, text, value_info
from vera_edge.errors import BundleError

# By TensorProto.DataType.
_FLOATS = frozenset({1, 10, 11, 16})
_FED: Mapping[int, type[np.generic]] = {1: np.float32, 10: np.float16, 7: np.int64, 6: np.int32, 3: np.int8}
GRAPH = 7  # fields of ModelProto,
NODE, NAME, INITIALIZER, INPUT, OUTPUT, VALUE = 1, 2, 5, 11, 12, 13  # and of GraphProto
_METADATA = 14


@dataclass(frozen=True)
class FileNode:
    """A node. reads: what it, or a graph within it, takes from outside; data: a NodeProto."""

    data: Any
    reads: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class FileWeight:
    """An initializer. data: a TensorProto; size: of its values, in bytes."""

    data: Any
    size: int


@dataclass(frozen=True)
class FileValue:
    """What a graph says of an input, an output or a value between. data: a ValueInfoProto."""

    data: Any
    kind: int
    shape: Shape

    @property
    def is_float(self) -> bool:
        return self.kind in _FLOATS

    @property
    def bytes_of_one(self) -> int:
        """Bytes of it where all axes that aren't fixed are 1."""
        return math.prod(size for size in self.shape if isinstance(size, int)) * BITS.get(self.kind, 8) // 8


@dataclass(frozen=True)
class GraphFile:
    """A graph. rest: the model's other fields; `weights` and `values` are by name."""

    path: Path
    rest: bytes
    nodes: tuple[FileNode, ...]
    weights: Mapping[str, FileWeight]
    values: Mapping[str, FileValue]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> GraphFile:
        """The graph in `path`. Raises BundleError when it isn't one."""
        try:
            whole: Any = memoryview(np.memmap(path, np.uint8, "r").data)
            rest, metadata, graph = bytearray(), {}, None
            for number, value, data in spans(whole):
                if number == GRAPH:
                    graph = value
                    continue
                rest += data
                if number == _METADATA:
                    entry = dict(fields(value))
                    metadata[text(entry[1])] = text(entry.get(2, b""))
            if graph is None:
                raise ValueError("it holds no graph")
            nodes, weights, values, inputs, outputs = _parts(graph)
            return cls(path, bytes(rest), nodes, weights, values, inputs, outputs, metadata)
        except (ValueError, IndexError, TypeError, KeyError, RecursionError) as cause:
            raise BundleError(f"{path} isn't an ONNX graph ({cause}); export the bundle again") from None

    def ports(self) -> GraphPorts:
        """Its inputs and outputs, as those of an open one. Raises BundleError for what can't be fed."""
        needed = {name: self._port(name) for name in self.inputs if name not in self.weights}
        own = {name: self._port(name) for name in self.inputs if name in self.weights}
        outputs = {name: self._port(name) for name in self.outputs}
        return GraphPorts.of(self.path, needed, outputs, own, self.metadata)

    def _port(self, name: str) -> Port:
        value = self.values[name]
        if value.kind not in _FED:
            raise BundleError(
                f"{name!r} of {self.path} is of type {value.kind}, which vera-edge doesn't feed"
            )
        return Port(name, value.shape, np.dtype(_FED[value.kind]))


_Names = tuple[str, ...]


def _parts(
    graph: Any,
) -> tuple[tuple[FileNode, ...], dict[str, FileWeight], dict[str, FileValue], _Names, _Names]:
    """Nodes, weights, values, and the names of inputs and outputs."""
    nodes, weights, values = list[FileNode](), dict[str, FileWeight](), dict[str, FileValue]()
    names: dict[int, list[str]] = {INPUT: [], OUTPUT: []}
    for number, value in fields(graph):
        if number == NODE:
            nodes.append(_node(value))
        elif number == INITIALIZER:
            name, one = initializer(value)
            weights[name] = FileWeight(value, one.nbytes)
        elif number in (INPUT, OUTPUT, VALUE):
            name, kind, shape = value_info(value)
            values[name] = FileValue(value, kind, shape)
            if number in names:
                names[number].append(name)
    return tuple(nodes), weights, values, tuple(names[INPUT]), tuple(names[OUTPUT])


def _node(data: Any) -> FileNode:
    names: dict[int, dict[str, None]] = {1: {}, 2: {}}  # NodeProto.input, output
    for number, value in fields(data):
        if number in names:
            names[number][text(value)] = None
        elif number == 5:  # NodeProto.attribute
            names[1] |= dict.fromkeys(_outside(value))
    return FileNode(data, *(tuple(filter(None, found)) for found in names.values()))


def _outside(attribute: Any) -> Iterator[str]:
    """What the graphs in an attribute read and don't make."""
    for number, graph in fields(attribute):
        if number in (6, 11):  # AttributeProto.g, graphs
            nodes, weights, _, inputs, outputs = _parts(graph)
            own = {*weights, *inputs, *(name for node in nodes for name in node.gives)}
            yield from (name for node in nodes for name in node.reads if name not in own)
            yield from (name for name in outputs if name not in own)
