"""int8 weights beside int8 activations in ONNX's own operators: single products, and whole encoders."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
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
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from tests import exported, tiny, tiny_encoder
from tests.conftest import Cli
from tests.unit.exporters.test_linear import Float32, drawn, graph
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime import int8_products
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.errors import CheckpointError, PlanError, TargetError
from vera_edge.exporting import target
from vera_edge.formats.bnb8 import Int8
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
from vera_edge_onnx.graph import storage
from vera_edge_onnx.weights.activations import Seen
from vera_edge_onnx.weights.qdq import Dynamic, RowCodes, Span, Static

KINDS = ("dynamic", "static")
FUSED = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
LINEARS = 2 * 6  # of the tiny encoder


def rows(out: int, width: int, seed: int = 0) -> tuple[RowCodes, Float32]:
    """int8 rows, and what they mean in float32."""
    made = Int8().quantize(drawn(out, width, seed=seed), {})
    return RowCodes.of([made]), made.rows(0, out)


def linear(kind: str, weight: RowCodes, x: Float32) -> Dynamic | Static:
    return (
        Dynamic(weight) if kind == "dynamic" else Static(weight, None, Span(float(x.min()), float(x.max())))
    )


def saved(linears: Sequence[Dynamic | Static], x: Float32, folder: Path) -> Path:
    """A graph that gives the products of several weights with the same x."""
    weaver, value, end = graph(x.shape[1], out=linears[0].rows.codes.shape[0])
    products = [one.product(weaver, value, f"w{n}", f"/w{n}", end) for n, one in enumerate(linears)]
    end.replace_input_with(0, products[0])
    weaver.model.graph.outputs.extend(products[1:])
    path = folder / "onnx" / "model.onnx"
    storage.save(weaver.model, path, weaver.finish())
    return path


def optimized(path: Path, folder: Path) -> Counter[str]:
    """How often each operator is in the graph that ONNX Runtime makes of this one."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return operators(Path(options.optimized_model_filepath))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_standard_and_of_rounded_values(kind: str, tmp_path: Path) -> None:
    x = drawn(5, 96, seed=1)
    weights = [rows(24, 96, seed) for seed in (2, 3)]
    path = saved([linear(kind, one, x) for one, _ in weights], x, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, {"x": x})
    standard = ReferenceEvaluator(str(path)).run(None, {"x": x})
    scale = (x.max() - x.min()) / np.float32(255)
    zero = np.clip(np.rint(-x.min() / scale), 0, 255)
    seen = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    for product, expected, (_, weight) in zip(found, standard, weights, strict=True):
        np.testing.assert_allclose(product, expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(product, seen @ weight.T, atol=1e-5 * np.abs(product).max())
        assert exported.error(product, x @ weight.T) < 0.02


@given(hnp.arrays(np.float32, (3, 9), elements=st.floats(-(2.0**60), 2.0**60, width=32)), st.booleans())
def test_fitting_rows_are_near_and_no_two_neighbours_leave_16_bits(matrix: Float32, same: bool) -> None:
    """`same`: all of one sign and size, which is the worst that a row can be."""
    matrix = np.broadcast_to(np.abs(matrix[:, :1]), matrix.shape) if same else matrix
    made = RowCodes.fitting(matrix)
    codes = made.codes.astype(np.int64)
    for left, right in ((codes[:, :-1], codes[:, 1:]), (codes[:, 1:], codes[:, :-1])):
        for one, other in ((0, 255), (255, 0), (255, 255)):
            sums = one * left + other * right
            assert sums.min(initial=0) >= -(1 << 15) and sums.max(initial=0) < 1 << 15
    # Half a step, and a step is at most the greatest magnitude over 63.5. Rows as small as 1e-36 become zero.
    error, size = np.abs(codes * made.scales[:, None] - matrix), np.abs(matrix).max(axis=1)
    assert (error.max(axis=1) <= size / 63.5 / 2 * 1.00001 + 2e-36).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["fitting", "own codes"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_products_are_sums_of_integers_whatever_the_processor(
    kind: str, form: str, count: int, tmp_path: Path
) -> None:
    """Weights and x that reach the ends of their ranges, on which kernels of 16 bits fail: the CPU at hand
    against integer arithmetic."""
    draw, width = np.random.default_rng(count), 130
    x = draw.choice(np.array([-1.0, 2.5, 3.0], np.float32), (count, width), p=[0.1, 0.1, 0.8])
    x[0, :2] = -1, 3
    matrix = draw.choice(np.array([-1.0, 0.5, 1.0], np.float32), (24, width), p=[0.1, 0.1, 0.8])
    weight = RowCodes.fitting(matrix) if form == "fitting" else RowCodes.nearest(matrix)
    assert int8_products.pairs_overflow(weight.codes.T) is (form != "fitting")
    path = saved([linear(kind, weight, x)] * 2, x, tmp_path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {"x": x})[0]
    scale, zero = np.float32(4) / np.float32(255), 64  # of the range -1 to 3
    codes = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64) - zero
    sums = codes @ weight.codes.T.astype(np.int64)
    expected = sums * (scale * weight.scales).astype(np.float64)
    # The sums are exact; three roundings to float32 are left: of the sum, of the scales' product, of theirs.
    np.testing.assert_allclose(found, expected, rtol=3 * 2**-23)
    assert int8_products.of_graph(path).overflowing == ()


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_fuses_a_product_and_x_is_rounded_once(kind: str, tmp_path: Path) -> None:
    x = drawn(5, 96, seed=1)
    path = saved([linear(kind, rows(24, 96, seed)[0], x) for seed in (2, 3)], x, tmp_path)
    rounds = "DynamicQuantizeLinear" if kind == "dynamic" else "QuantizeLinear"
    assert operators(path)[rounds] == 1
    assert optimized(path, tmp_path) == Counter({rounds: 1, "MatMulIntegerToFloat": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_levelled_channels_change_the_product_by_less(kind: str, tmp_path: Path) -> None:
    """Three channels of x are fifty times the others, and the product stays that of all of them."""
    x, weight = drawn(40, 96, seed=1), drawn(24, 96, seed=2)
    x[:, :3] *= 50
    seen = Seen(np.full(96, np.inf, np.float32), np.full(96, -np.inf, np.float32)).with_values(x)
    errors = []
    for name, levels in (("plain", None), ("levelled", seen.levels())):
        weights = RowCodes.nearest(weight if levels is None else weight * levels)
        one = Dynamic(weights, levels) if kind == "dynamic" else Static(weights, levels, seen.span(levels))
        path = saved([one, one], x, tmp_path / name)
        assert operators(path)["Mul"] == (levels is not None) + 4 * (kind == "dynamic")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found: Any = session.run(None, {"x": x})[0]
        standard: Any = ReferenceEvaluator(str(path)).run(None, {"x": x})
        np.testing.assert_allclose(found, standard[0], atol=1e-3 * np.abs(found).max())
        errors.append(np.square(found - x @ weight.T).mean())
    assert errors[1] < 0.2 * errors[0]


@given(hnp.arrays(np.float32, (5, 7), elements=st.floats(-(2.0**20), 2.0**20, width=32)))
def test_levels_only_shrink_and_keep_values_within_the_span(x: Float32) -> None:
    infinite = np.full(7, np.inf, np.float32)
    seen = Seen(infinite, -infinite).with_values(x)
    levels = seen.levels()
    assert (levels >= 1).all() and np.isfinite(levels).all()
    span = seen.span(levels)
    assert span.low <= (x / levels).min() and (x / levels).max() <= span.high
    assert max(abs(span.low), abs(span.high)) <= np.abs(x).max()


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.integers(0, 99))
def test_a_span_holds_its_values_and_zero(one: float, other: float, seed: int) -> None:
    low, high = min(one, other), max(one, other)
    scale, zero = Span(low, high).grid()
    values = np.array([0, low, high, *np.random.default_rng(seed).uniform(low, high, 8)])
    codes = np.rint(values / scale) + zero
    assert codes[0] == zero and scale > 0
    assert (codes >= -1).all() and (codes <= 256).all()  # the ends may round past by half a step
    assert np.abs((np.clip(codes, 0, 255) - zero) * scale - values).max() <= 1.01 * scale


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and adapter of a tiny BERT with a tokenizer."""
    return tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path_factory.mktemp("qdq"))


@pytest.fixture(scope="module")
def folders(
    encoder: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Exports by mode and activations."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    base, adapter = encoder
    for mode, kind in (
        ("merged", "float"),
        *((mode, kind) for mode in ("merged", "branch") for kind in KINDS),
    ):
        folder = root / f"{mode}-{kind}"
        weights, options = "fp32" if kind == "float" else "int8", {"activations": kind}
        if (mode, kind) == ("branch", "static"):
            options["vectors"] = "fp16"
        target.export(base, [(adapter, 1.0)], folder, mode=mode, weights=weights, options=options)
        made[mode, kind] = folder
    return made


def feeds(shape: tuple[int, int] = (2, 9)) -> dict[str, npt.NDArray[np.int64]]:
    ids = np.random.default_rng(1).integers(3, 160, shape)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def peft(base: Path, adapter: Path, active: bool = True) -> Float32:
    """PEFT's own last hidden states for `feeds`."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_encoder.EMBEDDINGS.load(base), adapter).eval()
    inputs = {name: torch.from_numpy(value) for name, value in feeds().items()}
    with torch.no_grad():
        if active:
            return np.asarray(model(**inputs).last_hidden_state)
        with model.disable_adapter():
            return np.asarray(model(**inputs).last_hidden_state)


def run(folder: Path, adapter: bool = False) -> Float32:
    options = onnxruntime.RunOptions()
    if adapter:
        vectors = onnxruntime.LoraAdapter()
        vectors.Load(str(folder / "adapters" / "default.onnx_adapter"))
        options.add_active_adapter(vectors)
    found: Float32 = exported.session(folder).run(["last_hidden_state"], feeds(), options)[0]
    return found


def cosine(one: Float32, other: Float32) -> float:
    """The least of the cosines of two sets of vectors."""
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / norms).min())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_encoders_agree_with_peft_and_the_standard(
    kind: str, encoder: tuple[Path, Path], folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = folders["merged", kind]
    path = folder / "onnx" / "model.onnx"
    found = run(folder)
    assert cosine(found, peft(*encoder)) > 0.999
    assert (
        cosine(peft(*encoder, active=False), peft(*encoder)) < 0.9
    )  # so that a lost adapter would have failed
    names = [value.name for value in exported.session(folder).get_outputs()]
    standard = dict(zip(names, ReferenceEvaluator(str(path)).run(None, feeds()), strict=True))
    # A value at the middle of two codes may fall either way.
    assert cosine(found, standard["last_hidden_state"]) > 0.99999
    assert {node.domain for node in onnx.load(path, load_external_data=False).graph.node} == {""}
    assert exported.check(folder, feeds()) > 20
    assert sum(optimized(path, tmp_path)[op] for op in FUSED) == LINEARS


@pytest.mark.parametrize(("mode", "kind"), [(mode, kind) for mode in ("merged", "branch") for kind in KINDS])
def test_no_weight_of_an_export_can_overflow(
    mode: str, kind: str, folders: dict[tuple[str, str], Path]
) -> None:
    """Read off the initializers: 255 times two neighbours of one sign fits into 16 bits, on any processor."""
    folder = folders[mode, kind]
    model = onnx.load(folder / "onnx" / "model.onnx")
    read = {name for node in model.graph.node for name in node.input if "Integer" in node.op_type}
    read |= {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    weights = {one.name: one for one in model.graph.initializer if one.name in read and len(one.dims) == 2}
    assert len(weights) == LINEARS
    for one in weights.values():
        codes = onnx.numpy_helper.to_array(one).astype(np.int64)  # (in, out)
        assert one.data_type == onnx.TensorProto.INT8 and np.abs(codes).max() > 90  # not merely in 7 bits
        for sign in (1, -1):
            part = np.maximum(sign * codes, 0)
            assert (255 * (part[:-1] + part[1:])).max() < 1 << 15
    manifest = bundle.read(folder)
    assert manifest.cpu == [] and not manifest.needs_vnni


@pytest.mark.parametrize("kind", KINDS)
def test_branches_agree_with_peft_with_and_without_the_adapter(
    kind: str, encoder: tuple[Path, Path], folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = folders["branch", kind]
    assert cosine(run(folder, adapter=True), peft(*encoder)) > 0.999
    assert cosine(run(folder), peft(*encoder, active=False)) > 0.999
    path = folder / "onnx" / "model.onnx"
    assert sum(optimized(path, tmp_path)[op] for op in FUSED) == LINEARS
    assert exported.check(folder, feeds()) > 20
    assert Encoder.open(folder).embed(tiny_encoder.TEXTS).shape == (5, 32)
    assert bundle.read(folder).vector_dtype == ("float16" if kind == "static" else "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtimes_own_quantizer_writes_the_same_kinds_of_nodes(
    kind: str, encoder: tuple[Path, Path], folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Beside the same weights the two differ in embeddings, which theirs leaves in float32, and in ranges."""
    from onnxruntime import quantization

    source, out = folders["merged", "float"] / "onnx" / "model.onnx", tmp_path / "theirs.onnx"
    int8, uint8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
    shared: dict[str, Any] = {"per_channel": True, "weight_type": int8, "op_types_to_quantize": ["MatMul"]}
    shared["extra_options"] = {"MatMulConstBOnly": True}
    if kind == "dynamic":
        quantization.quantize_dynamic(source, out, **shared)
        wanted = {"DynamicQuantizeLinear", "MatMulInteger"}
    else:

        class Reader(quantization.CalibrationDataReader):
            left = iter([feeds((1, 24)), feeds()])

            def get_next(self) -> Any:
                return next(self.left, None)

        quantization.quantize_static(source, out, Reader(), activation_type=uint8, **shared)
        wanted = {"QuantizeLinear", "DequantizeLinear"}
    theirs = operators(out)
    ours = operators(folders["merged", kind] / "onnx" / "model.onnx")
    assert wanted == {op for op in ours if op in theirs and ("uantize" in op or "Integer" in op)}
    exact = onnxruntime.SessionOptions()
    exact.add_session_config_entry("session.x64quantprecision", "1")  # theirs overflow on x86 without VNNI
    session = onnxruntime.InferenceSession(out, exact, providers=["CPUExecutionProvider"])
    assert cosine(run(folders["merged", kind]), session.run(["last_hidden_state"], feeds())[0]) > 0.999


def test_a_base_in_llm_int8_keeps_its_codes(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = encoder
    merge_to_folder(merge.prepare(base, [(adapter, 1.0)], "int8"), tmp_path / "int8")
    tiny_encoder.save_tokenizer(tmp_path / "int8")
    other = tiny_encoder.EMBEDDINGS.adapted(base, tmp_path / "adapter")
    out = tmp_path / "out"
    options = {"activations": "dynamic"}
    target.export(tmp_path / "int8", [(other, 1.0)], out, mode="branch", weights="same", options=options)
    checkpoint = Checkpoint.open(tmp_path / "int8")
    module = "encoder.layer.1.output.dense"
    own: Any = checkpoint.load(module)
    assert int8_products.pairs_overflow(own.codes.T)  # so they are written as uint8, whose products never do
    stored = exported.data(out, f"{module}.weight.uint8").reshape(own.shape[::-1]).T
    np.testing.assert_array_equal(stored.astype(int) - 128, own.codes)
    graph = onnx.load(out / "onnx" / "model.onnx").graph
    zeros = [one for one in graph.initializer if one.name == f"{module}.weight.zero_point"]
    assert [int(onnx.numpy_helper.to_array(one)) for one in zeros] == [128]
    assert bundle.read(out).cpu == []


def test_weights_are_rounded_with_care_when_asked_and_the_plan_says_what_is_read(
    encoder: tuple[Path, Path], folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    base, adapter = encoder
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny_encoder.TEXTS * 12))
    roundings = {"rtn": Rounding("rtn"), "gptq": Rounding("gptq", str(text), tokens=512)}
    for method, rounding in roundings.items():
        out, options = tmp_path / method, {"activations": "static"}
        made = target.export(base, [(adapter, 1.0)], out, weights="int8", options=options, rounding=rounding)
        assert any(note.endswith(f"tokens of {rounding.text} text") for note in made.notes)
        assert cosine(run(out), peft(*encoder)) > 0.999
        read = {step.activations for step in made.plan.steps if step.result == "int8"}
        assert read == {"static"} and made.plan.to_dict() == bundle.read(out).plan
    # To nearest is what an exporter does by itself; twice the same is the same bytes.
    assert bundle.read(tmp_path / "rtn").files == bundle.read(folders["merged", "static"]).files
    name = "encoder.layer.0.output.dense.weight"
    nearest = exported.data(tmp_path / "rtn", f"{name}.int8").view(np.int8).astype(int)
    assert (nearest != exported.data(tmp_path / "gptq", f"{name}.uint8").astype(int) - 128).any()


def test_a_model_that_computes_no_numbers_is_refused(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = encoder
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["encoder.layer.0.output.LayerNorm.weight"] *= np.float32(1e38)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="computes NaN or infinity") as caught:
        target.export(tmp_path / "base", [(adapter, 1.0)], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_adapter_that_computes_no_numbers_is_refused(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = encoder
    shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    wild = {name: array * np.float32(1e30) if "lambda" in name else array for name, array in tensors.items()}
    save_file(wild, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="computes NaN or infinity") as caught:
        target.export(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out", mode="branch")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_refused_in_one_sentence(
    encoder: tuple[Path, Path], tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    base, adapter = encoder
    for options, words in (
        (["--weights", "fp32", "--activations", "dynamic"], "dynamic activations go with int8 weights"),
        (["--weights", "int8", "--block", "64", "--activations", "static"], "leave block and symmetric out"),
    ):
        result = cli("export", base, adapter, "-o", tmp_path / "out", *options)
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    with pytest.raises(TargetError, match="a decoder's int8 products round what they read by themselves"):
        target.export(
            tiny_llama.fp32,
            [(tiny_adapter, 1.0)],
            tmp_path / "out",
            weights="int8",
            options={"activations": "dynamic"},
        )
    with pytest.raises(PlanError, match="choose from float, dynamic, static"):
        target.export(
            base, [(adapter, 1.0)], tmp_path / "out", weights="int8", options={"activations": "int8"}
        )
    assert not (tmp_path / "out").exists()
