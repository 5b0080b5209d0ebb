"""A base for training: the very values that are stored, in ordinary layers, and what the runtime rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import vera_edge
from tests import tiny
from vera_edge.adapters import reading
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.trained import provenance
from vera_edge.training import load


@pytest.fixture(scope="module")
def integers(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in GPTQ's integers, with zero points."""
    folder = tmp_path_factory.mktemp("integers")
    (folder / "text.txt").write_text(tiny.TEXT * 8)
    vera_edge.quantize(
        tiny_llama.fp32, out=folder / "gptq", to="gptq", calibration=folder / "text.txt", effort="quick"
    )
    return folder / "gptq"


def unpacked(words: Any, axis: int) -> Any:
    """AutoGPTQ's 4-bit fields, lowest first, along an axis."""
    fields = [(words.view(np.uint32) >> np.uint32(4 * place)) & np.uint32(15) for place in range(8)]
    return np.stack(fields, axis=axis + 1).reshape(
        [size * (8 if n == axis else 1) for n, size in enumerate(words.shape)]
    )


def test_gptq_has_the_values_that_autogptq_dequantizes_to(integers: Path) -> None:
    tensors, model = load_file(integers / "model.safetensors"), load(integers)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        codes = unpacked(tensors[f"{module}.qweight"], 0).astype(np.float32)
        zeros = (unpacked(tensors[f"{module}.qzeros"], 1) + 1).astype(np.float32)  # v1 stores them less one
        groups, scales = tensors[f"{module}.g_idx"], tensors[f"{module}.scales"].astype(np.float32)
        expected = scales[groups] * (codes - zeros[groups])
        assert zeros.max() <= 15
        assert np.array_equal(model.get_submodule(module).weight.numpy().T, expected), module


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_of_bitsandbytes_has_the_values_that_it_dequantizes_to(
    kind: str, tiny_llama: tiny.TinyLlama
) -> None:
    from bitsandbytes import functional

    folder = getattr(tiny_llama, kind)
    model, theirs = load(folder), tiny.load(folder)
    for name, layer in model.named_modules():
        # bitsandbytes 0.50 reads NF4 wrongly on a CPU where blocks run over row ends (docs/requantize.md).
        if not hasattr(layer, "compute_dtype") or (kind == "nf4" and layer.in_features % 64):
            continue
        weight = theirs.get_submodule(name).weight
        if kind == "nf4":
            expected = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            expected = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        assert np.allclose(layer.weight.numpy(), expected.float().numpy(), rtol=2e-7, atol=0), name


def test_the_layers_are_ordinary_and_frozen(integers: Path) -> None:
    import torch

    model = load(integers)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == str(integers)
    half = load(integers, dtype="bfloat16")
    for (name, ours), rounded in zip(model.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), rounded), name


@pytest.mark.parametrize(
    ("dtype", "compute"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_peft_rounds_the_projections_as_is_inferred_later(
    dtype: str, compute: str, integers: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """They are saved with the adapter here, so what PEFT did is seen, and held against what is inferred."""
    from peft import VeraConfig, get_peft_model

    base = integers
    if compute != "float32":
        base = tiny.quantize(tiny_llama.fp32, tmp_path / "base", **tiny.four_bit("nf4", compute=compute))
    config = VeraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(base, dtype=dtype), config).save_pretrained(tmp_path / "adapter")
    adapter, checkpoint = reading.read(tmp_path / "adapter"), Checkpoint.open(base)
    found = provenance.resolve_for_command(adapter, checkpoint)
    assert found.verified
    assert found.spec.rounding == compute
    assert not found.notes  # among which would be that the two differ


def onnx_product(folder: Path, module: str, x: Any) -> Any:
    """x through ONNX Runtime's own MatMulNBits, on a layer's stored integers, accuracy level 4."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from vera_edge.formats.affine import HoldsIntegers

    weight = Checkpoint.open(folder).load(module)
    assert isinstance(weight, HoldsIntegers)
    grid = weight.integers().grid
    (out, inside), blocks = grid.codes.shape, grid.scales.shape[1]
    pairs = grid.codes.reshape(out, blocks, -1, 2)
    zeros = np.pad(grid.zeros.astype(np.uint8), [(0, 0), (0, blocks % 2)]).reshape(out, -1, 2)
    arrays = {
        "codes": (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8),
        "scales": grid.scales.astype(np.float32),
        "zeros": (zeros[..., 0] | zeros[..., 1] << 4).astype(np.uint8),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=inside,
        N=out,
        bits=4,
        block_size=inside // blocks,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, inside])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, out])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=9,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_rounded_forward_is_that_of_onnx_runtime(module: str, rows: int, integers: Path) -> None:
    import torch

    exact = load(integers).get_submodule(module)
    rounded = load(integers, activations="int8").get_submodule(module)
    x = np.random.default_rng(3).standard_normal((rows, exact.in_features)).astype(np.float32)
    x[:, 5] *= 40  # an outlier, so that rounding is felt in its block alone
    x[0, :32] = 0
    with torch.no_grad():
        floats, ours = (layer(torch.from_numpy(x)).numpy() for layer in (exact, rounded))
    theirs = onnx_product(integers, module, x)
    rounding = np.linalg.norm(floats - theirs)
    assert rounding > 1e-3 * np.linalg.norm(floats)  # the runtime does round
    assert np.linalg.norm(ours - theirs) < 0.01 * rounding


def test_gradients_pass_straight_through(integers: Path) -> None:
    import torch

    layer = load(integers, activations="int8").model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "dtype 'float16' isn't one to train on; choose float32 or bfloat16"),
        ({"activations": "int4"}, "activations 'int4' aren't known; choose int8"),
        ({"activations": "int8"}, "none is stored in integers"),
    ],
)
def test_what_cant_be_had_is_refused(options: dict[str, Any], says: str, tiny_llama: tiny.TinyLlama) -> None:
    with pytest.raises(PlanError, match=says):
        load(tiny_llama.nf4, **options)


def test_a_base_is_quantized_as_it_is_loaded_where_that_is_said(tiny_llama: tiny.TinyLlama) -> None:
    import torch

    one, other = load(tiny_llama.fp32, trained_as="nf4,double"), load(tiny_llama.nf4)
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
