"""Calibration: the statistics are those that plain hooks on the whole model see, whatever the walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import DataError
from vera_edge.reference.calibration import LayerInputs, Sees, Walk, follow_target
from vera_edge.reference.layers import HIDDEN_STATES, Changed, Layer, Stack
from vera_edge.requantize.gram import Gram

WINDOWS = [np.random.default_rng(seed).integers(3, 300, size) for seed, size in enumerate((48, 48, 30))]


def linears(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
    }


def hooked(model: Any) -> dict[str, np.ndarray]:
    """X^T X / n of every linear, by hooks during whole forward passes."""
    sums: dict[str, Any] = {}
    handles = []
    for name, module in linears(model).items():

        def before(_: Any, args: Any, name: str = name) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        handles.append(module.register_forward_pre_hook(before))
    with torch.inference_mode():
        for window in WINDOWS:
            model(input_ids=torch.from_numpy(window[None]))
    for handle in handles:
        handle.remove()
    count = sum(len(window) for window in WINDOWS)
    return {name: (total / count).numpy() for name, total in sums.items()}


def nothing(inputs: LayerInputs) -> Mapping[str, Changed]:
    return {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sees", ["original", "inputs"])
def test_statistics_are_those_of_whole_forward_passes(
    tiny_llama: tiny.TinyLlama, tiny_gpt2: Path, family: str, sees: Sees
) -> None:
    model = tiny.load(tiny_llama.fp32 if family == "llama" else tiny_gpt2).eval()
    expected, found = hooked(model), {}

    def keep(inputs: LayerInputs) -> Mapping[str, Changed]:
        for module in inputs.modules:
            found[module] = inputs
        return {}

    Walk(model, frozenset(expected), WINDOWS, sees).run(keep)
    assert found.keys() == expected.keys()
    for module, inputs in found.items():
        scale = np.abs(expected[module]).max()
        np.testing.assert_allclose(inputs.gram, expected[module], atol=2e-5 * scale)
        for moved in (inputs.moved, inputs.stream):
            if moved is not None:  # nothing changed, so both streams are one
                np.testing.assert_allclose(moved, 0, atol=1e-5 * scale)


def test_linears_of_one_input_are_visited_once(tiny_llama: tiny.TinyLlama) -> None:
    model = tiny.load(tiny_llama.fp32).eval()
    groups: list[tuple[str, ...]] = []

    def visit(inputs: LayerInputs) -> dict[str, Any]:
        groups.append(inputs.modules)
        return {}

    Walk(model, frozenset(linears(model)), WINDOWS[:1], "inputs").run(visit)
    assert [tuple(name.rsplit(".", 1)[1] for name in group) for group in groups[:4]] == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_few_outputs_are_to_make_up_for_is_that_of_the_weight(
    tiny_llama: tiny.TinyLlama, tiny_gpt2: Path, family: str
) -> None:
    """Against W (X - X~)^T X~ + (R - R~)^T X~ of whole passes; GPT-2's weights lie the other way."""
    checkpoint = Checkpoint.open(tiny_llama.fp32 if family == "llama" else tiny_gpt2)
    model = tiny.load(checkpoint.path).eval()
    name, reader = {
        "llama": ("model.layers.1.mlp.down_proj", "model.layers.1.post_attention_layernorm"),
        "gpt2": ("transformer.h.1.mlp.c_proj", "transformer.h.1.ln_2"),
    }[family]
    weight, found, names = checkpoint.dequantize(name), [], frozenset(linears(model))
    before = read_by(model, (name, reader))

    def halve(inputs: LayerInputs) -> Mapping[str, Changed]:
        if name in inputs.modules:
            found.append(inputs)
            return {}
        return {one: Changed(model.get_submodule(one).weight.data * 0.5) for one in inputs.modules}

    Walk(model, names, WINDOWS, "inputs").run(halve)
    after = read_by(model, (name, reader))
    off = before[reader] - after[reader] + (before[name] - after[name]) @ weight.T
    (inputs,) = found
    assert inputs.moved is None and inputs.stream is not None
    expected = off.T @ after[name] / len(off)
    np.testing.assert_allclose(inputs.stream, expected, atol=1e-4 * np.abs(expected).max())


def read_by(model: Any, parts: Sequence[str]) -> dict[str, Any]:
    """What parts of the model read, (tokens, in), over all windows."""
    seen: dict[str, list[torch.Tensor]] = {part: [] for part in parts}

    def before(part: str) -> Any:
        return lambda _, args: seen[part].append(args[0][0])

    handles = [model.get_submodule(part).register_forward_pre_hook(before(part)) for part in parts]
    with torch.inference_mode():
        for window in WINDOWS:
            model(input_ids=torch.from_numpy(window[None]))
    for handle in handles:
        handle.remove()
    return {part: torch.cat(tensors).numpy() for part, tensors in seen.items()}


