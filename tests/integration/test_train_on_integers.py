"""Train on what is shipped: a GPTQ base made, an adapter trained on it by PEFT, both exported as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import VeraConfig, get_peft_model
from safetensors.numpy import load_file

from tests import tiny
from tests.conftest import Cli
from vera_edge.training import load

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT * 16)
    return path


def made(cli: Cli, base: Path, out: Path, text: Path, *words: object) -> dict[str, Any]:
    given = ("--to", "gptq", "--calibration", text, "--effort", "quick", *words, "--json")
    result = cli("quantize", base, "-o", out, *given)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def adapter_on(model: Any, folder: Path) -> Path:
    """An adapter that PEFT put on a model: its vectors drawn, its projections left to the seed."""
    config = VeraConfig(r=16, target_modules=TARGETS, save_projection=False, task_type="CAUSAL_LM")
    live = get_peft_model(model, config)
    tiny.randomize(live, 0.3, 5)
    live.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_branch_ships_what_was_trained_and_nothing_is_asked(
    dtype: str, tiny_llama: tiny.TinyLlama, text: Path, cli: Cli, tmp_path: Path
) -> None:
    """ONNX Runtime against PEFT: nothing is lost where floats are computed with, little where int8 is."""
    told = made(cli, tiny_llama.fp32, tmp_path / "gptq", text)
    assert told["stored"] == "gptq, 4 bits in groups of 32, with zero points"
    assert told["layers"] == 14
    assert told["trained_as"] is None
    assert "calibrated on" in told["notes"][0]
    adapter = adapter_on(load(tmp_path / "gptq", dtype=dtype), tmp_path / "adapter")
    exact = ("--accuracy-level", 0, "--store-projections", "fp32", "--head", "fp32")
    for name, options, most in (("exact", exact, 1e-7), ("shipped", (), 0.03)):
        out = tmp_path / name
        words = ("--mode", "branch", "--weights", "same", *options)
        result = cli("export", tmp_path / "gptq", adapter, "-o", out, *words)
        assert result.exit_code == 0, result.stderr
        drift = cli(
            "drift", adapter, out, "--base", tmp_path / "gptq", "--data", text, "--tokens", 512, "--json"
        )
        found = json.loads(drift.stdout)
        lost, effect = (found[part]["kl"]["mean"]["value"] for part in ("fidelity", "effect"))
        assert effect > 0.01
        assert lost < most * effect
    check_integers(tmp_path / "gptq", tmp_path / "shipped")


def check_integers(base: Path, bundle: Path) -> None:
    """The graph's blocks hold the codes, zero points and scales of AutoGPTQ's layout, layer by layer."""
    tensors = load_file(base / "model.safetensors")
    (path,) = bundle.rglob("*.onnx")
    arrays = {
        one.name: numpy_helper.to_array(one, str(path.parent)) for one in onnx.load(path).graph.initializer
    }
    stems = {key.removesuffix("int4") for key in arrays if key.endswith(".int4")}
    checked = 0
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        stem = next((stem for stem in stems if module in stem), None)
        if stem is None:  # joined with others that read the same input
            continue
        codes = arrays[f"{stem}int4"]
        expected = fields(tensors[f"{module}.qweight"].T)
        assert np.array_equal(nibbles(codes.reshape(len(codes), -1))[:, : expected.shape[1]], expected)
        zeros = fields(tensors[f"{module}.qzeros"]).T + 1
        assert np.array_equal(
            nibbles(arrays[f"{stem}zero_points"].reshape(len(zeros), -1))[:, : zeros.shape[1]], zeros
        )
        scales = tensors[f"{module}.scales"].T.astype(np.float32)
        assert np.array_equal(arrays[f"{stem}scales"].reshape(scales.shape), scales)
        checked += 1
    assert checked >= 4, sorted(arrays)


def fields(words: Any) -> Any:
    """4-bit fields of 32-bit words (rows, words), lowest first."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    return np.stack([(unsigned >> np.uint32(4 * n)) & np.uint32(15) for n in range(8)], -1).reshape(
        len(words), -1
    )


def nibbles(packed: Any) -> Any:
    """4-bit fields of bytes (rows, bytes), lowest first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def test_symmetric_groups_have_all_zero_points_in_the_middle(
    tiny_llama: tiny.TinyLlama, text: Path, cli: Cli, tmp_path: Path
) -> None:
    made(cli, tiny_llama.nf4, tmp_path / "gptq", text, "--symmetric", "--method", "rtn")
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    kept = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")
    assert [settings[key] for key in kept] == ["gptq", 4, 32, True, False, "gptq"]
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    assert all((fields(value) == 7).all() for name, value in tensors.items() if name.endswith("qzeros"))
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert "base_model_relation: quantized" in card
    assert not (tmp_path / "gptq" / "vera_edge_merge.json").exists()


def test_calibrated_integers_lose_less_than_nearest_ones(
    tiny_llama: tiny.TinyLlama, text: Path, cli: Cli, tmp_path: Path
) -> None:
    """By the KL of transformers' own models, on the text."""
    from transformers import AutoTokenizer

    made(cli, tiny_llama.fp32, tmp_path / "calibrated", text)
    made(cli, tiny_llama.fp32, tmp_path / "nearest", text, "--method", "rtn")
    ids = AutoTokenizer.from_pretrained(tiny_llama.fp32)(text.read_text(), return_tensors="pt").input_ids[
        :, :200
    ]
    exact, *others = [
        torch.log_softmax(model(ids).logits.detach()[0], -1)
        for model in (tiny.load(tiny_llama.fp32), load(tmp_path / "calibrated"), load(tmp_path / "nearest"))
    ]
    calibrated, nearest = [float((exact.exp() * (exact - other)).sum(-1).mean()) for other in others]
    assert calibrated < 0.7 * nearest


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "nf4", "--group", "32"), "group is an option of gptq"),
        (("--to", "gptq", "--double-quant"), "double_quant is an option of what bitsandbytes quantizes to"),
        (("--to", "gptq", "--group", "64"), "a linear of 64 x 160 as gptq"),
        (("--to", "gptq", "--calibration", "nowhere.txt"), "nowhere.txt is missing"),
    ],
)
def test_what_cant_be_quantized_is_said_and_nothing_is_written(
    words: tuple[str, ...], says: str, tiny_llama: tiny.TinyLlama, cli: Cli, tmp_path: Path
) -> None:
    result = cli("quantize", tiny_llama.fp32, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_gptq_base_isnt_quantized_again(
    tiny_llama: tiny.TinyLlama, text: Path, cli: Cli, tmp_path: Path
) -> None:
    made(cli, tiny_llama.fp32, tmp_path / "gptq", text, "--method", "rtn")
    result = cli("quantize", tmp_path / "gptq", "-o", tmp_path / "again", "--to", "gptq")
    assert result.exit_code == 2
    assert "is GPTQ already" in result.stderr
