"""Merging into GPTQ, AWQ and compressed-tensors: rounded to nearest, or with codes chosen elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from vera_edge import formats
from vera_edge import merging as merge
from vera_edge.adapters.vera import vectors_of
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.requantize import Grid, requantize

CASES: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"group_size": 32}),
    ("gptq", {"group_size": -1, "sym": False}),
    ("gptq8", {"group_size": 32}),
    ("awq", {"group_size": 32}),
    ("w4a16", {"group_size": 32}),
    ("w8a8", {}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]


def _grid(name: str, options: Any, inside: int) -> Grid:
    bits, group, symmetric = formats.get(name).integer_grid(options)  # type: ignore[attr-defined]
    return Grid("int", bits, inside if group == -1 else group, symmetric=symmetric)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_codes_chosen_elsewhere_are_what_is_stored(
    name: str, options: dict[str, Any], tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    ready = merge.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], name, options)
    adapter, projections = ready.model.adapters[0][0], ready.model.projections
    codes = {}
    for step in ready.plan.steps:
        if step.result != name:
            continue
        vectors = vectors_of(adapter)[step.module]
        assert projections is not None
        delta = projections.delta(vectors.lambda_b, vectors.lambda_d, step.shape[1])
        target = ready.model.checkpoint.dequantize(step.module) + delta
        codes[step.module] = requantize(target, _grid(name, step.options, step.shape[1]), "hqq")
    assert len(codes) == 14
    merge.perform(ready, tmp_path / "out", requantized=codes)
    written = Checkpoint.open(tmp_path / "out")
    for module, chosen in codes.items():
        expected = chosen.dequantize()
        # scales are stored as float16, which is all that differs
        off = np.abs(written.dequantize(module) - expected)
        assert (off <= np.abs(expected) * 2**-10 + 1e-7).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_rounded_to_nearest_it_reads_back(
    name: str, options: dict[str, Any], tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out", name, options)
    merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "fp32", "fp32")
    written, exact = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "fp32")
    assert written.quantized and not exact.quantized
    for module in exact.linears:
        weight = exact.dequantize(module)
        error = np.linalg.norm(written.dequantize(module) - weight) / np.linalg.norm(weight)
        assert error < (0.02 if "8" in name else 0.16), module


def test_wide_layers_are_measured_in_pieces_that_the_formats_take(tmp_path: Path) -> None:
    """A piece of rows is quantized by itself to see what survives; at 1536 inputs it would be 170 rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=192,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = tiny.make_adapter(tmp_path / "base", tmp_path / "adapter")
    for name in ("gptq8", "awq", "w4a16", "fp8"):
        options = {} if name == "fp8" else {"group_size": 32}
        report = merge.to_folder(tmp_path / "base", [(adapter, 1.0)], tmp_path / name, name, options)
        assert len(report.layers) == 7
