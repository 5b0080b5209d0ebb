"""External data beyond what 31 bits count: written, and read where it was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from vera_edge_onnx.graph import storage

HUGE = (1 << 31) + (1 << 20)  # bytes


class Hole(ir.ExternalTensor):
    """Zeros that nobody holds in memory: written, they are a hole of the file."""

    def __init__(self, name: str) -> None:
        super().__init__("nowhere", 0, HUGE, ir.DataType.UINT8, shape=ir.Shape([HUGE]), name=name)

    def tofile(self, file: Any) -> None:
        file.seek(HUGE, os.SEEK_CUR)


def value(name: str, kind: ir.DataType, shape: list[int | str], tensor: Any = None) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=tensor)


def test_weights_lie_beyond_two_gibibytes(tmp_path: Path) -> None:
    """Two holes with random weights behind each: offsets over 2^31 and over 2^32."""
    draw = np.random.default_rng(0)
    weights = {name: draw.standard_normal((64, 512)).astype(np.float32) for name in ("b", "d")}
    initializers = [
        value(name, ir.DataType.UINT8, [HUGE], Hole(name))
        if name in "ac"
        else value(name, ir.DataType.FLOAT, [64, 512], ir.tensor(weights[name], name=name))
        for name in "abcd"
    ]
    at = value("at", ir.DataType.INT64, ["count"])
    nodes = [ir.node("Gather", [one, at], name=f"take_{one.name}") for one in initializers]
    for node, one in zip(nodes, initializers, strict=True):
        assert one.dtype is not None
        output = node.outputs[0]
        output.name, output.type = f"{one.name}_rows", ir.TensorType(one.dtype)
        output.shape = ir.Shape(["count", *list(one.shape or [])[1:]])
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        [at], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="large"
    )
    path = tmp_path / "onnx" / "model.onnx"
    storage.save(ir.Model(graph, ir_version=10), path, {})

    data = path.with_name("model.onnx_data")
    assert data.stat().st_size > 2 * HUGE and data.stat().st_blocks * 512 < 16 << 20
    offsets = {
        tensor.name: int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    }
    assert offsets["b"] > 1 << 31 and offsets["d"] > 1 << 32
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = np.array([0, 63, 17])
    found = dict(zip("abcd", session.run(None, {"at": rows}), strict=True))
    for name, weight in weights.items():
        np.testing.assert_array_equal(found[name], weight[rows])
    assert not found["a"].any() and not found["c"].any()
