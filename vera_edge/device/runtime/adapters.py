"""The vectors of an .onnx_adapter, checked against the graph that will take them.

ONNX Runtime checks neither that a file brings every vector of the graph (one with half of them runs silently
as something between adapter and base) nor the model version in it, so both are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from vera_edge.arrays import Array
from vera_edge.device.runtime.graph import KINDS, GraphPorts, Port, first_line
from vera_edge.errors import AdapterError, MismatchError

Vectors = Mapping[str, Array]
_MARK = b"TORT"  # the flatbuffer's file identifier, at bytes 4 to 8


def load(path: Path, graph: GraphPorts, model_version: int | None = None) -> Vectors:
    """The vectors in `path` by the graph's input names, in the graph's dtypes and shapes.

    A file brings all inputs of some kinds (VeRA's vectors, LoRA's pairs, factors, biases); the others stay
    zeros. `model_version` is what the file must carry, when the bundle says. Raises AdapterError when the
    file can't be read or holds NaN or infinity, MismatchError when it doesn't fit the graph.
    """
    found, version = read_file(path)
    if model_version is not None and version != model_version:
        raise MismatchError(
            f"{path} was made for another base or another projection (model version {version}, this bundle "
            f"has {model_version}); pack the adapter for this bundle"
        )
    advice = "it was made for another export; pack the adapter for this bundle"
    ends = tuple(end for kind in KINDS if any(name.endswith(kind) for name in found) for end in kind)
    wanted = {name: port for name, port in graph.vectors.items() if not ends or name.endswith(ends)}
    if missing := sorted(wanted.keys() - found.keys()):
        raise MismatchError(
            f"{path} lacks {len(missing)} of the graph's {len(wanted)} vectors of its kind ({missing[0]}); "
            + advice
        )
    if extra := sorted(found.keys() - graph.vectors.keys()):
        raise MismatchError(f"{path} holds {extra[0]}, which isn't a vector of the graph; {advice}")
    return {name: _fit(found[name], port, path, advice) for name, port in wanted.items()}


def version(path: Path) -> int:
    """The model version that `path` carries. Raises AdapterError when the file can't be read."""
    return read_file(path)[1]


def read_file(path: Path) -> tuple[dict[str, Array], int]:
    """What an `.onnx_adapter` holds, by name, and its model version.

    Raises AdapterError when it can't be read.
    """
    try:
        with path.open("rb") as stream:
            mark = stream.read(8)[4:]
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; name an .onnx_adapter file") from None
    except OSError as cause:
        raise AdapterError(f"{path} can't be read: {cause.strerror}") from None
    if mark != _MARK:
        raise AdapterError(
            f"{path} isn't an .onnx_adapter; `vera-edge adapter pack` makes one of a PEFT folder"
        )
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        # Copies: the values outlive the file's mapping, which may be replaced under us.
        arrays = {name: np.array(value.numpy()) for name, value in adapter.get_parameters().items()}
    except Exception as cause:  # onnxruntime's classes share no base but Exception
        raise AdapterError(f"{path} is damaged ({first_line(cause)}); copy it again") from None
    return arrays, adapter.get_model_version()


def _fit(array: Array, port: Port, path: Path, advice: str) -> Array:
    # A free axis is the batch: one row here, repeated or stacked by who runs several.
    shape = tuple(size if isinstance(size, int) else 1 for size in port.shape)
    if array.dtype != port.dtype or [n for n in array.shape if n != 1] != [n for n in shape if n != 1]:
        raise MismatchError(
            f"{port.name} in {path} is {array.dtype} {list(array.shape)} and the graph takes {port.dtype} "
            f"{list(shape)}; {advice}"
        )
    if not np.isfinite(array).all():
        raise AdapterError(f"{port.name} in {path} holds NaN or infinity; the adapter is broken")
    return np.ascontiguousarray(array.reshape(shape))
