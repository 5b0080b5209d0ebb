"""ONNX Runtime sessions of float graphs, for as long as they're compared with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from vera_edge.arrays import Array
from vera_edge.device.runtime.graph import first_line
from vera_edge.errors import TargetError

Feeds = Mapping[str, Array]
INSTEAD = "merge the adapter (vera-edge merge) and export the result with a tool that carries what is missing"
_INLINE = 1 << 28  # bytes of weights in memory that are written into the graph's own file at most


def save(graph: ir.Model, path: Path) -> Path:
    """Write a graph, for a session and no longer; weights that lie in files of the same folder stay there."""
    tensors = [value.const_value for value in graph.graph.initializers.values()]
    inside = sum(
        tensor.nbytes
        for tensor in tensors
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    )
    ir.save(graph, path, external_data=f"{path.name}_data" if inside > _INLINE else None)
    return path


def opened(path: Path) -> Any:
    """An ONNX Runtime session of a graph. Raises TargetError when ONNX Runtime refuses it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as cause:  # onnxruntime's classes share no base but Exception
        raise TargetError(f"ONNX Runtime can't open the graph ({first_line(cause)}); {INSTEAD}") from None


def run(session: Any, names: Sequence[str] | None, feeds: Feeds) -> list[Array]:
    """Outputs by name, all for None. Raises TargetError when ONNX Runtime fails."""
    try:
        found: list[Array] = session.run(names, dict(feeds))
    except Exception as cause:  # as above
        raise TargetError(f"ONNX Runtime can't run the graph ({first_line(cause)}); {INSTEAD}") from None
    return found
