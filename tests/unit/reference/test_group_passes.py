"""A layer run group by group multiplies each linear once a stream, and gives the bits that it gives whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, VOCABULARY
from tests.unit.reference.test_calibration import linears
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.reference import group_passes
from vera_edge.reference.calibration import LayerInputs, Walk
from vera_edge.reference.group_passes import GroupPlan
from vera_edge.reference.hidden_states import ROOM, HiddenStates
from vera_edge.reference.layers import Changed
from vera_edge.reference.model import TorchReference, load_dense, load_light
from vera_edge.reference.products import Mean, MeanProduct
from vera_edge.reference.streamed import LayerStream
from vera_edge.storage.spill import SpillFile

WINDOWS = [np.random.default_rng(seed).integers(3, VOCABULARY, size) for seed, size in enumerate((12, 12, 7))]
DECODERS = ("llama", "gemma2", "phi3", "gpt2", "gpt-neox", "opt")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def walked(
    model: Any, names: frozenset[str], stream: LayerStream | None = None, room: int = ROOM
) -> list[LayerInputs]:
    """All statistics of a walk in which every linear is rounded coarsely as soon as it was seen."""
    found: list[LayerInputs] = []

    def rounded(inputs: LayerInputs) -> Mapping[str, Changed]:
        found.append(inputs)
        weights = {name: model.get_submodule(name).weight.data for name in inputs.modules}
        return {name: Changed((weight * 16).round() / 16) for name, weight in weights.items()}

    Walk(model, names, WINDOWS, "inputs", stream=stream, room=room).run(rounded)
    return found


def opened(name: str, folder: Path) -> tuple[Checkpoint, str]:
    FAMILIES[name].make().save_pretrained(folder)
    return Checkpoint.open(folder), "AutoModelForCausalLM"


def same(one: LayerInputs, other: LayerInputs) -> None:
    assert one.modules == other.modules and one.count == other.count
    np.testing.assert_array_equal(one.gram, other.gram)
    assert (one.moved is None) == (other.moved is None)
    if one.moved is not None and other.moved is not None:
        np.testing.assert_array_equal(one.moved, other.moved)
    assert (one.stream is None) == (other.stream is None)
    if one.stream is not None and other.stream is not None:
        np.testing.assert_array_equal(one.stream, other.stream)


@pytest.mark.parametrize("name", DECODERS)
def test_no_bit_changes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against running all of the layer again for each group, and against a model that is streamed."""
    checkpoint, task = opened(name, tmp_path)
    model = load_dense(checkpoint, task).eval()
    names = frozenset(linears(model)) - {"embed_out"}
    plans: list[GroupPlan] = []
    whole = GroupPlan.of

    def kept(layer: Any, hidden: HiddenStates, like: GroupPlan | None) -> GroupPlan:
        plans.append(whole(layer, hidden, like))
        return plans[-1]

    monkeypatch.setattr(group_passes.GroupPlan, "of", kept)
    found = walked(model, names)
    assert len(plans) == 2 and all(plan.needed is not None for plan in plans)
    if name == "llama":  # what o_proj reads takes attention; what comes after has o_proj's output
        assert [sorted(plan.blind) for plan in plans] == [[2, 3, 4]] * 2
    light = load_light(checkpoint, task)
    assert light is not None
    view = TorchReference(light[0].eval(), 0, False)
    stream = LayerStream.of(light[0], light[1], [view])
    streamed = walked(light[0], names, stream)
    monkeypatch.setattr(group_passes.GroupPlan, "of", lambda *given: replace(whole(*given), needed=None))
    again = walked(load_dense(checkpoint, task).eval(), names)
    assert len(found) == len(again) == len(streamed) >= 6
    for one, two, three in zip(found, again, streamed, strict=True):
        same(one, two)
        same(one, three)


def test_each_linear_is_multiplied_once_a_stream(tmp_path: Path) -> None:
    checkpoint, task = opened("llama", tmp_path)
    model = load_dense(checkpoint, task).eval()
    tokens: Counter[str] = Counter()
    own = torch.nn.Linear.forward

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        tokens[self.label] += x.numel() // x.shape[-1]
        return own(self, x)

    for name, module in linears(model).items():
        module.label = name
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.Linear, "forward", counted)
        model.lm_head.label = "lm_head"
        walked(model, frozenset(linears(model)))
    text = sum(map(len, WINDOWS))
    # Beside twice the text: the passes that see how layers are called, and those of one window that look.
    looked = [count - 2 * text for name, count in tokens.items() if name != "lm_head"]
    assert max(looked) <= 12 * len(WINDOWS[0]) + 2 * 12, tokens


def test_hidden_states_on_disk_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, task = opened("llama", tmp_path)
    names = frozenset(linears(load_dense(checkpoint, task)))
    found = walked(load_dense(checkpoint, task).eval(), names)
    written: list[int] = []
    own = SpillFile.write

    def write(self: SpillFile, row: int, data: memoryview) -> None:
        written.append(row)
        own(self, row, data)

    monkeypatch.setattr(SpillFile, "write", write)
    again = walked(load_dense(checkpoint, task).eval(), names, room=3000)
    assert len(written) > 20
    for one, two in zip(found, again, strict=True):
        same(one, two)


@pytest.mark.parametrize("size", [3, 5, 64, 130])
def test_products_are_those_of_all_tokens_at_once(size: int) -> None:
    rng = np.random.default_rng(size)
    x, y = (torch.from_numpy(rng.standard_normal((5000, width)).astype(np.float32)) for width in (size, 7))
    symmetric, cross, mean = MeanProduct(), MeanProduct(), Mean()
    for start in range(0, 5000, 300):
        part = x[start : start + 300]
        symmetric.add(part, part)
        mean.add(part)
        cross.add(part, y[start : start + 300])
    for found, other in ((symmetric, x), (cross, y)):
        expected = (x.double().T @ other.double() / 5000).numpy()
        np.testing.assert_allclose(found.value(), expected, atol=1e-5)
    np.testing.assert_allclose(mean.value(), x.mean(0).numpy(), atol=1e-6)
    assert symmetric.count == 5000
    np.testing.assert_array_equal(symmetric.value(), symmetric.value().T)
