"""Products of uint8 and int8 that overflow on x86 without VNNI: weights, processors, and what is told.

Truth: integer arithmetic in numpy, and graphs that ONNX Runtime's own quantizer writes.
"""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from tests import tiny_encoder
from tests.conftest import Cli
from vera_edge.bundle import contents as bundle
from vera_edge.device.check import checks
from vera_edge.device.check.validate import validate
from vera_edge.device.runtime import int8_products
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.errors import BundleError, BundleWarning
from vera_edge.exporting import golden_vectors, target

Int8 = npt.NDArray[np.int8]


@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 3))))
def test_a_weight_overflows_where_two_neighbours_leave_16_bits(codes: Int8) -> None:
    reached = [
        int(x0) * int(w0) + int(x1) * int(w1)
        for upper, lower in itertools.pairwise(codes)
        for w0, w1 in zip(upper, lower, strict=True)
        for x0 in (0, 255)
        for x1 in (0, 255)
    ]
    leaves = any(not -(1 << 15) <= value < 1 << 15 for value in reached)
    assert int8_products.pairs_overflow(codes) == leaves


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float graph with a MatMul, a Gemm of a transposed weight and a Conv."""
    draw = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(draw.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("MatMul", ["x", "rows"], ["a"], "matmul"),
        helper.make_node("Gemm", ["a", "columns"], ["b"], "gemm", transB=1),
        helper.make_node("Reshape", ["b", "image"], ["c"]),
        helper.make_node("Conv", ["c", "kernel"], ["y"], "conv"),
    ]
    weights = [weight("rows", 24, 32), weight("columns", 48, 32), weight("kernel", 4, 3, 2, 2)]
    image = numpy_helper.from_array(np.array([-1, 3, 4, 4], np.int64), "image")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 24])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    made = helper.make_graph(nodes, "floats", [x], [y], [*weights, image])
    path = tmp_path_factory.mktemp("floats") / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def quantized(source: Path, out: Path, way: str, weights: str, narrow: bool = False) -> Path:
    """A graph by ONNX Runtime's own quantizer. way: "dynamic", "QDQ" or "QOperator"; narrow: to 7 bits."""
    kind = {"int8": quantization.QuantType.QInt8, "uint8": quantization.QuantType.QUInt8}[weights]
    given_to: dict[str, Any] = {
        "per_channel": way != "QOperator",
        "reduce_range": narrow,
        "weight_type": kind,
    }
    if way == "dynamic":
        quantization.quantize_dynamic(source, out, **given_to)
        return out

    class Reader(quantization.CalibrationDataReader):
        left = iter([{"x": np.random.default_rng(1).standard_normal((4, 24)).astype(np.float32)}])

        def get_next(self) -> Any:
            return next(self.left, None)

    form = quantization.QuantFormat[way]
    uint8 = quantization.QuantType.QUInt8
    quantization.quantize_static(source, out, Reader(), form, activation_type=uint8, **given_to)
    return out


@pytest.mark.parametrize("way", ["dynamic", "QDQ", "QOperator"])
def test_graphs_of_onnx_runtimes_quantizer_are_seen_through(way: str, floats: Path, tmp_path: Path) -> None:
    wide = int8_products.of_graph(quantized(floats, tmp_path / "wide.onnx", way, "int8"))
    assert len(wide.weights) == 3 and wide.overflowing == wide.weights
    narrow = int8_products.of_graph(quantized(floats, tmp_path / "narrow.onnx", way, "int8", narrow=True))
    assert len(narrow.weights) == 3 and not narrow.overflowing
    assert not int8_products.of_graph(quantized(floats, tmp_path / "u.onnx", way, "uint8")).weights
    assert not int8_products.of_graph(floats).weights
    assert int8_products.needs(tmp_path / "wide.onnx") == ("vnni",)
    assert int8_products.needs(tmp_path / "narrow.onnx") == ()


def test_an_int8_weight_beside_float_inputs_is_no_product_of_integers(tmp_path: Path) -> None:
    """Weights alone are dequantized: ONNX Runtime multiplies in float32."""
    codes = numpy_helper.from_array(np.full((8, 4), 127, np.int8), "w")
    scale = numpy_helper.from_array(np.ones((), np.float32), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"]),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
        helper.make_node("Gather", ["w", "ids"], ["looked_up"]),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], [codes, scale])), tmp_path / "m.onnx")
    assert not int8_products.of_graph(tmp_path / "m.onnx").weights


