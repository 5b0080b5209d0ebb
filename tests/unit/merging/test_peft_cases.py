"""The cases that PEFT tests merging by, through `vera-edge merge`: each folder that comes out computes what
PEFT's own model computed before it was merged.

What they are is read off PEFT's custom-models suite, whose models are a few linears; here those are the
linears of a Llama's MLP, with biases, and a GPT-2's Conv1D. Cases that differ only in how targets are
written, or in dropout, are one. docs/methods.md lists those of its cases that a merge doesn't take.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests import peft_adapters, tiny
from vera_edge import merging
from vera_edge.errors import VeraEdgeError

WIDE, NARROW, CONV1D = "up_proj", "down_proj", "mlp.c_fc"
BOTH = [WIDE, NARROW]
OFT = {"target_modules": [WIDE], "r": 2, "oft_block_size": 0}
BLOCKS_OF_2 = {"target_modules": [WIDE], "r": 0, "oft_block_size": 2}
VECTORS = {"vector_length": 1, "num_vectors": 5}
# Method -> options of its config, one entry a case. Unless it says otherwise both linears are adapted.
CASES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "LoraConfig": (
        {"target_modules": [WIDE], "lora_alpha": 4, "lora_dropout": 0.1, "modules_to_save": [NARROW]},
        {"use_dora": True, "lora_alpha": 32},
        {"lora_bias": True, "lora_alpha": 32},
        {"trainable_token_indices": {"embed_tokens": [0, 10]}},
        {"init_lora_weights": "mica", "r": 4},
        {"velora_config": peft.VeloraConfig(num_groups=2, init_type="random")},
        {"target_modules": [CONV1D]},
        {"target_modules": [CONV1D], "use_dora": True},
    ),
    "IA3Config": (
        {"feedforward_modules": []},
        {"feedforward_modules": BOTH},
        {"target_modules": [WIDE], "feedforward_modules": [WIDE], "modules_to_save": [NARROW]},
        {"target_modules": [CONV1D], "feedforward_modules": [CONV1D]},
    ),
    "LoHaConfig": ({"alpha": 4, "module_dropout": 0.1}, {"target_modules": [WIDE], "rank_dropout": 0.5}),
    "LoKrConfig": ({"alpha": 4}, {"decompose_both": True, "r": 1, "alpha": 1}, {"decompose_factor": 4}),
    "OFTConfig": (
        {**OFT, "use_cayley_neumann": False, "modules_to_save": [NARROW]},
        {**OFT, "coft": True, "eps": 1e-2},
        {**OFT, "coft": True, "eps": 1e-2, "block_share": True},
        {**BLOCKS_OF_2, "use_cayley_neumann": True},
        {**BLOCKS_OF_2, "use_cayley_neumann": False, "coft": True, "eps": 1e-2, "block_share": True},
    ),
    "DeftConfig": (
        {},
        {"decomposition_method": "qr", "alpha": 16},
        {"decomposition_method": "relu", "para": True},
        {"decomposition_method": "qr", "para": True},
        {"target_modules": [CONV1D]},
    ),
    "HRAConfig": ({"target_modules": [WIDE], "modules_to_save": [NARROW]},),
    "MissConfig": ({"r": 2}, {"r": 2, "init_weights": "bat"}),
    "BOFTConfig": (
        {"target_modules": [NARROW], "boft_block_size": 2, "boft_dropout": 0.1, "modules_to_save": [WIDE]},
        {"target_modules": [NARROW], "boft_block_size": 0, "boft_block_num": 2},
        {"target_modules": [NARROW], "boft_block_size": 10, "boft_n_butterfly_factor": 2},
        {"target_modules": [NARROW], "boft_block_size": 2, "boft_n_butterfly_factor": 3},
    ),
    "ShiraConfig": ({"r": 1, "random_seed": 56},),
    "SupertuningConfig": (
        {"sparsity": 0.5, "select_top": False},
        {"sparsity": 0.5, "target_modules": [WIDE], "r": 2},
    ),
    "VeraConfig": ({}, {"target_modules": [WIDE], "modules_to_save": [NARROW]}, {"target_modules": [CONV1D]}),
    "PveraConfig": ({}, {"target_modules": [CONV1D]}),
    "FourierFTConfig": (
        {"n_frequency": 10, "init_weights": True},
        {"n_frequency_pattern": {WIDE: 5, NARROW: 10}, "init_weights": True},
    ),
    "GraloraConfig": ({}, {"hybrid_r": 4}, {"target_modules": [CONV1D], "gralora_k": 1}),
    "VBLoRAConfig": (VECTORS, {"target_modules": [CONV1D], **VECTORS, "num_vectors": 2, "topk": 2}),
    "RandLoraConfig": (
        {"randlora_alpha": 1, "sparse": True, "save_projection": True},
        {"randlora_alpha": 1, "very_sparse": True, "save_projection": True},
    ),
    "C3AConfig": (
        {"block_size": 10, "init_weights": True},
        {"block_size_pattern": {WIDE: 5, NARROW: 10}, "init_weights": True},
    ),
    "WaveFTConfig": (
        {"n_frequency": 8, "use_idwt": False},
        {"n_frequency": 16, "wavelet_family": "sym2"},
        {"n_frequency": 16, "wavelet_family": "db1", "scaling": 25.0, "proportional_parameters": True},
    ),
    "RoadConfig": tuple({"variant": f"road_{kind}", "group_size": 2} for kind in (1, 2, 4)),
    "DeloraConfig": ({"module_dropout": 0.1},),
    "PeanutConfig": (
        {"r": 2, "depth": 0, "act_fn": "relu"},
        {"r": 2, "depth": 1, "act_fn": "gelu", "target_modules": [WIDE]},
    ),
    "HiraConfig": ({"hira_dropout": 0.1}, {"target_modules": [CONV1D]}),
    "AdaLoraConfig": ({"init_lora_weights": False, "total_step": 1},),
}
REFUSED: Mapping[str, tuple[dict[str, Any], ...]] = {
    "LoraConfig": (
        {"kasa_config": peft.KasaConfig(), "r": 4},
        {"monteclora_config": peft.MontecloraConfig(num_samples=2)},
        {"target_modules": None, "target_parameters": ["up_proj.weight"]},
        {"target_modules": ["embed_tokens"]},
        {"layer_replication": [[0, 1], [0, 1]]},
    ),
    "GloraConfig": ({},),
    "BeftConfig": ({},),
    "LNTuningConfig": ({"target_modules": ["input_layernorm"]},),
    "PsoftConfig": ({"r": 4, "psoft_alpha": 4},),
}


def listed(cases: Mapping[str, tuple[dict[str, Any], ...]]) -> list[Any]:
    return [
        pytest.param(cls, options, id=f"{cls.removesuffix('Config')}-{number}")
        for cls, each in cases.items()
        for number, options in enumerate(each)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, whose MLP has biases."""
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=True,
        initializer_range=0.3,
    )
    return made(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, of Conv1D."""
    config = GPT2Config(
        vocab_size=tiny.VOCABULARY,
        n_embd=40,
        n_inner=80,
        n_layer=1,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
    )
    return made(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2") / "base")


def made(model: Any, folder: Path) -> Path:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):
                values.normal_(std=0.3)
    return tiny.save(model, folder)


def trained(base: Path, folder: Path, cls: str, options: Mapping[str, Any]) -> torch.Tensor:
    """Save an adapter as if it had been trained; gives what its own model computes."""
    settings = getattr(peft, cls)(**{"target_modules": BOTH, **options})
    torch.manual_seed(5)
    model: Any = peft.get_peft_model(tiny.load(base), settings)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, values in sorted(model.named_parameters()):
            if values.requires_grad and values.is_floating_point():
                values += 0.1 * torch.randn(values.shape, generator=draw)
    model.save_pretrained(folder)
    return peft_adapters.logits(model)


@pytest.mark.parametrize(("cls", "options"), listed(CASES))
@pytest.mark.filterwarnings("ignore")
def test_merged_it_computes_what_pefts_model_did(
    cls: str, options: dict[str, Any], llama: Path, gpt2: Path, tmp_path: Path
) -> None:
    base = gpt2 if options.get("target_modules") == [CONV1D] else llama
    truth = trained(base, tmp_path / "adapter", cls, options)
    merging.to_folder(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", "fp32")
    found = peft_adapters.logits(tiny.load(tmp_path / "merged"))
    plain = peft_adapters.logits(tiny.load(base))
    assert float((plain - truth).abs().max()) > 0.002 * float(truth.abs().max())
    assert peft_adapters.close(found, truth)


@pytest.mark.parametrize(("cls", "options"), listed(REFUSED))
@pytest.mark.filterwarnings("ignore")
def test_what_isnt_taken_is_told_in_a_sentence(
    cls: str, options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    trained(llama, tmp_path / "adapter", cls, options)
    with pytest.raises(VeraEdgeError):
        merging.to_folder(llama, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", "fp32")
    assert not (tmp_path / "merged").exists()
