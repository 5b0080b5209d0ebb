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

# In forks of one process that has imported what it takes; prints their peaks in kB. A fork's peak begins
# with what it has then, which is the same for all. Parts are of some MB at a time, or of any size.
_START = """
import json, os, sys
from pathlib import Path
exec(sys.argv[1])
for base, adapter, out, text, at_once in json.loads(sys.argv[3]):
    if os.fork() == 0:
        try:
            base, adapter, out, text = map(Path, (base, adapter, out, text))
            adapters = [(adapter, 1.0)]
            exec(sys.argv[2])
            status = open("/proc/self/status")
            print(next(line.split()[1] for line in status if line.startswith("VmHWM:")), flush=True)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.wait()
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


def peaks(way: str, jobs: list[tuple[tuple[Path, Path], int]], folder: Path) -> list[int]:
    """Bytes that each job takes: a model, and the bytes of a part."""
    text = folder / "text.txt"
    text.write_text(tiny.TEXT * 60)
    told = [
        [*map(str, (*model, folder / f"out{number}", text)), at_once]
        for number, (model, at_once) in enumerate(jobs)
    ]
    done = subprocess.run(
        [sys.executable, "-c", _START, *_WAYS[way], json.dumps(told)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = [1024 * int(line) for line in done.stdout.splitlines()]
    assert len(found) == len(jobs), done.stderr
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("way", _WAYS)
def test_it_does_not_grow_with_the_layers(
    models: dict[int, tuple[Path, Path]], tmp_path: Path, way: str
) -> None:
    jobs = [(models[_FEW], 1 << 23), (models[_MANY], 1 << 23)]
    if way == "export int8":  # what holds all layers would fail
        jobs.append((models[_MANY], 1 << 40))
    few, many, *whole = peaks(way, jobs, tmp_path)
    more = (_MANY - _FEW) * _LAYER
    assert (many - few) / more < 0.4
    assert all((one - few) / more > 0.75 for one in whole)
