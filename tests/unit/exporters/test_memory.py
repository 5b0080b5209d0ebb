"""Merges, exports and drift take the memory of one layer: it doesn't grow with their number."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.peaks import peaks

_FEW, _MANY = 2, 6
_WIDTH, _INNER = 768, 2304
_LAYER = 4 * (2 * _WIDTH**2 + 2 * _WIDTH * _WIDTH // 4 + 3 * _WIDTH * _INNER)  # bytes in float32

# Parts are of some MB at a time, or of any size.
_JOB = """
*folders, at_once = job
base, adapter, out, text = map(Path, folders)
adapters = [(adapter, 1.0)]
"""
_MERGE = "merging.to_folder(base, adapters, out)\n"
_TORCH = """
import torch, transformers, peft, onnxruntime
torch.set_num_threads(1)
from vera_edge import merging
from vera_edge.api.drift import drift
from vera_edge.exporting import target
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge.rounding import writeback
from vera_edge_onnx.decoder import export, held
from vera_edge_onnx.graph import segments
"""
_EXPORT = """
segments.MOST = held._AT_ONCE = at_once
rounding = Rounding(text=str(text), tokens=1024, effort="quick")
target.export(base, adapters, out, weights="{}", rounding=rounding)
"""
_DRIFT = "drift(adapter, out, base=base, data=text, tokens=128, window=64, max_memory=1 << 20)\n"
# What is imported, and what is done.
_WAYS = {
    "merge": ("from vera_edge import merging\n", _MERGE),
    "export int8": (_TORCH, _EXPORT.format("int8")),
    "export int4": (_TORCH, _EXPORT.format("int4")),
    "drift": (_TORCH, _MERGE + _DRIFT),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    """Two Llamas in bfloat16 that differ in their number of layers, each with an adapter on all linears."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    found = {}
    for layers in (_FEW, _MANY):
        folder = tmp_path_factory.mktemp("model")
        config = LlamaConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=_WIDTH,
            intermediate_size=_INNER,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        torch.manual_seed(7)
        base = tiny.save(LlamaForCausalLM(config).to(torch.bfloat16), folder / "base")
        found[layers] = base, tiny.make_adapter(base, folder / "adapter")
    return found


def peaks_of(way: str, jobs: list[tuple[tuple[Path, Path], int]], folder: Path) -> list[int]:
    """Bytes that each job takes: a model, and the bytes of a part."""
    text = folder / "text.txt"
    text.write_text(tiny.TEXT * 60)
    told = [
        [*map(str, (*model, folder / f"out{number}", text)), at_once]
        for number, (model, at_once) in enumerate(jobs)
    ]
    imports, work = _WAYS[way]
    return peaks(imports, _JOB + work, told)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("way", _WAYS)
def test_it_does_not_grow_with_the_layers(
    models: dict[int, tuple[Path, Path]], tmp_path: Path, way: str
) -> None:
    jobs = [(models[_FEW], 1 << 23), (models[_MANY], 1 << 23)]
    if way == "export int8":  # what holds all layers would fail
        jobs.append((models[_MANY], 1 << 40))
    few, many, *whole = peaks_of(way, jobs, tmp_path)
    more = (_MANY - _FEW) * _LAYER
    assert (many - few) / more < 0.4
    assert all((one - few) / more > 0.75 for one in whole)
