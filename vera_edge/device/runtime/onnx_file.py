"""Nodes and initializers of an ONNX file, read without the onnx package, which no device has.

Wire format: https://protobuf.dev/programming-guides/encoding/; field numbers: onnx.proto,
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. What isn't asked for is skipped, unread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vera_edge.errors import BundleError
from vera_edge.storage.files import safe_join

INT8 = 3  # TensorProto.DataType
Value = TypeVar("Value", bound=np.generic)
_EXTERNAL = 1  # TensorProto.DataLocation
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class Node:
    """One operator: its type, and the names of what it reads and gives."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, data: Any) -> Node:
        """What a NodeProto says of itself; its subgraphs aren't looked at."""
        texts: dict[int, list[str]] = {1: [], 2: [], 4: [""]}  # NodeProto.input, output, op_type
        for number, value in fields(data):
            if number in texts:
                texts[number].append(text(value))
        return cls(texts[4][-1], tuple(texts[1]), tuple(texts[2]))


# Bits of a value, by TensorProto.DataType; 8 of those that aren't here.
BITS: Mapping[int, int] = {
    **dict.fromkeys((1, 6, 12), 32),  # float32, int32, uint32
    **dict.fromkeys((7, 11, 13), 64),  # int64, float64, uint64
    **dict.fromkeys((4, 5, 10, 16), 16),  # uint16, int16, float16, bfloat16
    **dict.fromkeys((21, 22), 4),  # uint4, int4
}


@dataclass(frozen=True)
class Initializer:
    """A constant. dtype: as TensorProto numbers it. raw: its bytes; else `place`: keys of external data."""

    dtype: int
    shape: tuple[int, ...]
    raw: Any
    place: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return -(-math.prod(self.shape) * BITS.get(self.dtype, 8) // 8)


@dataclass(frozen=True)
class OnnxFile:
    """What a graph holds, that of its subgraphs too. Initializers are by name."""

    path: Path
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Initializer] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """The graph in `path`. Raises BundleError when it isn't one."""
        found = cls(path)
        try:
            whole: Any = memoryview(np.memmap(path, np.uint8, "r").data)
            for number, value in fields(whole):
                if number == 7:  # ModelProto.graph
                    found._add_graph(value)
        except (ValueError, IndexError, TypeError) as cause:
            raise BundleError(f"{path} isn't an ONNX graph ({cause}); export the bundle again") from None
        return found

    def int8(self, name: str) -> npt.NDArray[np.int8] | None:
        """The values of an int8 initializer; None and raises as `values`."""
        return self.values(name, np.int8)

    def values(self, name: str, dtype: type[Value]) -> npt.NDArray[Value] | None:
        """The values of an initializer, which has this dtype; None when the file they are in isn't there.

        Raises BundleError when they aren't as many as its shape says.
        """
        one = self.initializers[name]
        try:
            values = self._values(one, np.dtype(dtype))
            return None if values is None else values.reshape(one.shape)
        except (ValueError, OverflowError, TypeError) as cause:
            raise BundleError(f"{self.path} holds no sound {name} ({cause}); copy the bundle again") from None

    def _values(self, one: Initializer, dtype: np.dtype[Value]) -> npt.NDArray[Value] | None:
        if not one.place:
            return np.frombuffer(one.raw, dtype)
        path = safe_join(self.path.parent, one.place.get("location", ""))
        if not path.is_file():
            return None
        start = int(one.place.get("offset", 0))
        return np.memmap(path, np.uint8, "r")[start : start + math.prod(one.shape) * dtype.itemsize].view(
            dtype
        )

    def _add_graph(self, graph: Any) -> None:
        for number, value in fields(graph):
            if number == 1:  # GraphProto.node
                self._add_node(value)
            elif number == 5:  # GraphProto.initializer
                name, one = initializer(value)
                self.initializers[name] = one

    def _add_node(self, data: Any) -> None:
        for number, value in fields(data):
            if number == 5:  # NodeProto.attribute
                for part, inner in fields(value):
                    if part in (6, 11):  # AttributeProto.g, graphs
                        self._add_graph(inner)
        self.nodes.append(Node.of(data))


