"""Writes an ONNX model with external data: the same model gives the same bytes, each byte stored once.

onnx-ir writes one range of the data file for each initializer. Here an initializer may also be a range of
another one's bytes (the first rows of B, zeros), and then has none of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from vera_edge.errors import OutputError
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import output_error
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.spool import Spool
from vera_edge_onnx.graph.weaver import INLINE, Range

# Tensors start on a page, so that a runtime can map them: 4 KiB is enough on Linux and macOS, Windows maps at
# 64 KiB, and asks that of tensors of some size only (as onnx-ir aligns them).
_SMALL_ALIGNMENT = 64
_PAGE = 4096
_LARGE = 1 << 20
_GRANULE = 1 << 16


def save(
    model: ir.Model,
    path: Path,
    shared: Mapping[str, Range],
    progress: Progress = silent,
    apart: Sequence[Collection[str]] = (),
    spool: Spool | None = None,
) -> None:
    """Write `model` to `path` and its initializers to `<path>_data` beside it.

    shared: initializer -> where its bytes lie within another one's. apart: groups of initializers that go to
    files of their own instead, group n to `more_file(path, n)`, all of them, whatever their size.
    spool: where initializers lie until they're written, and where it's noted that they are.
    Raises OutputError when the disk is full or a folder can't be written.
    """
    places: dict[str, int] = {}
    data_path = path.with_name(f"{path.name}_data")
    files = {name: more_file(path, number) for number, names in enumerate(apart) for name in names}
    values = []
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        inline = tensor.nbytes <= INLINE or tensor.dtype == ir.DataType.INT64
        if not inline or name in shared or name in files:
            values.append((name, value))
        else:
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=name)
    own = {value: name for name, value in values if name not in shared}
    for file in dict.fromkeys([data_path, *files.values()]):
        here = [value for value, name in own.items() if files.get(name, data_path) == file]
        _write(file, here, places, progress, spool)
    for name, value in values:
        tensor = value.const_value
        assert tensor is not None
        place = shared.get(name, Range(name))
        file = files.get(place.source, data_path)
        value.const_value = ir.ExternalTensor(
            file.name,
            places[place.source] + place.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=file.parent,
        )
    proto: onnx.ModelProto = ir.to_proto(model)
    if proto.ByteSize() >= 1 << 31:
        raise OutputError(f"the graph of {path} is over 2 GiB without its weights, which ONNX can't hold")
    try:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    except OSError as cause:
        raise output_error(path, cause) from cause


def more_file(path: Path, number: int) -> Path:
    """Data file `number`, from 0, beside the graph's first one, named as Transformers.js counts them."""
    return path.with_name(f"{path.name}_data_{number + 1}")


def _write(
    path: Path,
    values: Sequence[ir.Value],
    places: dict[str, int],
    progress: Progress,
    spool: Spool | None,
) -> None:
    """Write a data file, and note in `places` where each initializer begins.

    Those that start on the widest boundaries come first, so that little is left empty between them. What an
    earlier run wrote stays.
    """
    values = sorted(values, key=lambda value: -_alignment(value))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if spool is not None and path.exists() else "wb") as stream:
            for done, value in enumerate(values):
                progress("writing weights", done, len(values))
                assert value.name is not None and value.const_value is not None
                start = stream.tell() + -stream.tell() % _alignment(value)
                places[value.name] = start
                if spool is not None and spool.is_at(value.name, path, start):
                    stream.seek(start + value.const_value.nbytes)
                    continue
                stream.write(bytes(start - stream.tell()))
                _put(stream, value.const_value)
                if spool is not None:
                    stream.flush()
                    spool.placed(value.name, value.const_value, path, start)
            stream.truncate()
    except OSError as cause:
        raise output_error(path, cause) from cause


def _alignment(value: ir.Value) -> int:
    assert value.const_value is not None
    size = value.const_value.nbytes
    return _GRANULE if size >= _LARGE else _PAGE if size >= _PAGE else _SMALL_ALIGNMENT


def _put(stream: BinaryIO, tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, ir.Tensor | ir.ExternalTensor | ComputedWeight):
        tensor.tofile(stream)  # without a copy in memory
    else:
        stream.write(tensor.tobytes())
