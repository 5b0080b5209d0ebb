"""What the tables of scripts/bench_decode take from elsewhere: losses, and how much a token reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from scripts.bench_decode_rows import BUILDER, GGUF_WAYS, WAYS, lost, read_bytes


def test_every_loss_that_a_row_names_stands_in_the_drift_table() -> None:
    found = lost()
    named = {way.name for way in WAYS if way.drift or way.lost} | {way.name for way in GGUF_WAYS}
    assert named | {BUILDER} == found.keys()
    assert found["branch nf4"] == "0.0%"


def test_a_token_reads_each_weight_once_and_rows_of_tables(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "table": np.zeros((50, 8), np.float32),
        "weight": np.zeros((8, 8), np.float32),
        "packed": np.zeros(64 * 32 // 2, np.uint8),
        "absmax": np.zeros(64 * 32 // 64, np.float32),
    }
    sizes: dict[str, Any] = {"K": 64, "N": 32, "block_size": 64, "quant_type": 1}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node("MatMul", ["y", "weight"], ["z"]),
        helper.make_node("MatMulBnb4", ["w", "packed", "absmax"], ["v"], domain="com.microsoft", **sizes),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [1, 64]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, [], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "m.onnx")
    plain = 8 * 8 * 4 + 64 * 32 // 2 + 32 * 4
    assert read_bytes(tmp_path / "m.onnx") == plain
    assert read_bytes(tmp_path / "m.onnx", expanded=True) == 8 * 8 * 4 + 64 * 32 + 64 * 32 // 32 * 4