def initializer(data: Any) -> tuple[str, Initializer]:
    """What a TensorProto holds, and its name."""
    name, dtype, raw, external = "", 0, b"", False
    shape: list[int] = []
    values: list[int] = []
    place: dict[str, str] = {}
    for number, value in fields(data):
        if number == 1:  # TensorProto.dims
            shape += _numbers(value)
        elif number == 2:  # data_type
            dtype = value
        elif number == 5:  # int32_data, which holds int8 too
            values += _numbers(value)
        elif number == 8:  # name
            name = text(value)
        elif number == 9:  # raw_data
            raw = value
        elif number == 13:  # external_data
            entry = {part: text(inner) for part, inner in fields(value)}
            place[entry[1]] = entry[2]
        elif number == 14:  # data_location
            external = value == _EXTERNAL
    if dtype == INT8 and values:
        raw = np.array(values, np.uint64).astype(np.int8).tobytes()
    return name, Initializer(dtype, tuple(shape), raw, place if external else {})


def value_info(data: Any) -> tuple[str, int, tuple[int | str | None, ...]]:
    """What a ValueInfoProto of a tensor says: its name, TensorProto.DataType and shape."""
    name, kind, shape = "", 0, list[int | str | None]()
    for number, value in fields(data):
        if number == 1:  # ValueInfoProto.name
            name = text(value)
        elif number == 2:  # its type
            tensor = dict(fields(dict(fields(value)).get(1, b"")))  # TypeProto.tensor_type
            kind = tensor.get(1, 0)
            for part, axis in fields(tensor.get(2, b"")):
                if part == 1:  # TensorShapeProto.dim
                    shape.append(_axis(dict(fields(axis))))
    if not isinstance(kind, int):
        raise TypeError("a type that is no number")
    return name, kind, tuple(shape)


def _axis(axis: Mapping[int, Any]) -> int | str | None:
    """An axis of a shape: its size, or its name, or neither."""
    if 1 not in axis:  # TensorShapeProto.Dimension.dim_value
        return text(axis[2]) if 2 in axis else None
    if not isinstance(axis[1], int):
        raise TypeError("a size that is no number")
    return axis[1]


def fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, or the bytes of a string, a message or packed numbers."""
    for number, value, _ in spans(data):
        if value is not None:
            yield number, value


def spans(data: Any) -> Iterator[tuple[int, Any, Any]]:
    """Each field as `fields` has it, and its own bytes with its key; a number of fixed width is None."""
    at = 0
    while at < len(data):
        begin = at
        key, at = _varint(data, at)
        wire, value = key & 7, None
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if at > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, value, data[begin:at]


def _varint(data: Any, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, low bits first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _numbers(value: Any) -> list[int]:
    """A repeated number: one of them, or packed."""
    if isinstance(value, int):
        return [value]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(number)
    return found


def text(value: Any) -> str:
    """The string that a field holds."""
    if isinstance(value, int):  # of which `bytes` would make as many zeros
        raise TypeError("a number where a string should be")
    return bytes(value).decode("utf-8", "replace")


def attributes(node: Any) -> dict[str, int]:
    """The integer attributes of a NodeProto, by name."""
    found = {}
    for number, value in fields(node):
        if number == 5:  # NodeProto.attribute
            parts = dict(fields(value))
            if isinstance(parts.get(3), int):  # AttributeProto.i
                found[text(parts[1])] = parts[3]
    return found


def opset(model: Any) -> int:
    """The version of ONNX's own operators that a ModelProto is written for; 0 when it doesn't say."""
    for number, value in fields(model):
        if number == 8:  # ModelProto.opset_import
            parts = dict(fields(value))
            if not text(parts.get(1, b"")):
                return int(parts.get(2, 0))
    return 0
