"""What a model run layer by layer takes at its peak doesn't grow with its layers; held whole, it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.peaks import peaks

_FEW, _MANY = 2, 8
_WIDTH, _INNER, _VOCABULARY = 512, 2048, 512
_LAYER = 4 * (4 * _WIDTH**2 + 3 * _WIDTH * _INNER)  # bytes in float32

_IMPORTS = """
from types import SimpleNamespace
import numpy as np
import torch
torch.set_num_threads(1)
from vera_edge.adapters.projection import ProjectionSpec, regenerate
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.measuring import layers, opened_candidate, opened_reference
from vera_edge.precision.changes import Change
from vera_edge.precision.streamed_replay import StreamedReplay
from vera_edge.precision.trained import trained_stream
from vera_edge.progress import silent
from vera_edge.reference.model import TorchReference, open_reference
from vera_edge.text.windows import Windows
from vera_edge.trained.trained_model import TrainedModel

windows = [np.arange(64, dtype=np.int64) * (number + 1) % 512 for number in range(4)]
"""
_JOB = """
path, kind = job
checkpoint, light = Checkpoint.open(Path(path)), kind == "light"
"""
_WAYS = {
    "logits": """
view = open_reference(checkpoint, layer_by_layer=light)
assert (view.stream is not None) == light
for _ in view.logits_together([view, view.bfloat16()], windows):
    pass
""",
    "by layer": """
found = layers.by_layer(
    opened_reference.open_trained(checkpoint.path, max_memory=1 if light else None),
    opened_candidate.open_candidate(checkpoint.path, max_memory=1 if light else None),
    Windows(None, tuple(window[:16] for window in windows), 16),
)
assert len(found) == len(checkpoint.linears)
""",
    "plan": """
ready = SimpleNamespace(model=TrainedModel(checkpoint, (), regenerate(ProjectionSpec(0, 1, 1, 1))))
stream = trained_stream(ready)
replay = StreamedReplay(stream, [window[:16] for window in windows])
weight = lambda name: stream.model.get_submodule(name).weight.data
halved = lambda modules, x: Change({f"{name}.weight": weight(name) / 2 for name in modules})
units = [[name] for name in checkpoint.linears if "down_proj" in name]
found = replay.each([], units, halved, silent)
assert len(found) == checkpoint.config["num_hidden_layers"] and min(found) > 0
replay.joint(lambda index: halved(units[index], None), lambda parts: Change({}))
""",
}
_HELD_WHOLE_TOO = ("logits",)  # the others would hold the same model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two Llamas in bfloat16 that differ in their number of layers."""
    found = {}
    for layers in (_FEW, _MANY):
        config = transformers.LlamaConfig(
            vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_INNER, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8,
        )  # fmt: skip
        found[layers] = tmp_path_factory.mktemp("base") / str(layers)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(found[layers])
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' own count")
@pytest.mark.parametrize("way", _WAYS)
def test_the_peak_does_not_grow_with_the_layers(bases: dict[int, Path], way: str) -> None:
    kinds = ("light", "whole") if way in _HELD_WHOLE_TOO else ("light",)
    jobs = [(kind, layers) for kind in kinds for layers in bases]
    told = [(str(bases[layers]), kind) for kind, layers in jobs]
    found = dict(zip(jobs, peaks(_IMPORTS, _JOB + _WAYS[way], told), strict=True))
    more = (_MANY - _FEW) * _LAYER
    grown = {kind: (found[kind, _MANY] - found[kind, _FEW]) / more for kind in kinds}
    assert grown["light"] < 0.25, (grown, found)
    assert grown.get("whole", 1) > 0.75, (grown, found)
