"""Adapters that change biases, beside an untouched base: each is PEFT's unmerged forward in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests import peft_adapters, tiny
from tests.conftest import Cli
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.exporting import target
from vera_edge.reference.model import load_dense
from vera_edge_onnx.branch.gains import Gains
from vera_edge_onnx.parity import NotTheModel

TOKENS = peft_adapters.TOKENS[0].numpy()
# Adapter -> PEFT's config class and settings; q, k and v of a Qwen2 have biases. The first is the default.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "gate_proj"]}),
    "ia3": ("IA3Config", {"target_modules": ["q_proj", "k_proj", "v_proj"], "feedforward_modules": []}),
    "trained": ("LoraConfig", {"r": 4, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True, "bias": "lora_only", "target_modules": ["k_proj"]}),
    "added": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["v_proj"]}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    return tiny.save(model, tmp_path_factory.mktemp("qwen2") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for name, (cls, options) in ADAPTERS.items():
        settings = getattr(peft, cls)(task_type="CAUSAL_LM", **options)
        found[name] = peft_adapters.save(base, root / name, settings, 0.3)
    return found


@pytest.fixture(scope="module")
def mixed(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    target.export(base, [(folder, 1.0) for folder in adapters.values()], out, mode="branch")
    return out


def truth(base: Path, adapter: Path | None) -> torch.Tensor:
    model = load_dense(Checkpoint.open(base))
    return peft_adapters.logits(model if adapter is None else peft_adapters.unmerged(model, adapter))


def test_each_is_pefts_unmerged_forward(mixed: Path, base: Path, adapters: dict[str, Path]) -> None:
    session, plain = Session.open(mixed), truth(base, None)
    for name, folder in adapters.items():
        session.swap(name)
        wanted = truth(base, folder)
        assert peft_adapters.close(torch.from_numpy(np.array(session.logits(TOKENS))), wanted), name
        assert not peft_adapters.close(plain, wanted), name
        session.swap(None)
        assert peft_adapters.close(torch.from_numpy(np.array(session.logits(TOKENS))), plain), name


def test_a_graph_that_is_wrong_for_a_later_adapter_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gains, which the first adapter has none of, are taken out of the graph by hand."""
    monkeypatch.setattr(Gains, "added", lambda *_: iter(()))
    both = [(adapters["default"], 1.0), (adapters["ia3"], 1.0)]
    with pytest.raises(NotTheModel, match=r"Qwen2ForCausalLM computes with .*/ia3 beside it"):
        target.export(base, both, tmp_path / "out", mode="branch")


@pytest.mark.parametrize("name", ["ia3", "trained", "added"])
def test_packed_afterwards_it_is_the_file_of_the_export(
    name: str, mixed: Path, base: Path, adapters: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    again = tmp_path / "again.onnx_adapter"
    words = ("adapter", "pack", adapters[name], "--for", mixed, "-o", again)
    done = cli(*words)
    assert done.exit_code == 2 and "give --base" in " ".join(done.output.split()), done.output
    assert cli(*words, "--base", base).exit_code == 0
    file = mixed / bundle.read(mixed).adapters[name]["file"]
    assert again.read_bytes() == file.read_bytes()
    done = cli(*words, "--base", base, "--force", "--weight", "0.5")
    assert done.exit_code == 2 and "give it weight 1" in " ".join(done.output.split()), done.output


def test_a_graph_without_room_for_biases_refuses_them(
    base: Path, adapters: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    target.export(base, [(adapters["default"], 1.0)], tmp_path / "plain", mode="branch")
    words = ("adapter", "pack", adapters["trained"], "--for", tmp_path / "plain", "-o", tmp_path / "file")
    done = cli(*words, "--base", base)
    assert done.exit_code == 2 and "brings biases, and the side-branches" in " ".join(done.output.split())
