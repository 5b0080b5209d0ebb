"""An ONNX file read without the onnx package, against the onnx package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vera_edge.device.runtime.onnx_file import INT8, OnnxFile
from vera_edge.errors import BundleError

CODES = np.arange(-60, 60, dtype=np.int8).reshape(12, 10)


def graph() -> Any:
    """A model with an int8 weight stored as bytes, one as numbers, and one within a branch."""
    raw, other = numpy_helper.from_array(CODES, "raw"), numpy_helper.from_array(CODES.T.copy(), "inner")
    numbers = helper.make_tensor("numbers", TensorProto.INT8, CODES.shape, CODES.reshape(-1).tolist())
    wide = numpy_helper.from_array(np.ones((3, 4), np.float32), "wide")
    product = helper.make_node("MatMulInteger", ["x", "raw"], ["y"], name="first")
    then = helper.make_graph(
        [helper.make_node("MatMulInteger", ["y8", "inner"], ["z"])],
        "then",
        [],
        [helper.make_tensor_value_info("z", TensorProto.INT32, None)],
        [other],
    )
    nodes = [product, helper.make_node("If", ["c"], ["z"], then_branch=then, else_branch=then)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", 12])]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, [], [raw, numbers, wide]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(graph(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("external", [False, True])
def test_nodes_and_int8_weights_are_those_of_the_onnx_package(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    kept: dict[str, Any] = {"save_as_external_data": True, "location": "data", "size_threshold": 0}
    onnx.save(graph(), path, **(kept if external else {}))
    found = OnnxFile.read(path)
    ops = [(node.op, node.inputs, node.outputs) for node in found.nodes]
    assert ("MatMulInteger", ("x", "raw"), ("y",)) in ops and (
        "MatMulInteger",
        ("y8", "inner"),
        ("z",),
    ) in ops
    for name, codes in (("raw", CODES), ("numbers", CODES), ("inner", CODES.T)):
        assert found.initializers[name].dtype == INT8
        np.testing.assert_array_equal(found.int8(name), codes)
    assert found.initializers["wide"].dtype == TensorProto.FLOAT
    if external:
        (tmp_path / "data").unlink()
        assert found.int8("raw") is None


def test_a_weight_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graph(), path, save_as_external_data=True, location="data", size_threshold=0)
    (tmp_path / "data").write_bytes((tmp_path / "data").read_bytes()[:50])
    with pytest.raises(BundleError, match=r"holds no sound (raw|numbers)") as caught:
        for name in ("raw", "numbers"):
            OnnxFile.read(path).int8(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"PK\x03\x04 not a model", b"\x3a\x05ab"])
def test_what_is_no_graph_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="isn't an ONNX graph") as caught:
        OnnxFile.read(path)
    assert "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_is_told_or_harmless(data: st.DataObject, path: Path, tmp_path: Path) -> None:
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(whole[: data.draw(st.integers(1, len(whole)))])
    try:
        found = OnnxFile.read(damaged)
        for name, one in found.initializers.items():
            if one.dtype == INT8:
                found.int8(name)
    except BundleError as error:
        assert "\n" not in str(error)
