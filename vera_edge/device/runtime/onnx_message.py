"""Parts of an ONNX file as bytes, written without the onnx package, which no device has.

Field numbers as in onnx_file.py, which reads what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from vera_edge.arrays import Array

KINDS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}  # TensorProto.DataType
_INT = 2  # AttributeProto.AttributeType
FLOAT = KINDS["float32"]
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


def field(number: int, value: int | bytes | str) -> bytes:
    """A field of a message: a number that isn't negative, or the bytes of a string or of a message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def node(
    op: str,
    inputs: Sequence[str],
    output: str | Sequence[str],
    attributes: Mapping[str, int] = MappingProxyType({}),
    name: str = "",
    domain: str = "",
) -> bytes:
    """A NodeProto whose attributes are integers, not negative; called as its output unless it has a name."""
    outputs = [output] if isinstance(output, str) else output
    made = b"".join(field(1, one) for one in inputs) + b"".join(field(2, one) for one in outputs)
    made += field(3, name or outputs[0]) + field(4, op)
    for key, value in attributes.items():
        made += field(5, field(1, key) + field(3, value) + field(20, _INT))
    return made + (field(7, domain) if domain else b"")


def port(name: str, kind: int, sizes: Sequence[int | None]) -> bytes:
    """A ValueInfoProto of a tensor; kind: of TensorProto.DataType; None: a size that isn't fixed."""
    axes = b"".join(field(1, b"" if size is None else field(1, size)) for size in sizes)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, axes)))


def model(graph: bytes, opsets: Mapping[str, int]) -> bytes:
    """A ModelProto around a GraphProto; opsets: the version of each domain's operators."""
    made = field(1, 8) + field(7, graph)  # ir_version, graph
    for domain, number in opsets.items():
        made += field(8, field(1, domain) + field(2, number))
    return made


def constant(name: str, array: Array) -> bytes:
    """A TensorProto with its values."""
    return _tensor(name, array) + field(9, np.ascontiguousarray(array).tobytes())


def held(name: str, array: Array, location: str = "held") -> bytes:
    """A TensorProto whose values `Graph` hands over: it stands for a file that is never opened.

    location: the file's name, where ONNX Runtime wants one that is there.
    """
    return _tensor(name, array) + field(13, field(1, "location") + field(2, location)) + field(14, 1)


def _tensor(name: str, array: Any) -> bytes:
    sizes = b"".join(field(1, size) for size in array.shape)
    return sizes + field(2, KINDS[array.dtype.name]) + field(8, name)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