def product(codes: npt.NDArray[Any], x: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """x times codes in ONNX Runtime, as any program opens it."""
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    taken = helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", codes.shape[0]])
    given_back = helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", codes.shape[1]])
    made = helper.make_graph([node], "g", [taken], [given_back], [numpy_helper.from_array(codes, "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: npt.NDArray[np.int32] = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("width", [2, 33, 64, 130])
def test_this_processor_is_exact_where_no_pair_leaves_16_bits(rows: int, width: int) -> None:
    """And clips, or doesn't, as it says where one does."""
    draw = np.random.default_rng(width)
    x = draw.choice(np.array([0, 254, 255], np.uint8), (rows, width))
    codes = draw.integers(-64, 65, (width, 20)).astype(np.int8)
    codes[:, ::2] = np.where(np.arange(width)[:, None] % 2, 127, 1)  # 127 + 1 fits, 127 + 2 doesn't
    codes[:, 1::4] = np.where(np.arange(width)[:, None] % 2, -120, -8)
    assert not int8_products.pairs_overflow(codes)
    np.testing.assert_array_equal(product(codes, x), x.astype(np.int64) @ codes)
    full, top = np.full((width, 20), 127, np.int8), np.full((rows, width), 255, np.uint8)
    exact = bool((product(full, top) == 255 * 127 * width).all())
    assert exact is not int8_products.processor_clips()
    wide = (full.astype(np.int16) + 128).astype(np.uint8)
    np.testing.assert_array_equal(product(wide, top), 255 * 255 * np.full((rows, 20), width))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with golden vectors as exports with int8 activations were: weights use all of int8's range.

    Its graph is by ONNX Runtime's own quantizer. Beside it, in "new", an export as they are now.
    """
    root = tmp_path_factory.mktemp("old")
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, root)
    folder = root / "bundle"
    options = {"activations": "dynamic"}
    target.export(base, [(adapter, 1.0)], root / "new", weights="int8", options=options)
    target.export(base, [(adapter, 1.0)], folder, weights="fp32")
    source = folder / "onnx" / "model.onnx"
    quantization.quantize_dynamic(
        source,
        root / "old.onnx",
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    shutil.rmtree(folder / "onnx")
    (folder / "onnx").mkdir()
    shutil.copy(root / "old.onnx", source)
    new = bundle.read(root / "new")
    bundle.write(folder, bundle.change(new, cpu=None))
    golden_vectors.ask(folder, base, [(adapter, 1.0)], {"min_cosine": 0.99})
    return folder


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that clips; no machine is of both kinds, so its own answer is replaced."""
    monkeypatch.setattr(int8_products, "processor_clips", lambda: True)


def test_validate_finds_a_bundle_that_overflows(old: Path, clips: None, cli: Cli) -> None:
    result = cli("validate", old)
    assert result.exit_code == 3 and result.stderr.count("\n") == 1
    assert "13 of 13 products of uint8 and int8 overflow on this processor" in result.stderr
    assert "export the bundle again" in result.stderr and "int8 products" in result.stdout


def test_validate_judges_by_the_processor_at_hand(old: Path) -> None:
    result = validate(old)
    (check,) = (one for one in result.checks if one.name == "int8 products")
    assert check.passed is not int8_products.processor_clips()
    assert result.device["clips_int8"] is int8_products.processor_clips()
    assert check.detail.startswith("13 of 13 products of uint8 and int8 overflow on")
    drift = next(one for one in result.checks if one.name == "drift (model)")
    assert drift.passed  # vera-edge itself is exact, and slower


def test_opening_and_reading_it_warn_once_each(old: Path, clips: None, cli: Cli, tmp_path: Path) -> None:
    with pytest.warns(BundleWarning, match="int8 products that overflow on this processor") as caught:
        Encoder.open(old)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    for words in (["verify", old, "--json"], ["install", old, tmp_path], ["run", old, "base layer"]):
        result = cli(*words)
        assert result.exit_code == 0 and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("vera-edge: ") and "export it again" in result.stderr
    assert json.loads(cli("verify", old, "--json").stdout)["verified"] is True


def test_before_onnx_runtime_1_30_it_is_refused(
    old: Path, clips: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which left weights without a zero point as they were, or ended the process."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.29.0")
    with pytest.raises(BundleError, match=r"with onnxruntime 1\.29\.0; export it again, or update") as caught:
        Encoder.open(old)
    assert "\n" not in str(caught.value)


def test_what_cannot_overflow_is_opened_without_a_word(old: Path, clips: None, cli: Cli) -> None:
    new = old.parent / "new"
    assert bundle.read(new).cpu == [] and not bundle.read(new).needs_vnni
    with warnings.catch_warnings():
        warnings.simplefilter("error", BundleWarning)
        Encoder.open(new)
    (check,) = checks.int8_products(new / "onnx" / "model.onnx")
    assert check.passed and check.detail == "12 products of uint8 and int8, none of which can overflow"
    assert cli("verify", new).stderr == ""
    assert bundle.read(old).needs_vnni  # by its plan, since it says nothing itself
