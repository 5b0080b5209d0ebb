"""Vectors cut up before a graph runs: those of a graph that onnx made, against the graph as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vera_edge.device.runtime.graph import GraphSettings
from vera_edge.device.runtime.resident import ResidentGraph
from vera_edge.device.runtime.vector_pieces import cut
from vera_edge.errors import BundleError

SIZES = (2, 3, 4)


def graph(path: Path, dtype: type[np.generic] = np.float16, total: int = 9, axis: int = -1) -> Path:
    """y = x * [b, a]: b is parts of one vector, by `Cast` and `Split`, and a another that is read whole."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = [f"part{number}" for number in range(len(SIZES))]
    nodes = [
        helper.make_node("Cast", ["v.lambda_b"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Split", ["wide", "sizes"], names, axis=axis),
        helper.make_node("Concat", [*reversed(names), "v.lora_A"], ["both"], axis=-1),
        helper.make_node("Mul", ["x", "both"], ["y"]),
    ]
    rows = ("rows", 1)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 1, 14)),
        helper.make_tensor_value_info("v.lambda_b", kind, (*rows, total)),
        helper.make_tensor_value_info("v.lora_A", TensorProto.FLOAT, (*rows, 5)),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 1, 14))
    zeros = [("v.lambda_b", np.zeros((1, 1, total), dtype)), ("v.lora_A", np.zeros((1, 1, 5), np.float32))]
    values = [*zeros, ("sizes", np.array(SIZES, np.int64))]
    constants = [numpy_helper.from_array(array, name) for name, array in values]
    made = helper.make_graph(nodes, "test", inputs, [output], constants)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_each_input_takes_its_piece(tmp_path: Path, dtype: type[np.generic]) -> None:
    path = graph(tmp_path / "model.onnx", dtype)
    made = cut(path, memoryview(path.read_bytes()))
    pieces = {name: (one.vector.name, one.start, one.stop) for name, one in made.pieces.items()}
    assert pieces == {
        "part0": ("v.lambda_b", 0, 2),
        "part1": ("v.lambda_b", 2, 5),
        "part2": ("v.lambda_b", 5, 9),
        "v.lora_A": ("v.lora_A", 0, 5),
    }
    model = onnx.load_from_string(made.model)
    assert [node.op_type for node in model.graph.node] == ["Concat", "Mul"]
    draw = np.random.default_rng(0)
    vectors = {
        "v.lambda_b": draw.standard_normal((1, 1, 9)).astype(dtype),
        "v.lora_A": draw.standard_normal((1, 1, 5)).astype(np.float32),
    }
    x = draw.standard_normal((2, 1, 14)).astype(np.float32)
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    opened = ResidentGraph(path, GraphSettings(threads=1))
    assert opened.vectors.keys() == vectors.keys() and not opened.options
    for resident in ({}, vectors, {"v.lora_A": vectors["v.lora_A"]}):
        opened.put(resident)
        np.testing.assert_array_equal(
            opened.session.run(None, {"x": x})[0], plain.run(None, {"x": x, **resident})[0]
        )


def test_another_axis_is_left_to_the_graph(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", axis=0)
    made = cut(path, memoryview(path.read_bytes()))
    assert {name: one.stop for name, one in made.pieces.items()} == {"wide": 9, "v.lora_A": 5}


def test_sizes_that_are_not_the_vectors_are_refused(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", total=10)
    with pytest.raises(BundleError, match="is cut into 9 values and has 10"):
        cut(path, memoryview(path.read_bytes()))
