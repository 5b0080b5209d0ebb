"""A VeRA adapter written as LoRA computes the same in PEFT, on Linear and on Conv1D layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from vera_edge.errors import AdapterError, OutputError
from vera_edge.trained.to_lora import to_lora


def logits(base: Path, adapter: Path) -> np.ndarray:
    import torch
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


def logits_of_base(base: Path) -> np.ndarray:
    import torch

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
