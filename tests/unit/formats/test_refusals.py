"""Checkpoints that contradict themselves: one sentence each, before a wrong value is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, FormatError
from vera_edge.storage.tensors import write_header

GOLDEN = Path(__file__).parents[2] / "golden" / "formats"
MODULE = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Any], dict[str, Any]], object]


def _changed(golden: str, folder: Path, change: Change) -> Path:
    """A golden checkpoint after `change(quantization_config, tensors by suffix)`."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    source = GOLDEN / golden
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    with safe_open(source / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = {
        name.removeprefix(f"{MODULE}."): value
        for name, value in load_file(source / "model.safetensors").items()
    }
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {f"{MODULE}.{name}": value.contiguous() for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata,
    )
    return folder


def _set(**facts: Any) -> Change:
    return lambda config, tensors: config.update(facts)


def _drop(name: str) -> Change:
    return lambda config, tensors: tensors.pop(name)


def _poke(name: str, value: float) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1)[0] = value

    return change


def _cut(name: str, dimension: int = 0) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        size = tensors[name].shape[dimension]
        tensors[name] = tensors[name].narrow(dimension, 0, size - 1).clone()

    return change


def _cast(name: str, dtype: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        import torch

        tensors[name] = tensors[name].to(getattr(torch, dtype))

    return change


def _weights(**facts: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"]["weights"].update(facts)


def _group(**facts: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"].update(facts)


NAN, INF = float("nan"), float("inf")
GPTQ, ACT = "gptq/b4-sym-gptq", "gptq/b4-asym-actorder-gptq_v2"
W4, ASYM, W8, FP8_CT = (
    f"compressed_tensors/{name}" for name in ("w4a16", "w4a16-asym", "w8a8", "fp8-dynamic")
)
HQQ, AO = "hqq/b4-g64-axis1", "torchao/int8-weight-only"
CASES: list[tuple[str, Change, type[CheckpointError], str]] = [
    (GPTQ, _set(checkpoint_format="gptq_v3"), FormatError, "format 'gptq_v3' isn't known"),
    (GPTQ, _set(is_marlin_format=True), FormatError, "format 'marlin' isn't known"),
    (GPTQ, _set(bits=5), FormatError, "GPTQ with 5 bits isn't known"),
    (GPTQ, _set(pack_dtype="int16"), FormatError, "packed in another way"),
    (GPTQ, _set(bits=8), CheckpointError, "isn't 64 inputs of 8 bits"),
    (
        GPTQ,
        _set(group_size=24),
        CheckpointError,
        r"has shape \[2, 32\], but 4 bits in groups of 24 asks for \[3, 32\]",
    ),
    (
        GPTQ,
        _set(group_size=16),
        CheckpointError,
        r"scales .* shape \[2, 32\], but 4 bits in groups of 16 asks",
    ),
    (GPTQ, _set(group_size="all"), CheckpointError, "group size 'all' isn't a positive number"),
    (GPTQ, _drop("scales"), CheckpointError, "up_proj.scales .scales. is missing"),
    (GPTQ, _drop("qzeros"), CheckpointError, "up_proj.qzeros .qzeros. is missing"),
    (GPTQ, _cut("qzeros", 1), CheckpointError, "qzeros in .* asks for"),
    (GPTQ, _cast("scales", "float64"), CheckpointError, "dtype F64 where BF16 or F16 or F32 belongs"),
    (GPTQ, _poke("scales", NAN), CheckpointError, "scales in .* holds NaN or infinite"),
    (GPTQ, _poke("scales", INF), CheckpointError, "scales in .* holds NaN or infinite"),
    (ACT, _drop("g_idx"), CheckpointError, "act-order, but its tensor"),
    (ACT, _poke("g_idx", 2), CheckpointError, "names group 2 where there are 2"),
    (ACT, _poke("g_idx", -1), CheckpointError, "names group -1 where there are 2"),
    (ACT, _cut("g_idx"), CheckpointError, "isn't 63 inputs of 4 bits"),
    ("awq/gemm", _set(version="gemv_fast"), FormatError, "AWQ version 'gemv_fast' isn't known"),
    ("awq/gemm", _set(bits=3), FormatError, "AWQ with 3 bits"),
    ("awq/gemm", _set(zero_point=False), FormatError, "zero_point=False isn't known"),
    ("awq/gemm", _set(group_size=48), CheckpointError, "a group size of 48 doesn't divide"),
    ("awq/gemm", _set(group_size=64), CheckpointError, "qzeros .* groups of 64"),
    ("awq/gemm", _drop("qzeros"), CheckpointError, "qzeros .qzeros. is missing"),
    ("awq/gemm", _poke("scales", NAN), CheckpointError, "NaN or infinite"),
    ("awq/gemm", _set(quant_method="gptq"), CheckpointError, "isn't|asks for"),
    (W4, _set(quantization_status="frozen"), FormatError, "weights not yet rounded"),
    (W4, _set(config_groups={}), FormatError, "has no config_groups"),
    (W4, _set(transform_config={"config_groups": {}, "x": 1}), FormatError, "transforms its weights"),
    (W4, _set(sparsity_config={"format": "sparse-24-bitmask"}), FormatError, "sparsity 'sparse-24-bitmask'"),
    (W4, _group(format="nvfp4-pack-quantized"), FormatError, "nvfp4-pack-quantized with int4"),
    (W4, _group(targets=["re:.*down_proj"]), CheckpointError, "no config group of config.json names it"),
    (W4, _group(targets=["re:("]), FormatError, "is no pattern"),
    (W4, _weights(num_bits=3), FormatError, "int3 weights"),
    (W4, _weights(num_bits=8), CheckpointError, "8-bit codes"),
    (W4, _weights(group_size=48), CheckpointError, "a group size of 48 doesn't divide"),
    (W4, _weights(group_size=16), CheckpointError, r"weight_scale .* but its scheme .* asks for \[24, 4\]"),
    (W4, _weights(symmetric=False), CheckpointError, "weight_zero_point .* is missing"),
    (W4, _poke("weight_shape", 25), CheckpointError, "says .* is 25 x 64"),
    (W4, _poke("weight_scale", NAN), CheckpointError, "NaN or infinite"),
    (ASYM, _cut("weight_zero_point"), CheckpointError, "weight_zero_point in .* asks for"),
    (
        "compressed_tensors/w4a16-actorder",
        _poke("weight_g_idx", 7),
        CheckpointError,
        "a group outside 0 to 1",
    ),
    (W8, _drop("weight_scale"), CheckpointError, "weight_scale .* is missing"),
    (W8, _group(format="pack-quantized"), CheckpointError, "weight_packed .* is missing"),
    (FP8_CT, _weights(type="int"), CheckpointError, "dtype F8_E4M3 where I8 belongs"),
    ("fp8/block", _set(weight_block_size=[32]), FormatError, "where two positive numbers belong"),
    ("fp8/block", _set(weight_block_size=[16, 32]), CheckpointError, "blocks of 16 x 32 asks for"),
    ("fp8/block", _set(weight_block_size=None), CheckpointError, "one scale for the tensor asks for"),
    ("fp8/block", _set(fmt="e5m2"), FormatError, "FP8 format 'e5m2' isn't known"),
    ("fp8/block", _drop("weight_scale_inv"), CheckpointError, "weight_scale_inv .* is missing"),
    ("fp8/block", _poke("weight_scale_inv", NAN), CheckpointError, "NaN or infinite"),
    (HQQ, _drop("zero"), CheckpointError, "zero .zero. is missing"),
    (HQQ, _drop("packing"), CheckpointError, "packing is missing"),
    (HQQ, _poke("packing", 57), FormatError, "packing '9bit_u8'"),
    (HQQ, _poke("axis", 2), FormatError, "axis 2, which isn't known"),
    (HQQ, _poke("group_size", 48), CheckpointError, "a group size of 48 doesn't divide"),
    (HQQ, _poke("group_size", 32), CheckpointError, "its groups are others"),
    (HQQ, _poke("shape", 41), CheckpointError, "doesn't divide|fill another number"),
    (HQQ, _poke("zero", NAN), CheckpointError, "NaN or infinite"),
    (
        HQQ,
        lambda config, tensors: tensors.update(zero_q=tensors["zero"].clone()),
        FormatError,
        "quantized HQQ zeros",
    ),
    (AO, _drop("_weight_scale"), CheckpointError, "_weight_scale .scale. is missing"),
    (AO, _cut("_weight_scale"), CheckpointError, "blocks of .* ask for"),
    (AO, _poke("_weight_scale", NAN), CheckpointError, "NaN or infinite"),
    (GPTQ, _set(quant_method="quip"), FormatError, "quantized by 'quip', which vera-edge doesn't read"),
    (GPTQ, _set(quant_method=None), FormatError, "names no quant_method"),
    (GPTQ, _set(quant_method="hqq"), CheckpointError, "belongs to a quantized weight, but config.json says"),
]


@pytest.mark.parametrize(
    ("golden", "change", "error", "message"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)]
)
def test_it_is_refused_in_one_sentence(
    golden: str, change: Change, error: type[CheckpointError], message: str, tmp_path: Path
) -> None:
    folder = _changed(golden, tmp_path / "base", change)
    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(folder).dequantize(MODULE)
    assert "\n" not in str(caught.value)


def test_torchao_of_another_class_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _changed(AO, tmp_path / "base", lambda config, tensors: None)
    about = {f"{MODULE}.weight": json.dumps({"_type": "NVFP4Tensor", "_data": {}})}
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", about)
    with pytest.raises(FormatError, match="is a torchao NVFP4Tensor; vera-edge reads Int8Tensor"):
        Checkpoint.open(folder)


def test_quantized_tensors_without_a_quantization_config(tmp_path: Path) -> None:
    folder = _changed(GPTQ, tmp_path / "base", lambda config, tensors: config.clear())
    with pytest.raises(CheckpointError, match=r"config\.json says the model isn't quantized"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_an_empty_weight_is_a_sentence(tmp_path: Path, shape: tuple[int, int], kind: str) -> None:
    with (tmp_path / "model.safetensors").open("wb") as stream:
        write_header(stream, {"model.layers.0.q_proj.weight": (kind, shape)}, {})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"q_proj is empty \(shape"):
        Checkpoint.open(tmp_path)
