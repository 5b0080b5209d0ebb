"""Unquantized weights against torch's own rounding and transformers' own Conv1D."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vera_edge import formats
from vera_edge.arrays import Float32
from vera_edge.errors import PlanError
from vera_edge.formats import dense
from vera_edge.storage.tensors import TensorFolder

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("either_way")


def folder_of(path: Path, **tensors: torch.Tensor) -> TensorFolder:
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, path / "model.safetensors")
    return TensorFolder.open(path)


def awkward_values() -> Float32:
    """Ties, subnormals, signed zeros, values next to overflow."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(4096).astype(np.float32) * np.exp2(rng.integers(-30, 15, 4096)).astype(
        np.float32
    )
    ties = (rng.integers(0, 1 << 16, 1024).astype(np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(
        np.float32
    )
    ties = ties[np.isfinite(ties) & (np.abs(ties) < 60000)]
    return np.concatenate([values, ties, np.array([0.0, -0.0, 6e-8, -6e-8, 65504.0], np.float32)])


@pytest.mark.parametrize("name", list(TORCH))
def test_rounds_as_torch_does(name: str) -> None:
    values = awkward_values()
    mine = dense.to_dtype(values, dense.DTYPES[name])
    theirs = torch.from_numpy(values).to(TORCH[name])
    assert mine.data.tobytes() == theirs.view(torch.uint8).numpy().tobytes()
    assert np.array_equal(mine.float32(), theirs.float().numpy())


@pytest.mark.parametrize("name", list(TORCH))
@pytest.mark.parametrize("transposed", [False, True])
def test_layout_and_rows(tmp_path: Path, name: str, transposed: bool) -> None:
    weight = np.random.default_rng(1).standard_normal((6, 10)).astype(np.float32)
    form = formats.get(name)
    options = form.options({"transposed": transposed})
    stored = form.quantize(weight, options)
    expected = torch.from_numpy(weight).to(TORCH[name]).float().numpy()
    assert stored.shape == (6, 10)
    assert np.array_equal(stored.rows(2, 5), expected[2:5])
    assert np.array_equal(formats.dequantize(stored), expected)
    tensor = stored.tensors()[".weight"]
    assert form.layout((6, 10), options) == {".weight": (tensor.dtype, tensor.shape)}
    assert tensor.shape == ((10, 6) if transposed else (6, 10))


def test_finds_linears_and_leaves_the_rest(tmp_path: Path) -> None:
    half = torch.float16
    tensors = folder_of(
        tmp_path,
        model__embed_tokens__weight=torch.zeros(8, 4),
        model__layers__0__mlp__fc__weight=torch.zeros(6, 4),
        model__layers__0__mlp__half__weight=torch.zeros(6, 4, dtype=half),
        model__layers__0__norm__weight=torch.zeros(4),
        model__layers__0__conv__weight=torch.zeros(4, 4, 3),
        model__layers__0__ids__weight=torch.zeros(6, 4, dtype=torch.int64),
        transformer__wte__weight=torch.zeros(8, 4),
        encoder__block__0__relative_attention_bias__weight=torch.zeros(8, 4),
        embed_out__weight=torch.zeros(8, 4),
        lm_head__weight=torch.zeros(8, 4),
    )
    found = formats.find_linears(tensors, {})
    assert {module: linear.format for module, linear in found.items()} == {
        "model.layers.0.mlp.fc": "fp32",
        "model.layers.0.mlp.half": "fp16",
        "embed_out": "fp32",
        "lm_head": "fp32",
    }
    assert found["model.layers.0.mlp.fc"].shape == (6, 4)


@pytest.mark.parametrize(
    ("family", "module", "shape", "bias", "transposed"),
    [
        ("gpt2", "h.0.attn.c_attn", (4, 12), 12, True),
        ("gpt2", "h.0.attn.c_proj", (4, 4), 4, True),  # square: only the family tells
        ("gpt2", "lm_head", (8, 4), None, False),
        ("gpt_bigcode", "h.0.attn.c_attn", (12, 4), 12, False),
        ("gpt_bigcode", "h.0.attn.c_proj", (4, 4), 4, False),
        ("gpt_neo", "h.0.mlp.c_fc", (16, 4), 16, False),
        ("own_model", "h.0.mlp.c_fc", (4, 16), 16, True),  # unknown family: the bias tells
        ("llama", "h.0.mlp.c_fc", (4, 16), None, False),
    ],
)
def test_conv1d_is_told_from_bias_or_family(
    tmp_path: Path, family: str, module: str, shape: tuple[int, int], bias: int | None, transposed: bool
) -> None:
    tensors = {f"{module}.weight": torch.zeros(shape)}
    if bias is not None:
        tensors[f"{module}.bias"] = torch.zeros(bias)
    save_file(tensors, tmp_path / "model.safetensors")
    found = formats.find_linears(TensorFolder.open(tmp_path), {"model_type": family})[module]
    assert found.transposed is transposed
    assert found.shape == (shape[::-1] if transposed else shape)


def test_conv1d_within_a_nested_config() -> None:
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    assert dense.is_conv1d_module("decoder.transformer.h.0.attn.c_attn", config)


def test_refuses_an_unknown_option() -> None:
    with pytest.raises(PlanError, match="bf16 takes no option 'blocksize'"):
        formats.get("bf16").options({"blocksize": 64})
