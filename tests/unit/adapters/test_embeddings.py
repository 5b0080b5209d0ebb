"""LoRA beside tables of embeddings, and rows trained anew: merged they are PEFT's unmerged forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests import peft_adapters, tiny
from vera_edge import merging
from vera_edge.adapters.reading import read
from vera_edge.errors import AdapterError, MismatchError
from vera_edge.measuring.opened_reference import open_trained
from vera_edge.releasing.difference import compare_adapters
from vera_edge.trained.inspection import inspect_folder

TABLE = ["q_proj", "embed_tokens"]
ENSURED = {"ensure_weight_tying": True}
# Base -> what is trained; PEFT ties heads to rows always, to pairs and whole tables with ensure_weight_tying.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "pair": ("own", {"target_modules": TABLE, "use_rslora": True, "alpha_pattern": {"embed_tokens": 3}}),
    "dora": ("own", {"target_modules": [*TABLE, "lm_head"], "use_dora": True}),
    "pair, head left": ("tied", {"target_modules": TABLE}),
    "pair, head follows": ("tied", {"target_modules": TABLE, **ENSURED}),
    "positions": ("gpt2", {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}),
    "rows": ("own", {"trainable_token_indices": [7, 3, 10], "ensure_weight_tying": True}),
    "rows, head follows": ("tied", {"trainable_token_indices": [0, 3]}),
    "rows of both": ("own", {"trainable_token_indices": {"embed_tokens": [0, 8], "lm_head": [3]}}),
    "rows of both apart": ("tied", {"trainable_token_indices": {"embed_tokens": [0, 8], "lm_head": [3]}}),
    "whole, head follows": ("tied", {"modules_to_save": ["embed_tokens"], **ENSURED}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny Llamas, with a head of its own and one that is the table; and a GPT-2."""
    root = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(3)
    found = {}
    for name, tied in (("own", False), ("tied", True)):
        config = LlamaConfig(
            vocab_size=tiny.VOCABULARY, initializer_range=0.15, tie_word_embeddings=tied, **sizes
        )
        found[name] = tiny.save(LlamaForCausalLM(config), root / name)
    gpt2 = GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.15
    )
    return found | {"gpt2": tiny.save(GPT2LMHeadModel(gpt2), root / "gpt2")}


def lora(base: Path, folder: Path, **options: Any) -> Path:
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    return peft_adapters.save(base, folder, LoraConfig(**settings))


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_merged_and_as_the_reference_it_is_pefts_unmerged_forward(
    case: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    name, options = CASES[case]
    base = bases[name]
    folder = lora(base, tmp_path / "adapter", **options)
    trained = peft_adapters.unmerged(tiny.load(base), folder)
    truth, plain = peft_adapters.logits(trained), peft_adapters.logits(tiny.load(base))
    assert off(plain, truth) > 0.05
    merging.to_folder(base, [(folder, 1.0)], tmp_path / "merged", "fp32")
    assert off(peft_adapters.logits(tiny.load(tmp_path / "merged")), truth) < 1e-4
    opened, tokens = open_trained(folder, base), peft_adapters.TOKENS[0].numpy()
    assert opened.base is not None
    assert off(torch.from_numpy(opened.runner.logits(tokens)), truth) < 1e-4
    assert off(torch.from_numpy(opened.base.logits(tokens)), plain) < 1e-4
    again = PeftModel.from_pretrained(tiny.load(base), str(folder), is_trainable=True)
    for told in (inspect_folder(folder), inspect_folder(folder, base)):
        if name != "tied" or not options.get("ensure_weight_tying"):  # PEFT saves what the two share twice
            assert told.parameters == again.get_nb_trainable_parameters()[0]
        assert bool(told.embeddings) == ("whole" not in case) and not told.misfit


def test_rows_of_tokens_that_were_added(bases: dict[str, Path], tmp_path: Path) -> None:
    """The vocabulary grown by four, two of the new ones trained: PEFT saves the grown tables, too."""
    base = bases["own"]
    grown: Any = tiny.load(base)
    torch.manual_seed(5)
    grown.resize_token_embeddings(tiny.VOCABULARY + 4, mean_resizing=False)
    new = [tiny.VOCABULARY, tiny.VOCABULARY + 1]
    settings = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=new, task_type="CAUSAL_LM")
    model = get_peft_model(grown, settings)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values += 0.1 * torch.randn(values.shape)
    model.save_pretrained(tmp_path / "adapter")
    merging.to_folder(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", "fp32")
    ids = torch.tensor([[*new, 3, 5, new[1], 9]])
    with torch.no_grad():
        truth, found = (each.eval()(input_ids=ids).logits for each in (model, tiny.load(tmp_path / "merged")))
    assert found.shape == truth.shape and off(found, truth) < 1e-4


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"target_modules": TABLE}, {"r": 5}, "config gives them rank 5"),
        ({"target_modules": TABLE}, {"use_dora": True}, "holds no lora_magnitude|magnitudes of model.embed"),
        ({"target_modules": ["embed_tokens"]}, {}, "trains model.embed_tokens and no linear layer"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [1]}, "lists 1 tokens of"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [2, 2]}, "lists 2 tokens of"),
        (
            {"trainable_token_indices": [1, 2]},
            {"trainable_token_indices": [1, -2]},
            "doesn't list the tokens",
        ),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": {"other": [1, 2]}}, "doesn't list"),
        ({}, {"trainable_token_indices": [1]}, "holds no trainable_tokens_delta"),
    ],
)
def test_refuses(
    options: dict[str, Any], settings: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = lora(bases["own"], tmp_path / "adapter", **options)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        read(folder)


@pytest.mark.filterwarnings("ignore")
def test_refuses_a_table_that_isnt_the_bases(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = lora(bases["own"], tmp_path / "rows", trainable_token_indices=[1, 2])
    config = json.loads((rows / "adapter_config.json").read_text()) | {"trainable_token_indices": [1, 9999]}
    (rows / "adapter_config.json").write_text(json.dumps(config))
    pair = lora(bases["own"], tmp_path / "pair", target_modules=TABLE)
    state = load_file(pair / "adapter_model.safetensors")
    short = next(name for name in state if name.endswith("lora_embedding_A"))
    save_file(state | {short: state[short][:, :9].contiguous()}, pair / "adapter_model.safetensors")
    head = lora(bases["tied"], tmp_path / "head", target_modules=TABLE, ensure_weight_tying=True)
    state = load_file(head / "adapter_model.safetensors")
    other = next(name for name in state if name.endswith("lm_head.lora_B.weight"))
    save_file(state | {other: state[other] + 1}, head / "adapter_model.safetensors")
    for folder, base, message in (
        (rows, "own", "a token 9999"),
        (pair, "own", "was trained with shape"),
        (head, "tied", "holds something else"),
    ):
        with pytest.raises(MismatchError, match=message):
            merging.to_folder(bases[base], [(folder, 1.0)], tmp_path / "out", "fp32")
        assert not (tmp_path / "out").exists()


def test_two_adapters_differ_in_what_they_made_of_embeddings(bases: dict[str, Path], tmp_path: Path) -> None:
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder in (one, two):
        lora(bases["own"], folder, trainable_token_indices=[1, 2])
    state = load_file(two / "adapter_model.safetensors")
    rows = next(name for name in state if name.endswith("trainable_tokens_delta"))
    assert not compare_adapters(one, two).layers
    save_file(state | {rows: 2 * state[rows]}, two / "adapter_model.safetensors")
    assert compare_adapters(one, two).layers == {"model.embed_tokens": pytest.approx(1)}
