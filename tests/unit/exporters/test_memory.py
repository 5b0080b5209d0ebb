"""Merges, exports and drift take the memory of one layer: it doesn't grow with their number."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.peaks import llama, peaks

_FEW, _MANY = 2, 6
_WIDTH, _INNER = 768, 2304
_LAYER = 4 * (2 * _WIDTH**2 + 2 * _WIDTH * _WIDTH // 4 + 3 * _WIDTH * _INNER)  # bytes in float32

# Parts are of some MB at a time, or of any size.
_JOB = """
way, *folders, at_once = job
base, adapter, out, text = map(Path, folders)
adapters = [(adapter, 1.0)]
exec(way)
"""
_MERGE = "merging.to_folder(base, adapters, out)\n"
_IMPORTS = """
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
_WAYS = {
    "merge": _MERGE,
    "export int8": _EXPORT.format("int8"),
    "export int4": _EXPORT.format("int4"),
    "drift": _MERGE + _DRIFT,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    """Two Llamas in bfloat16 that differ in their number of layers, each with an adapter on all linears."""
    import torch

    found = {}
    for layers in (_FEW, _MANY):
        folder = tmp_path_factory.mktemp("model")
        base = tiny.save(llama(layers, _WIDTH, _INNER).to(torch.bfloat16), folder / "base")
        found[layers] = base, tiny.make_adapter(base, folder / "adapter")
    return found


@pytest.fixture(scope="module")
def taken(
    models: dict[int, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[int]]:
    """By way the bytes that few layers and many take, and many in one part; in forks of one process."""
    folder = tmp_path_factory.mktemp("taken")
    text = folder / "text.txt"
    text.write_text(tiny.TEXT * 60)
    jobs = [(way, layers, 1 << 23) for way in _WAYS for layers in models]
    jobs.append(("export int8", _MANY, 1 << 40))
    told = [
        [_WAYS[way], *map(str, (*models[layers], folder / f"out{number}", text)), at_once]
        for number, (way, layers, at_once) in enumerate(jobs)
    ]
    found: dict[str, list[int]] = {way: [] for way in _WAYS}
    for (way, _, _), size in zip(jobs, peaks(_IMPORTS, _JOB, told), strict=True):
        found[way].append(size)
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("way", _WAYS)
def test_it_does_not_grow_with_the_layers(taken: dict[str, list[int]], way: str) -> None:
    few, many, *whole = taken[way]
    more = (_MANY - _FEW) * _LAYER
    assert (many - few) / more < 0.4
    assert len(whole) == (way == "export int8")  # what holds all layers would fail
    assert all((one - few) / more > 0.75 for one in whole)
