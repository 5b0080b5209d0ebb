"""A base of many families, merged into quantized formats, loads in transformers with the layers as stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import FAMILIES
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.formats.dense import DTYPES

KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


def stored_bytes(layer: Any) -> bytes:
    data: bytes = layer.weight.data.contiguous().view(torch.uint8).numpy().tobytes()
    return data


@pytest.mark.parametrize("to", ["nf4", "int8"])
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox", "opt", "bert", "roberta", "t5", "phi3", "qwen2", "gemma2", "whisper", "vit"]
)
def test_transformers_loads_each_layer_as_it_is_stored(name: str, to: str, tmp_path: Path) -> None:
    """What stays in floats (heads, poolers, T5's wo) must be what transformers leaves alone, and no more."""
    family = FAMILIES[name]
    base, out = tmp_path / "base", tmp_path / "out"
    family.make().save_pretrained(base)
    adapter = family.adapted(base, tmp_path / "adapter")
    merge.to_folder(base, [(adapter, 1.0)], out, to)
    checkpoint = Checkpoint.open(out)
    model = type(family.make()).from_pretrained(out, device_map="cpu")
    modules = dict(model.named_modules())
    # Compared by content: transformers renames the layers of some families as it loads them.
    stored = {
        module: checkpoint.tensors.read(f"{module}.weight").data.tobytes()
        for module, linear in checkpoint.linears.items()
        if linear.format == to
    }
    assert stored
    held = [stored_bytes(layer) for layer in modules.values() if type(layer).__name__ == KINDS[to]]
    assert sorted(held) == sorted(stored.values())
    floats = {np.sort(value.detach().float().numpy(), axis=None).tobytes() for value in model.parameters()}
    for module, linear in checkpoint.linears.items():
        if linear.format in DTYPES:
            assert np.sort(checkpoint.dequantize(module), axis=None).tobytes() in floats, module
