"""A GGUF file written tensor after tensor: all sizes first, then the bytes, one tensor in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.progress import Progress
from vera_edge.storage.files import output_error
from vera_edge_gguf import blocks, tensor_types


@dataclass(frozen=True)
class Tensor:
    """stored: the plan's name of its type. shape: rows first. data: its bytes, made when they are written."""

    name: str
    stored: str
    shape: tuple[int, ...]
    data: Callable[[], npt.NDArray[Any]]


def held(name: str, values: Float32) -> Tensor:
    """A tensor of float32 values that are at hand."""
    return Tensor(name, "fp32", values.shape, partial(_same, values))


def _same(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Iterable[Tensor],
    progress: Progress,
) -> None:
    """Write the file. metadata: by full key; None is left out. Raises OutputError when the disk refuses."""
    tensors = tuple(tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _put(writer, key, value)
    for tensor in tensors:
        _declare(writer, tensor)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors):
            progress("writing GGUF", done, len(tensors))
            data = np.ascontiguousarray(tensor.data()).view(np.uint8).reshape(-1)
            assert data.size == blocks.size(tensor.stored, tensor.shape), tensor.name
            writer.write_tensor_data(data)
    except OSError as cause:
        raise output_error(path, cause) from cause
    finally:
        writer.close()


def _declare(writer: Any, tensor: Tensor) -> None:
    # The writer takes shapes of quantized tensors in bytes where their dtype is bytes.
    kind = tensor_types.ggml_type(tensor.stored)
    nbytes = blocks.size(tensor.stored, tensor.shape)
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)


def _put(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
