"""Models run layer by layer give the bits that they give whole; those that can't be run so are held whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests import tiny
from tests.families import FAMILIES, VOCABULARY
from vera_edge.arrays import Float32, Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError
from vera_edge.reference.hidden_states import HiddenStates, Room
from vera_edge.reference.model import TorchReference, open_reference
from vera_edge.tasks import task as tasks
from vera_edge.trained import alignment, provenance

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B")
TEXT = sorted(set(FAMILIES) - {"vit", "whisper", "t5"})
WINDOWS = [np.random.default_rng(seed).integers(3, VOCABULARY, size) for seed, size in enumerate((12, 12, 7))]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def opened(base: Path, adapter: Path | None = None, light: bool = False) -> TorchReference:
    checkpoint = Checkpoint.open(base)
    task = tasks.of(checkpoint.config).auto_class
    if adapter is None:
        return open_reference(checkpoint, auto_class=task, layer_by_layer=light)
    read = alignment.read(adapter, checkpoint)
    projections = provenance.resolve(read, checkpoint).projections
    return open_reference(checkpoint, [(read, 1.0)], projections, task, light)


def both(base: Path, adapter: Path | None = None) -> tuple[TorchReference, TorchReference]:
    """The model whole and layer by layer."""
    whole, light = opened(base, adapter), opened(base, adapter, light=True)
    assert whole.stream is None and light.stream is not None
    return whole, light


def outputs(view: TorchReference, windows: Sequence[Int64] = WINDOWS) -> list[Float32]:
    model = view.model.base_model.model if view.has_adapter else view.model
    return list(
        view.hidden_of(windows) if type(model).__name__ == "RobertaModel" else view.logits_of(windows)
    )


def assert_same(one: TorchReference, other: TorchReference) -> None:
    expected, found = outputs(one), outputs(other)
    assert all(np.isfinite(values).all() for values in expected)
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("name", TEXT)
def test_each_family_gives_the_bits_of_the_whole_model_in_every_view(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path / "base")
    adapter = family.adapted(tmp_path / "base", tmp_path / "adapter")
    whole, light = both(tmp_path / "base", adapter)
    assert_same(whole, light)
    assert_same(whole.adapter_off(), light.adapter_off())
    assert_same(whole.bfloat16(), light.bfloat16())
    assert np.abs(outputs(light)[0] - outputs(light.adapter_off())[0]).max() > 0.01
    assert_same(whole, light)  # the views came and went


@pytest.mark.parametrize("form", ["nf4", "int8", "bf16", "sharded"])
def test_each_stored_form(tiny_llama: tiny.TinyLlama, form: str) -> None:
    assert_same(*both(getattr(tiny_llama, form)))


def test_views_together_are_each_alone(tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> None:
    whole, light = both(tiny_llama.nf4, tiny_adapter)
    views = [light, light.adapter_off(), light.bfloat16()]
    found = list(light.logits_together(views, WINDOWS, [None, None, 1]))
    assert [len(row) for row in found] == [3, 2, 2]
    alone = [outputs(view) for view in (whole, whole.adapter_off(), whole.bfloat16())]
    for row, logits in enumerate(found):
        for view, values in enumerate(logits):
            np.testing.assert_array_equal(values, alone[view][row])


def _saved(base: Path, folder: Path, modules: Sequence[str], targets: Sequence[str]) -> Path:
    """An adapter that holds whole modules, trained away from the base's."""
    settings = peft.VeraConfig(r=8, target_modules=list(targets), modules_to_save=list(modules) or None)
    model = peft.get_peft_model(tiny.load(base), settings)
    tiny.randomize(model, 0.25, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("modules", "targets"),
    [(("lm_head", "embed_tokens"), ("q_proj",)), (("k_proj",), ("q_proj",)), ((), ("q_proj", "lm_head"))],
)
def test_matrices_that_the_adapter_holds_whole(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, modules: Sequence[str], targets: Sequence[str]
) -> None:
    model = tiny.load(tiny_llama.fp32, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0.5)
    base = tiny.save(model, tmp_path / "untied")
    whole, light = both(base, _saved(base, tmp_path / "adapter", modules, targets))
    assert_same(whole, light)
    assert_same(whole.adapter_off(), light.adapter_off())
    assert_same(opened(base), light.adapter_off())


def test_no_weight_is_left_in_memory(tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> None:
    """Between passes, and after one that was given up."""
    light = opened(tiny_llama.nf4, tiny_adapter, light=True)
    next(light.logits_of(WINDOWS))
    bytes_held = {
        own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in light.model.parameters()
    }
    matrices = 4 * sum(own.numel() for own in light.model.parameters())
    assert sum(bytes_held.values()) < matrices / 10


def test_greedy_continuations_are_those_of_the_whole_model(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    whole, light = both(tiny_llama.nf4, tiny_adapter)
    prompts = [window[:6] for window in WINDOWS]
    expected = [whole.greedy(prompt, 5, ()) for prompt in prompts]
    assert light.greedy_of(prompts, 5, ()) == expected
    ends = [expected[1][2]]
    assert light.greedy_of(prompts, 5, ends) == [whole.greedy(prompt, 5, ends) for prompt in prompts]


def test_experts_that_transformers_fuses_are_held_whole(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**FAMILIES["llama"].config, num_local_experts=4)
    torch.manual_seed(3)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    whole, asked = opened(tmp_path), opened(tmp_path, light=True)
    assert asked.stream is None
    assert_same(whole, asked)


def test_layers_that_hand_on_more_than_hidden_states_are_held_whole(
    tiny_llama: tiny.TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that reads what an earlier one left elsewhere, of the text that runs just then."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaDecoderLayer.forward
    left: dict[str, Any] = {}

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = own(self, hidden_states, **kwargs) + left.get("sum", 0.0)
        left["sum"] = found.sum() * 0.01 if self.self_attn.layer_idx == 0 else 0.0
        return found

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    assert opened(tiny_llama.fp32, light=True).stream is None


def test_what_the_whole_model_lacks_is_told_of_it(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    import json
    import shutil

    folder = shutil.copytree(tiny_llama.fp32, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.2"):
        opened(folder, light=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_beyond_the_budget_come_back_from_disk(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    states = HiddenStates(Room(1000))
    expected: dict[int, torch.Tensor] = {}
    for turn in range(3):
        for row, length in enumerate((5, 9, 30, 4, 30)):
            expected[row] = torch.randn(1, length + (turn == 2), 8, generator=draw).to(dtype)
            states[row] = expected[row]
        assert states._kinds and states._held  # some of each
        assert all(torch.equal(states[row], values) for row, values in expected.items())
    assert len(states) == 5