@pytest.mark.parametrize("sees", ["original", "inputs"])
def test_what_later_layers_see(tiny_llama: tiny.TinyLlama, sees: Sees) -> None:
    """Weights changed on the way show in later inputs, or don't, and the model ends with them or without."""
    model = tiny.load(tiny_llama.fp32).eval()
    before = {name: module.weight.detach().clone() for name, module in linears(model).items()}
    first = hooked(model)
    seen: dict[str, Any] = {}

    def halve(inputs: LayerInputs) -> Mapping[str, Changed]:
        seen.update(dict.fromkeys(inputs.modules, inputs.gram))
        return {module: Changed(before[module] * 0.5) for module in inputs.modules}

    Walk(model, frozenset(before), WINDOWS, sees).run(halve)
    own = "model.layers.0.self_attn.o_proj"
    later = "model.layers.1.mlp.down_proj"
    assert np.allclose(seen[own], first[own], rtol=1e-3, atol=1e-6) == (sees != "inputs")
    assert np.allclose(seen[later], first[later], rtol=1e-3, atol=1e-6) == (sees == "original")
    if sees == "inputs":
        np.testing.assert_allclose(seen[later], hooked(model)[later], rtol=1e-3, atol=1e-7)


def test_following_finds_the_best_weight_for_changed_inputs() -> None:
    rng = np.random.default_rng(3)
    original = rng.standard_normal((400, 24)).astype(np.float32)
    changed = (original + 0.3 * rng.standard_normal((400, 24))).astype(np.float32)
    weight = rng.standard_normal((8, 24)).astype(np.float32)
    inputs = LayerInputs(
        ("m",),
        (changed.T @ changed / 400).astype(np.float32),
        400,
        ((original - changed).T @ changed / 400).astype(np.float32),
    )
    assert inputs.moved is not None
    through = replace(inputs, moved=None, stream=weight @ inputs.moved)

    def error(some: Any) -> float:
        return float(np.square(original @ weight.T - changed @ some.T).sum())

    best, *_ = np.linalg.lstsq(changed, original @ weight.T, rcond=None)
    followed = follow_target(weight, inputs, 1.0, Gram.of(inputs.gram, 1e-6))
    np.testing.assert_allclose(followed, best.T, atol=1e-4)
    by_outputs = follow_target(weight, through, 1.0, Gram.of(inputs.gram, 1e-6))
    np.testing.assert_allclose(by_outputs, best.T, atol=1e-4)
    gram = Gram.of(inputs.gram, inputs.damp)
    errors = [error(follow_target(weight, inputs, share, gram)) for share in (0.0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]
    assert follow_target(weight, LayerInputs(("m",), inputs.gram, 400), 1.0, gram) is weight
    threaded = [follow_target(np.tile(weight, (90, 1)), inputs, 1.0, gram, threads) for threads in (1, 2)]
    assert (threaded[0] == threaded[1]).all() and len(threaded[0]) == 90 * len(weight)


def test_models_and_texts_that_cannot_be_walked(tiny_llama: tiny.TinyLlama) -> None:
    model = tiny.load(tiny_llama.fp32).eval()
    with pytest.raises(DataError, match="no text"):
        Walk(model, frozenset(linears(model)), []).run(nothing)
    with pytest.raises(DataError, match="no stack of layers"):
        Walk(model, frozenset({"lm_head"}), WINDOWS).run(nothing)
    layers = model.model.layers

    class Skipping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.model
            self.config = model.config

        def forward(self, **inputs: Any) -> Any:
            found = self.model(**inputs)
            layers[0](found[0], position_embeddings=self.model.rotary_emb(found[0], torch.arange(48)[None]))
            return found

    with pytest.raises(DataError, match="one after the other"):
        Walk(Skipping(), frozenset(linears(model)) - {"lm_head"}, WINDOWS[:1]).run(nothing)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linears_that_write_to_the_stream_are_found(
    tiny_llama: tiny.TinyLlama, tiny_gpt2: Path, family: str
) -> None:
    model = tiny.load(tiny_llama.fp32 if family == "llama" else tiny_gpt2).eval()
    with torch.inference_mode():
        stack = Stack.find(model, frozenset(linears(model)), WINDOWS)
        found = Layer(stack, 1).added_to(stack.first_inputs(model, WINDOWS)[0])
    expected = {
        "llama": {
            "model.layers.1.self_attn.o_proj": HIDDEN_STATES,
            "model.layers.1.mlp.down_proj": "model.layers.1.post_attention_layernorm",
        },
        "gpt2": {
            "transformer.h.1.attn.c_proj": HIDDEN_STATES,
            "transformer.h.1.mlp.c_proj": "transformer.h.1.ln_2",
        },
    }
    assert found == expected[family]


def test_few_tokens_are_damped_more() -> None:
    gram = np.eye(64, dtype=np.float32)
    assert LayerInputs(("m",), gram, 1280).damp == pytest.approx(0.1)
    assert LayerInputs(("m",), gram, 10**6).damp == 0.01
