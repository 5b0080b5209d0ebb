"""A branch's graph rewritten in memory to take an adapter's vectors as its layers read them.

The file's graph takes a kind's vectors end to end and cuts them up in each step, so that an adapter is one
input or two to whoever runs it. Here each piece is an input by itself with a value of its own, and the nodes
that made it (a `Split`, before it a `Cast` of float16) are gone. What layers read is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Array
from vera_edge.device.runtime import onnx_message as message
from vera_edge.device.runtime.graph import Port, Shape, is_vector
from vera_edge.device.runtime.onnx_file import (
    OnnxFile,
    attributes,
    fields,
    initializer,
    spans,
    text,
    value_info,
)
from vera_edge.errors import BundleError

_GRAPH, _NODE, _INITIALIZER, _INPUT, _VALUE = 7, 1, 5, 11, 13  # fields of ModelProto and GraphProto
_TYPES: Mapping[int, type[np.generic]] = {1: np.float32, 10: np.float16}  # TensorProto.DataType
_LAST = (1 << 64) - 1  # the axis -1, as a varint


@dataclass(frozen=True)
class VectorPiece:
    """What one input takes: values `start` to `stop` of a vector's last axis, in float32 where `widened`."""

    vector: Port
    start: int
    stop: int
    widened: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the graph takes it."""
        return np.dtype(np.float32) if self.widened else self.vector.dtype

    @property
    def shape(self) -> Shape:
        """As the vector's, but for the last axis."""
        return (*self.vector.shape[:-1], self.stop - self.start)

    def of(self, vectors: Mapping[str, Array]) -> Array:
        """The piece of these vectors, contiguous; zeros of one row where they don't bring its vector."""
        whole = vectors.get(self.vector.name)
        if whole is None:
            return self.zeros()
        return np.ascontiguousarray(whole[..., self.start : self.stop], self.dtype)

    def zeros(self) -> Array:
        """Zeros for one row."""
        return np.zeros([size if isinstance(size, int) else 1 for size in self.shape], self.dtype)


@dataclass(frozen=True)
class CutGraph:
    """A rewritten graph: its bytes, and by input what each takes. vectors: those of the file's graph."""

    model: bytes
    pieces: Mapping[str, VectorPiece]
    vectors: Mapping[str, Port]


def cut(path: Path, model: Any) -> CutGraph:
    """The graph in `path`, whose bytes are `model` or were, with a piece of a vector for each input.

    The values of the pieces are to be handed over. Raises BundleError when it isn't a graph.
    """
    try:
        graph = next(value for number, value in fields(model) if number == _GRAPH)
        cutting = _Cutting.of(path, graph)
        made = bytearray()
        for number, _, whole in spans(model):
            made += (
                message.field(_GRAPH, cutting.graph(graph, path.name)) if number == _GRAPH else bytes(whole)
            )
        return CutGraph(bytes(made), cutting.pieces, cutting.vectors)
    except (ValueError, IndexError, TypeError, KeyError, StopIteration) as cause:
        raise BundleError(f"{path} isn't an ONNX graph ({cause}); export the bundle again") from None


@dataclass
class _Node:
    op: str
    inputs: list[str]
    outputs: list[str]
    numbers: dict[str, int]

    @classmethod
    def of(cls, data: Any) -> _Node:
        texts: dict[int, list[str]] = {1: [], 2: [], 4: [""]}  # input, output, op_type
        for number, value in fields(data):
            if number in texts:
                texts[number].append(text(value))
        cuts = texts[4][-1] in ("Cast", "Split")
        return cls(texts[4][-1], texts[1], texts[2], attributes(data) if cuts else {})


@dataclass
class _Cutting:
    """A graph under change. gone: what is no longer there: vectors, and the nodes that give these names."""

    vectors: dict[str, Port] = field(default_factory=dict)
    pieces: dict[str, VectorPiece] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path, graph: Any) -> _Cutting:
        made, readers, own = cls(), dict[str, list[_Node]](), set[str]()
        for number, value in fields(graph):
            if number == _NODE:
                node = _Node.of(value)
                for name in node.inputs:
                    readers.setdefault(name, []).append(node)
            elif number == _INITIALIZER:
                own.add(initializer(value)[0])
            elif number == _INPUT and is_vector(_name(value)):
                made.vectors[_name(value)] = _port(value)
        file = OnnxFile.read(path)
        made.vectors = {name: port for name, port in made.vectors.items() if name in own}
        for port in made.vectors.values():
            made._take(port, readers, file)
        return made

    def _take(self, port: Port, readers: Mapping[str, list[_Node]], file: OnnxFile) -> None:
        """Find the pieces of a vector: what its only reader makes of it, or itself."""
        name, widened, size = port.name, False, port.shape[-1]
        assert isinstance(size, int)
        self.gone.add(name)
        readings = readers.get(name, [])
        if len(readings) == 1 and readings[0].op == "Cast" and readings[0].numbers["to"] == message.FLOAT:
            (name,), widened = readings[0].outputs, True
            self.gone.add(name)
            readings = readers.get(name, [])
        if len(readings) == 1 and (sizes := _sizes(readings[0], len(port.shape), file)) is not None:
            self.gone |= set(readings[0].outputs)
            ends = np.cumsum(sizes).tolist()
            if ends[-1] != size:
                raise ValueError(f"{name} is cut into {ends[-1]} values and has {size}")
            for output, start, stop in zip(readings[0].outputs, [0, *ends], ends, strict=False):
                self.pieces[output] = VectorPiece(port, start, stop, widened)
        else:
            self.pieces[name] = VectorPiece(port, 0, size, widened)

    def graph(self, graph: Any, file: str) -> bytes:
        """The graph's bytes; file: one that lies beside its weights."""
        made = bytearray()
        for number, value, whole in spans(graph):
            if not self._goes(number, value):
                made += whole
        return bytes(made) + b"".join(self._inputs(file))

    def _goes(self, number: int, value: Any) -> bool:
        if number == _NODE:
            return bool(self.gone & {text(part) for key, part in fields(value) if key == 2})
        if number == _INITIALIZER:
            return initializer(value)[0] in self.gone
        return number in (_INPUT, _VALUE) and _name(value) in self.gone

    def _inputs(self, file: str) -> Iterator[bytes]:
        for name, piece in self.pieces.items():
            sizes = [size if isinstance(size, int) else None for size in piece.shape]
            yield message.field(_INPUT, message.port(name, message.KINDS[piece.dtype.name], sizes))
            yield message.field(_INITIALIZER, message.held(name, piece.zeros(), file))


def _name(value: Any) -> str:
    """Of a ValueInfoProto."""
    return next((text(part) for number, part in fields(value) if number == 1), "")


def _port(value: Any) -> Port:
    """What a ValueInfoProto of a vector says."""
    name, kind, shape = value_info(value)
    return Port(name, shape, np.dtype(_TYPES[kind]))


def _sizes(node: _Node, axes: int, file: OnnxFile) -> list[int] | None:
    """How a node cuts its first input along the last axis; None when it does something else."""
    if node.op != "Split" or node.numbers.get("axis", 0) not in (_LAST, axes - 1) or len(node.inputs) != 2:
        return None
    sizes = file.values(node.inputs[1], np.int64) if node.inputs[1] in file.initializers else None
    return None if sizes is None else [int(size) for size in sizes]
