"""Adapters written as LoRA: what PEFT computes with either, and the error where they differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests import peft_adapters, tiny
from tests.conftest import Cli
from vera_edge.combining.folder import WEIGHTS
from vera_edge.combining.to_lora import to_lora
from vera_edge.errors import AdapterError, DriftExceeded, OutputError, PlanError


def logits(base: Path, adapter: Path) -> np.ndarray:
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny.load(base), adapter).eval()
    with torch.no_grad():
        return np.asarray(model(torch.arange(3, 40)[None]).logits[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_computes_the_same_with_either(
    kind: str,
    tmp_path: Path,
    tiny_llama: tiny.TinyLlama,
    tiny_gpt2: Path,
    tiny_gpt2_adapter: Path,
) -> None:
    base = tiny_llama.fp32 if kind == "llama" else tiny_gpt2
    adapter = tiny.make_adapter(base, tmp_path / "vera") if kind == "llama" else tiny_gpt2_adapter
    made = to_lora(adapter, tmp_path / "lora", base)
    expected, found = logits(base, adapter), logits(base, made.folder)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected - logits_of_base(base)).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("setting", ["vera_only", "all"])
def test_trained_biases_go_along(setting: str, tmp_path: Path, tiny_gpt2: Path) -> None:
    from peft import VeraConfig

    settings = VeraConfig(r=8, target_modules=["c_attn"], bias=setting, fan_in_fan_out=True)
    adapter = peft_adapters.save(tiny_gpt2, tmp_path / "vera", settings, 0.5)
    made = to_lora(adapter, tmp_path / "lora", tiny_gpt2)
    before, after = load_file(adapter / WEIGHTS), load_file(made.folder / WEIGHTS)
    biases = [name for name in before if name.endswith(".bias")]
    assert biases and all(np.array_equal(before[name], after[name]) for name in biases)
    expected, found = logits(tiny_gpt2, adapter), logits(tiny_gpt2, made.folder)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def logits_of_base(base: Path) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(tiny.load(base).eval()(torch.arange(3, 40)[None]).logits[0])


def test_scale_is_one_and_layers_are_named_in_full(
    tmp_path: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    made = to_lora(tiny_adapter, tmp_path / "lora", tiny_llama.nf4)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] == made.rank
    assert all("layers." in name for name in config["target_modules"])
    assert made.layers == len(config["target_modules"]) == 14


def test_refusals(tmp_path: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> None:
    config = json.loads((tiny_adapter / "adapter_config.json").read_text())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_model.safetensors").write_bytes(
        (tiny_adapter / "adapter_model.safetensors").read_bytes()
    )
    (foreign / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/name"})
    )
    with pytest.raises(AdapterError, match="give --base"):
        to_lora(foreign, tmp_path / "lora")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "x").touch()
    with pytest.raises(OutputError, match="--force"):
        to_lora(tiny_adapter, tmp_path / "lora", tiny_llama.nf4)
    with pytest.raises(OutputError, match="would delete"):
        to_lora(foreign, foreign, tiny_llama.nf4, force=True)
    assert json.loads((foreign / "adapter_config.json").read_text())["peft_type"] == "VERA"


# PVeRA, VB-LoRA and the like are products; HRA's, DEFT's and PEANuT's change is one too, of the base at hand.
LOW_RANK = ("ADALORA", "DEFT", "DELORA", "HRA", "MISS", "PEANUT", "PVERA", "VBLORA")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths suit every method."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, initializer_range=0.15, **settings
    )
    torch.manual_seed(3)
    return tiny.save(LlamaForCausalLM(config), tmp_path_factory.mktemp("square") / "base")


@pytest.mark.parametrize("method", LOW_RANK)
def test_what_is_of_low_rank_is_written_out(method: str, square: Path, tmp_path: Path) -> None:
    adapter = peft_adapters.save_method(square, tmp_path / "adapter", method)
    made = to_lora(adapter, tmp_path / "lora", square)
    assert made.error is not None and made.error < 1e-5 and len(made.layer_errors) == 4
    lora_layers(square, made.folder)
    found = peft_adapters.logits(peft_adapters.unmerged(tiny.load(square), made.folder))
    truth = peft_adapters.logits(peft_adapters.unmerged(tiny.load(square), adapter))
    assert peft_adapters.close(found, truth)


def lora_layers(base: Path, folder: Path) -> list[tuple[str, torch.nn.Module]]:
    """The A and B that PEFT loads, every one of the rank that the config gives."""
    model = peft_adapters.unmerged(tiny.load(base), folder)
    rank = model.peft_config["default"].r
    found = [(name, module) for name, module in model.named_modules() if name.endswith("lora_A.default")]
    assert found and all(len(module.weight) == rank for _, module in found)
    return found


@pytest.mark.parametrize("method", ["IA3", "OFT", "LOKR", "LORA, use_dora"])
def test_what_isnt_is_approximated_and_the_error_told(method: str, square: Path, tmp_path: Path) -> None:
    adapter = peft_adapters.save_method(square, tmp_path / "adapter", method)
    with pytest.raises(AdapterError, match="give --rank"):
        to_lora(adapter, tmp_path / "lora", square)
    assert not (tmp_path / "lora").exists()
    made = to_lora(adapter, tmp_path / "lora", square, rank=12)
    before = dict(tiny.load(square).named_modules())
    after = dict(peft_adapters.unmerged(tiny.load(square), adapter).merge_and_unload().named_modules())
    lost = whole = 0.0
    for module, error in made.layer_errors.items():
        delta = (after[module].weight - before[module].weight).detach().double()
        values = torch.linalg.svdvals(delta)
        lost, whole = lost + float(values[12:].square().sum()), whole + float(values.square().sum())
        assert error == pytest.approx(float(values[12:].norm() / values.norm()), abs=1e-5)
    assert made.error == pytest.approx((lost / whole) ** 0.5, abs=1e-5) and lost > 0.01 * whole
    full = to_lora(adapter, tmp_path / "full", square, rank=64)
    found = peft_adapters.logits(peft_adapters.unmerged(tiny.load(square), full.folder))
    truth = peft_adapters.logits(peft_adapters.unmerged(tiny.load(square), adapter))
    assert full.error is not None and full.error < 1e-5 and peft_adapters.close(found, truth)


def test_a_lora_is_cut_to_a_lower_rank(square: Path, tmp_path: Path) -> None:
    adapter = peft_adapters.save_method(square, tmp_path / "adapter", "LORA")
    made = to_lora(adapter, tmp_path / "lora", square, rank=2)
    lora_layers(square, made.folder)
    model = peft_adapters.unmerged(tiny.load(square), adapter)
    for module, error in made.layer_errors.items():
        values = torch.linalg.svdvals(
            model.base_model.model.get_submodule(module).get_delta_weight("default").detach().double()
        )
        assert error == pytest.approx(float(values[2:].norm() / values.norm()), abs=1e-5)


def test_a_bound_on_the_error(square: Path, tmp_path: Path, cli: Cli) -> None:
    adapter = peft_adapters.save_method(square, tmp_path / "adapter", "LOKR")
    out = tmp_path / "lora"
    with pytest.raises(DriftExceeded, match=r"leaves .* of the change, and at most 5.00% was allowed"):
        to_lora(adapter, out, square, rank=12, max_error=0.05)
    refused = cli("adapter", "to-lora", adapter, "-o", out, "--base", square, "--rank", 12, "--max-error", 0)
    assert refused.exit_code == 3 and not out.exists()
    done = cli("adapter", "to-lora", adapter, "-o", out, "--base", square, "--rank", 12, "--max-error", 0.9)
    assert done.exit_code == 0 and "of the change, the largest" in done.stdout
    told = cli("adapter", "to-lora", adapter, "-o", out, "--base", square, "--rank", 12, "--force", "--json")
    assert 0.1 < json.loads(told.stdout)["error"] < 0.9
    for options in ({"rank": 0}, {"max_error": -1.0}, {"max_error": float("nan")}):
        with pytest.raises(PlanError):
            to_lora(adapter, out, square, force=True, **options)
