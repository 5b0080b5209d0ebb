"""Graphs as small as can be, for readers that hold what they read to a graph."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.device.runtime.graph import Graph, GraphSettings

WORDS, HEADS, SIZE, HIDDEN = 16, 2, 4, 8


@cache
def scratch() -> Path:
    """A folder until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="vera-edge-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def opened(path: str) -> Graph:
    """A graph, opened once."""
    return Graph(Path(path), GraphSettings(threads=1))


def write_branch(path: Path) -> None:
    """A graph that takes an adapter's two vectors, with zeros for a default."""
    from onnx import TensorProto, helper, numpy_helper

    vectors = {"vera.lambda_b": 6, "vera.lambda_d": 4}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, n]) for name, n in vectors.items()
    ]
    zeros = [numpy_helper.from_array(np.zeros((1, 1, n), np.float32), name) for name, n in vectors.items()]
    node = helper.make_node("Concat", list(vectors), ["y"], axis=2)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 10])
    _save(path, [node], inputs, [out], zeros)


def write_decoder(path: Path) -> None:
    """A decoder in form only: a token's logits are its row of a table, the cache goes through."""
    from onnx import TensorProto, helper, numpy_helper

    def port(name: str, kind: int, shape: list[int | str]) -> object:
        return helper.make_tensor_value_info(name, kind, shape)

    past: list[int | str] = ["b", HEADS, "t", SIZE]
    inputs = [
        port("input_ids", TensorProto.INT64, ["b", "n"]),
        port("attention_mask", TensorProto.INT64, ["b", "m"]),
    ]
    outputs = [port("logits", TensorProto.FLOAT, ["b", "n", WORDS])]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"], axis=0)]
    for part in ("key", "value"):
        inputs.append(port(f"past_key_values.0.{part}", TensorProto.FLOAT, past))
        outputs.append(port(f"present.0.{part}", TensorProto.FLOAT, past))
        nodes.append(helper.make_node("Identity", [f"past_key_values.0.{part}"], [f"present.0.{part}"]))
    table = numpy_helper.from_array(np.eye(WORDS, dtype=np.float32), "table")
    _save(path, nodes, inputs, outputs, [table])


def write_encoder(path: Path, gives: str) -> None:
    """An encoder in form only: hidden states are rows of a table, class logits their mean."""
    from onnx import TensorProto, helper, numpy_helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "n"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "n"])
    table = numpy_helper.from_array(np.eye(WORDS, HIDDEN, dtype=np.float32), "table")
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["hidden"], axis=0)]
    shape: list[int | str] = ["b", "n", HIDDEN]
    if gives == "logits":
        nodes.append(helper.make_node("ReduceMean", ["hidden"], ["logits"], axes=[1], keepdims=0))
        shape = ["b", HIDDEN]
    else:
        nodes[0].output[0] = gives
    out = helper.make_tensor_value_info(gives, TensorProto.FLOAT, shape)
    _save(path, nodes, [ids, mask], [out], [table])


def _save(path: Path, nodes: Any, inputs: Any, outputs: Any, initializers: Any) -> None:
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, "fuzz", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
