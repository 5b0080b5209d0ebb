"""A plan of a model that is read layer by layer is the plan of the same model held in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.unit.rounding.test_writeback import letters
from vera_edge import merging as merge
from vera_edge.arrays import Float32, Int64
from vera_edge.precision import PlanRequest
from vera_edge.precision.changes import Change, Replaying
from vera_edge.precision.choose import choose
from vera_edge.precision.replay import Replay
from vera_edge.precision.streamed_replay import StreamedReplay
from vera_edge.precision.trained import trained_model, trained_stream
from vera_edge.precision.units import ends_change
from vera_edge.progress import silent

WINDOWS = [
    np.random.default_rng(seed).integers(3, tiny.VOCABULARY, size) for seed, size in enumerate((24, 24, 9))
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def both(tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> dict[str, tuple[Replaying, Any, Any]]:
    """The model in memory and read layer by layer: a replay, the model, what gives a parameter's values."""
    ready = merge.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)])
    model, stream = trained_model(ready), trained_stream(ready)
    assert stream is not None
    whole = Replay(model, list(ready.model.checkpoint.linears), WINDOWS)
    light = StreamedReplay(stream, WINDOWS)
    return {"whole": (whole, model, lambda t: t), "light": (light, stream.model, stream.weights.values)}


def shifted(model: Any, modules: Any) -> Change:
    """Weights moved a little, and what is read rounded."""
    weights = {f"{name}.weight": model.get_submodule(name).weight.data * 1.01 for name in modules}
    return Change(weights, dict.fromkeys(modules, 32))


def test_each_change_and_all_of_them_cost_the_same(both: dict[str, tuple[Replaying, Any, Any]]) -> None:
    units = [
        [f"model.layers.{layer}.{part}_proj" for part in parts]
        for layer in (0, 1)
        for parts in (("self_attn.q", "self_attn.k"), ("mlp.down",))
    ]
    each, joint, read = {}, {}, dict[str, list[torch.Tensor]]()
    for name, (replay, model, values) in both.items():
        seen = read.setdefault(name, [])

        def change_of(modules: Any, x: torch.Tensor, model: Any = model, to: Any = seen) -> Change | None:
            to.append(x)
            return None if "layers.1.mlp" in modules[0] else shifted(model, modules)

        def outside(parts: Any, model: Any = model, values: Any = values) -> Change:
            return ends_change(model, "int4", values, parts)

        def layer(index: int, model: Any = model) -> Change:
            return shifted(model, units[2 * index])

        each[name] = replay.each([outside, lambda parts: Change({})], units, change_of, silent)
        joint[name] = [replay.joint(layer, outside) for _ in range(2)]
    assert each["light"] == each["whole"] and joint["light"] == joint["whole"]
    assert each["whole"][0] > 1e-4 and each["whole"][1] == each["whole"][-1] == 0
    assert min(each["whole"][2:5]) > 1e-7 and len(set(each["whole"])) == 5
    assert joint["whole"][0] == joint["whole"][1] > each["whole"][0]
    assert len(read["whole"]) == 4
    for ours, theirs in zip(read["whole"], read["light"], strict=True):
        assert torch.equal(ours, theirs)


def test_an_export_is_held_against_the_same_logits(both: dict[str, tuple[Replaying, Any, Any]]) -> None:
    class Noisy:
        vocab_size = tiny.VOCABULARY

        def logits(self, tokens: Int64) -> Float32:
            draw = np.random.default_rng(len(tokens))
            return draw.standard_normal((len(tokens), self.vocab_size), np.float32)

    whole, light = (both[name][0].kl_of(Noisy()) for name in ("whole", "light"))
    assert light == whole > 0.1


def test_no_weight_is_left_in_the_model(both: dict[str, tuple[Replaying, Any, Any]]) -> None:
    replay, model, values = both["light"]
    replay.joint(lambda index: Change({}), lambda parts: ends_change(model, "int8", values, parts))
    assert all(own.isnan().all() for own in model.parameters() if own.ndim > 1)


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_the_plan_is_the_same(
    mode: str, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(letters(0))
    asked: dict[str, Any] = {"tokens": 128, "calibration_tokens": 512, "mode": mode}
    asked |= {"calibration": str(tmp_path / "text.txt"), "max_kl": 0.01}
    found = {}
    for memory in (None, 1000):
        request = PlanRequest(**asked, max_memory=memory)
        chosen = choose(tiny_llama.nf4, [(tiny_adapter, 1.0)], request, tmp_path / "plan.json").to_dict()
        told = [note for note in chosen.pop("notes") if "read layer by layer" in note]
        assert len(told) == (memory is not None)
        del chosen["seconds"]
        found[memory] = chosen
    assert found[1000] == found[None]
