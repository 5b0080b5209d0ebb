"""Whether an adapter and a base belong together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.folder import named_whole
from vera_edge.adapters.reading import read
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError
from vera_edge.storage.tensors import RawTensor
from vera_edge.trained.fit import check_fit

GOLDEN = Path(__file__).parents[2] / "golden" / "adapters" / "peft-0.21.2"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def checkpoint(tiny_llama: tiny.TinyLlama) -> Checkpoint:
    return Checkpoint.open(tiny_llama.fp32)


def golden(name: str = "unsaved-fp32", **changes: Any) -> Adapter:
    return dataclasses.replace(read(GOLDEN / name), **changes)


def test_an_adapter_fits_its_base(checkpoint: Checkpoint) -> None:
    for name in ("unsaved-fp32", "saved-fp32", "modules-to-save", "one-layer"):
        assert check_fit(golden(name), checkpoint) == ()


def test_names_the_module_that_is_missing(checkpoint: Checkpoint) -> None:
    vectors = {"model.layers.7.mlp.down_proj": golden().vectors[DOWN]}
    message = r"adapts model\.layers\.7\.mlp\.down_proj, which isn't there in .*; give the base .* \(fp32\)"
    with pytest.raises(MismatchError, match=message):
        check_fit(golden(vectors=vectors), checkpoint)


def test_names_a_module_that_is_no_linear(checkpoint: Checkpoint) -> None:
    vectors = {"model.norm": golden().vectors[DOWN]}
    with pytest.raises(MismatchError, match=r"model\.norm, which isn't a linear layer there"):
        check_fit(golden(vectors=vectors), checkpoint)


def test_says_when_an_adapted_head_is_the_embeddings(checkpoint: Checkpoint) -> None:
    vectors = {"lm_head": golden().vectors[DOWN]}
    with pytest.raises(MismatchError, match=r"lm_head, which .* stores as its embeddings"):
        check_fit(golden(vectors=vectors), checkpoint)


@pytest.mark.parametrize("outputs", [63, 65])
def test_names_both_shapes(checkpoint: Checkpoint, outputs: int) -> None:
    vectors = {DOWN: LambdaVectors(np.ones(outputs, np.float32), np.ones(4, np.float32))}
    with pytest.raises(
        MismatchError, match=rf"down_proj with {outputs} outputs, and .* one of shape 64 x 160"
    ):
        check_fit(golden(vectors=vectors), checkpoint)


def test_refuses_an_adapter_without_what_it_says_it_trained_whole(checkpoint: Checkpoint) -> None:
    for named, fits in ((["norm"], False), (["score"], True), (["lm_head"], True), (None, True)):
        config = {**golden().config, "modules_to_save": named}
        if fits:
            check_fit(golden(config=config), checkpoint)
            continue
        with pytest.raises(MismatchError, match=r"trained norm whole \(modules_to_save\) and doesn't hold"):
            check_fit(golden(config=config), checkpoint)
    whole = golden("modules-to-save")
    assert named_whole(whole.config) == ("norm",)
    check_fit(whole, checkpoint)


def test_refuses_projections_too_narrow_for_a_layer(checkpoint: Checkpoint) -> None:
    adapter = golden("saved-fp32")
    assert adapter.saved is not None
    a, b = adapter.saved
    narrow = dataclasses.replace(adapter, saved=(a[:, :159], b))
    with pytest.raises(MismatchError, match=r"down_proj of .* has 160 inputs, and .* for at most 159"):
        check_fit(narrow, checkpoint)


def test_refuses_biases_and_modules_of_another_shape(checkpoint: Checkpoint) -> None:
    with pytest.raises(MismatchError, match=r"replaces .*down_proj\.bias .* \[64\], and .* doesn't have it"):
        check_fit(golden(biases={DOWN: np.ones(64, np.float32)}), checkpoint)
    norm = {"model.norm.weight": RawTensor.of(np.ones(65, np.float32))}
    with pytest.raises(MismatchError, match=r"shape \[65\], and .* has one of shape \[64\]"):
        check_fit(golden(modules_to_save=norm), checkpoint)


def test_notes_modules_the_base_does_not_have(checkpoint: Checkpoint) -> None:
    head = {"score.weight": RawTensor.of(np.ones((3, 64), np.float32))}
    notes = check_fit(golden(modules_to_save=head), checkpoint)
    assert notes == ("the adapter brings 1 tensors of its own that the base doesn't have: score.weight",)


@pytest.mark.parametrize(
    ("base_name", "noted"),
    [
        (None, False),
        ("fp32", False),
        ("/elsewhere/FP32/", False),
        ("somebody/fp32", False),
        ("C:\\models\\fp32", False),
        ("somebody/another-model", True),
    ],
)
def test_notes_a_base_of_another_name(checkpoint: Checkpoint, base_name: str | None, noted: bool) -> None:
    notes = check_fit(golden(base_name=base_name), checkpoint)
    assert bool(notes) == noted
    if noted:
        assert "trained on somebody/another-model, and the base given is fp32; every shape fits" in notes[0]


def test_accepts_the_name_in_the_bases_config(checkpoint: Checkpoint) -> None:
    config = {**checkpoint.config, "_name_or_path": "somebody/original"}
    renamed = dataclasses.replace(checkpoint, config=config)
    assert check_fit(golden(base_name="other/original"), renamed) == ()


def test_refuses_a_base_of_another_family_though_shapes_fit(checkpoint: Checkpoint) -> None:
    other = dataclasses.replace(
        checkpoint,
        config={**checkpoint.config, "model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    )
    with pytest.raises(MismatchError, match=r"trained on a LlamaForCausalLM .* the base is a mistral model"):
        check_fit(golden(), other)


@pytest.mark.parametrize(
    ("mapping", "model_type"),
    [
        (None, "mistral"),
        ({"base_model_class": "X", "parent_library": "some.remote.code"}, "mistral"),
        ({"base_model_class": "X", "parent_library": "transformers.models.xlm_roberta.y"}, "xlm-roberta"),
        ({"base_model_class": "X", "parent_library": "transformers.models.gemma3.y"}, "gemma3_text"),
        ({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.a.b"}, "z"),
        ({"base_model_class": 3, "parent_library": None}, "mistral"),
    ],
)
def test_accepts_a_class_it_cannot_tell_apart(
    checkpoint: Checkpoint, mapping: dict[str, Any] | None, model_type: str
) -> None:
    other = dataclasses.replace(checkpoint, config={**checkpoint.config, "model_type": model_type})
    assert check_fit(golden(config={**golden().config, "auto_mapping": mapping}), other) == ()
