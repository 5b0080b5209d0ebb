"""Merges, exports and drift take the memory of one layer: it doesn't grow with their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

_FEW, _MANY = 2, 6
_WIDTH, _INNER = 768, 2304
_LAYER = 4 * (2 * _WIDTH**2 + 2 * _WIDTH * _WIDTH // 4 + 3 * _WIDTH * _INNER)  # bytes in float32

# In a fresh process, parts of some MB at a time unless "whole"; prints its peak in bytes.
_START = """
import json, sys
from pathlib import Path
base, adapter, out, text = map(Path, json.loads(sys.argv[1]))
adapters, at_once = [(adapter, 1.0)], json.loads(sys.argv[2])
"""
_EXPORT = """
from vera_edge.exporting import target
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge_onnx.decoder import held
from vera_edge_onnx.graph import segments
segments.MOST = held._AT_ONCE = at_once
rounding = Rounding(text=str(text), tokens=1024, effort="quick")
"""
_MERGE = """
from vera_edge import merging
merging.to_folder(base, adapters, out)
"""
_DRIFT = """
from vera_edge.api.drift import drift
drift(adapter, out, base=base, data=text, tokens=128, window=64, max_memory=1 << 20)
"""
_WAYS = {
    "merge": _MERGE,
    "export int8": f'{_EXPORT}target.export(base, adapters, out, weights="int8", rounding=rounding)\n',
    "export int4": f'{_EXPORT}target.export(base, adapters, out, weights="int4", rounding=rounding)\n',
    "drift": _MERGE + _DRIFT,
}
_END = """
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


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


def peak(way: str, model: tuple[Path, Path], folder: Path, whole: bool = False) -> int:
    text = folder / "text.txt"
    text.write_text(tiny.TEXT * 60)
    words = [str(path) for path in (*model, folder / f"out-{model[0].parent.name}-{whole}", text)]
    code, at_once = _START + _WAYS[way] + _END, 1 << 40 if whole else 1 << 23
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words), json.dumps(at_once)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("way", _WAYS)
def test_it_does_not_grow_with_the_layers(
    models: dict[int, tuple[Path, Path]], tmp_path: Path, way: str
) -> None:
    few, many = (peak(way, models[layers], tmp_path) for layers in (_FEW, _MANY))
    more = (_MANY - _FEW) * _LAYER
    assert (many - few) / more < 0.4
    if way == "export int8":  # what holds all layers would have failed
        assert (peak(way, models[_MANY], tmp_path, whole=True) - few) / more > 0.75
