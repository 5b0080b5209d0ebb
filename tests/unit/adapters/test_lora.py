"""LoRA and DoRA as PEFT saves them: merged they are PEFT's unmerged forward; what isn't theirs is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests import peft_adapters, tiny
from vera_edge import merging as merge
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.reading import read
from vera_edge.combining.to_lora import to_lora
from vera_edge.errors import AdapterError, MismatchError, PlanError
from vera_edge.measuring.opened_reference import open_trained
from vera_edge.trained.inspection import inspect_folder

ALL = list(tiny.LLAMA_LINEARS)
CASES: Mapping[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 20, "^model.layers.1.mlp.gate_proj": 3},
    },
    "dora": {"r": 4, "use_dora": True},
    "head": {"r": 2, "target_modules": [*ALL, "lm_head"]},
    "whole norms": {"r": 2, "modules_to_save": ["norm"]},
    "some layers": {"r": 3, "layers_to_transform": [1], "layers_pattern": "layers"},
    "gaussian": {"r": 3, "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=160, initializer_range=0.15, **settings
    )
    torch.manual_seed(3)
    return tiny.save(LlamaForCausalLM(config), tmp_path_factory.mktemp("untied") / "base")


def lora(base: Path, folder: Path, **options: Any) -> Path:
    settings = {"target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    return peft_adapters.save(base, folder, LoraConfig(**settings))


@pytest.mark.parametrize("case", CASES)
def test_merged_it_is_pefts_unmerged_forward(case: str, untied: Path, tmp_path: Path) -> None:
    folder = lora(untied, tmp_path / "adapter", **CASES[case])
    merge.to_folder(untied, [(folder, 1.0)], tmp_path / "merged", "fp32")
    truth = peft_adapters.logits(peft_adapters.unmerged(tiny.load(untied), folder))
    assert peft_adapters.close(peft_adapters.logits(tiny.load(tmp_path / "merged")), truth)
    plain = peft_adapters.logits(tiny.load(untied))
    assert not torch.allclose(plain, truth, atol=0.05 * float(truth.abs().max()))


@pytest.mark.parametrize("case", ["patterns", "dora", "whole norms"])
def test_the_reference_is_pefts_unmerged_forward(case: str, untied: Path, tmp_path: Path) -> None:
    folder = lora(untied, tmp_path / "adapter", **CASES[case])
    truth = peft_adapters.logits(peft_adapters.unmerged(tiny.load(untied), folder))
    tokens = peft_adapters.TOKENS[0].numpy()
    for memory in (None, 1):  # whole, and a layer at a time
        opened = open_trained(folder, untied, max_memory=memory)
        assert peft_adapters.close(torch.from_numpy(opened.runner.logits(tokens)), truth)
        assert opened.base is not None
        plain = peft_adapters.logits(tiny.load(untied))
        assert peft_adapters.close(torch.from_numpy(opened.base.logits(tokens)), plain)


def test_a_conv1d_takes_it_in_its_own_orientation(tiny_gpt2: Path, tmp_path: Path) -> None:
    targets = {"target_modules": list(tiny.GPT2_LINEARS), "fan_in_fan_out": True}
    for name, more in (
        ("lora", {"bias": "lora_only"}),
        ("dora", {"use_dora": True}),
        ("bias", {"lora_bias": True}),
    ):
        folder = lora(tiny_gpt2, tmp_path / name, r=3, **targets, **more)
        merge.to_folder(tiny_gpt2, [(folder, 1.0)], tmp_path / f"{name}-merged", "fp32")
        truth = peft_adapters.logits(peft_adapters.unmerged(tiny.load(tiny_gpt2), folder))
        assert peft_adapters.close(peft_adapters.logits(tiny.load(tmp_path / f"{name}-merged")), truth), name
        reference = open_trained(folder, tiny_gpt2).runner.logits(peft_adapters.TOKENS[0].numpy())
        assert peft_adapters.close(torch.from_numpy(reference), truth), name


def test_two_of_different_ranks_are_summed_by_weight(untied: Path, tmp_path: Path) -> None:
    one = lora(untied, tmp_path / "one", r=4)
    other = lora(untied, tmp_path / "other", r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    given = [(one, 0.5), (other, -1.5)]
    merge.to_folder(untied, given, tmp_path / "merged", "fp32")
    model = peft_adapters.unmerged(tiny.load(untied), one)
    model.load_adapter(str(other), "other")
    model.base_model.set_adapter(["default", "other"])
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        for name, weight in (("default", 0.5), ("other", -1.5)):
            if isinstance(scaling, dict) and name in scaling:
                scaling[name] *= weight
    truth = peft_adapters.logits(model)
    assert peft_adapters.close(peft_adapters.logits(tiny.load(tmp_path / "merged")), truth)
    opened = open_trained(one, untied, [(other, -1.5)])
    assert len(opened.adapters) == 2


def test_a_converted_start_is_an_ordinary_lora(untied: Path, tmp_path: Path) -> None:
    """PiSSA saved as the difference, by PEFT's own conversion."""
    from peft import get_peft_model

    settings = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(tiny.load(untied), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    truth = peft_adapters.logits(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    merge.to_folder(untied, [(tmp_path / "converted", 1.0)], tmp_path / "merged", "fp32")
    assert peft_adapters.close(peft_adapters.logits(tiny.load(tmp_path / "merged")), truth)


def test_a_whole_state_dict_is_read_alike(untied: Path, tmp_path: Path) -> None:
    folder = lora(untied, tmp_path / "adapter", r=3, use_dora=True)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    state = load_file(folder / "adapter_model.safetensors")
    named = {}
    for name, tensor in state.items():
        head, dot, end = name.rpartition(".weight")
        named[f"{head}.mine{dot}{end}" if dot else f"{name}.mine"] = tensor
    save_file(named, whole / "adapter_model.safetensors")
    ours, theirs = read(whole), read(folder)
    assert ours.digest == theirs.digest and list(ours.vectors) == list(theirs.vectors)
    pair = ours.vectors["model.layers.0.mlp.up_proj"]
    assert isinstance(pair, LoraPair) and pair.magnitude is not None and pair.rank == 3


def test_inspect_says_what_it_is(untied: Path, tmp_path: Path) -> None:
    folder = lora(untied, tmp_path / "adapter", r=4, target_modules=["q_proj", "up_proj"])
    for base in (None, untied):
        found = inspect_folder(folder, base)
        assert (found.method, found.rank, found.seed, found.layers) == ("LORA", 4, None, (0, 1))
        assert found.how == "LoRA of rank 4; the folder holds all that was trained"
        assert found.parameters == 2 * 4 * (64 + 64 + 64 + 160) and not found.dead and not found.misfit
        assert set(found.kinds[0].ranges) == {"lora_A.weight", "lora_B.weight"}
    assert found.cost is not None and found.cost.branch_macs == found.parameters and found.fits


def change(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, "config gives them rank 5"),
        ({"r": 0}, "rank r = 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": float("inf")}, "lora_alpha|NaN|Infinity|number"),
        ({"rank_pattern": {"q_proj": 3}}, "gives them rank 3"),
        ({"rank_pattern": {"(((": 3}}, "can't be read"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern gives q_proj None"),
        ({"init_lora_weights": "olora"}, "save it as the difference"),
        ({"init_lora_weights": "loftq"}, "set init_lora_weights to true"),
        ({"init_lora_weights": "new"}, "init_lora_weights is 'new'"),
        ({"use_dora": True}, "holds no lora_magnitude_vector"),
        ({"target_parameters": ["experts"]}, "target_parameters is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"sometime": 3}, "sometime is 3, a setting that vera-edge doesn't know"),
        ({"bias": "some"}, "bias is 'some', not none, all or lora_only"),
    ],
)
def test_refuses(untied: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = change(lora(untied, tmp_path / "adapter", r=4, target_modules=["q_proj"]), **settings)
    with pytest.raises(AdapterError, match=message):
        read(folder)


def test_refuses_half_a_pair_and_what_isnt_its_own(untied: Path, tmp_path: Path) -> None:
    folder = lora(untied, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    state = load_file(folder / "adapter_model.safetensors")
    key = next(name for name in state if "lora_A" in name)
    for changed, message in (
        ({name: value for name, value in state.items() if name != key}, "holds no lora_A.weight for"),
        (state | {key.replace("lora_A.weight", "lora_C.weight"): torch.ones(2, 2)}, "isn't part of a LoRA"),
        (state | {key: torch.ones(4)}, "where floats in 2 dimensions belong"),
        (state | {key: torch.full((4, 64), float("nan"))}, "holds NaN"),
        (
            state | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 384)},
            "holds no lora_embedding_B for model.embed_tokens",
        ),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=message):
            read(folder)


def test_refuses_what_cant_be_summed(
    untied: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    plain = lora(tiny_llama.fp32, tmp_path / "plain", r=2)
    dora = lora(tiny_llama.fp32, tmp_path / "dora", r=2, use_dora=True)
    with pytest.raises(PlanError, match="give it alone, with weight 1"):
        merge.prepare(tiny_llama.fp32, [(dora, 0.5)])
    with pytest.raises(PlanError, match="give it alone, with weight 1"):
        merge.prepare(tiny_llama.fp32, [(plain, 1.0), (dora, 1.0)])
    with pytest.raises(MismatchError, match=r"of VeRA and .* of LoRA; merge"):
        merge.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0), (plain, 1.0)])
    with pytest.raises(AdapterError, match="has no projections to round"):
        merge.prepare(tiny_llama.fp32, [(plain, 1.0)], projection_rounding="bf16")
    with pytest.raises(AdapterError, match="is a LoRA adapter already"):
        to_lora(plain, tmp_path / "out", tiny_llama.fp32)
    biased = lora(untied, tmp_path / "biased", r=2, target_modules=["q_proj"])
    state = load_file(biased / "adapter_model.safetensors")
    key = next(name for name in state if "lora_B" in name)
    save_file(state | {key.replace("weight", "bias"): torch.ones(64)}, biased / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="which has none in"):
        merge.prepare(untied, [(change(biased, lora_bias=True), 1.0)])
