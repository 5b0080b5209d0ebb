"""Adapters saved from a compiled, wrapped or sharded model are read as what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import exported, tiny
from tests.conftest import Cli
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.reading import read
from vera_edge.adapters.vera import vectors_of
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import AdapterError
from vera_edge.trained import alignment

WEIGHTS = "adapter_model.safetensors"
Rename = Callable[[str], str]


def renamed(source: Path, target: Path, rename: Rename) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / WEIGHTS)
    save_file({rename(name): value for name, value in tensors.items()}, target / WEIGHTS, {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def kept(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that holds its projections and a module that was trained whole."""
    folder = tmp_path_factory.mktemp("kept") / "adapter"
    return tiny.make_adapter(
        tiny_llama.fp32,
        folder,
        targets=("q_proj", "down_proj"),
        save_projection=True,
        modules_to_save=["norm"],
    )


def same(one: Adapter, other: Adapter) -> None:
    assert list(one.vectors) == list(other.vectors) and one.digest == other.digest
    others = vectors_of(other)
    for module, pair in vectors_of(one).items():
        np.testing.assert_array_equal(pair.lambda_b, others[module].lambda_b)
        np.testing.assert_array_equal(pair.lambda_d, others[module].lambda_d)
    assert one.modules_to_save.keys() == other.modules_to_save.keys()
    assert one.saved is not None and other.saved is not None
    np.testing.assert_array_equal(one.saved[0], other.saved[0])


WRAPPED: dict[str, tuple[Rename, str]] = {
    "compiled": (lambda name: f"_orig_mod.{name}", "_orig_mod"),
    "compiled within PEFT": (
        lambda name: name.replace("model.model.", "model._orig_mod.model."),
        "_orig_mod",
    ),
    "data parallel": (lambda name: f"module.{name}", "module"),
    "data parallel, compiled": (lambda name: f"_orig_mod.module.{name}", "_orig_mod, module"),
    "sharded layers": (
        lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        "_fsdp_wrapped_module",
    ),
    "sharded and checkpointed": (
        lambda name: "_fsdp_wrapped_module." + name.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
        "_checkpoint_wrapped_module, _fsdp_wrapped_module",
    ),
    "PEFT's prefix twice": (lambda name: f"base_model.model.{name}", "base_model.model"),
    "the adapter's name": (lambda name: f"{name}.default" if "vera" in name else name, "default"),
    "another adapter's name": (lambda name: f"{name}.my_task" if "vera" in name else name, "my_task"),
    "the name of a module's copy": (
        lambda name: (
            name.replace("norm.weight", "norm.modules_to_save.default.weight")
            if name.endswith("model.norm.weight")
            else name
        ),
        "default",
    ),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_wrappers_names_are_left_out_with_a_note(way: str, kept: Path, tmp_path: Path) -> None:
    rename, told = WRAPPED[way]
    wrapped, plain = read(renamed(kept, tmp_path / "wrapped", rename)), read(kept)
    same(wrapped, plain)
    assert plain.notes == ()
    assert wrapped.notes == (f"its tensors are named after what held the model ({told}), which is left out",)


@pytest.mark.parametrize("way", ["compile", "parallel"])
def test_what_torch_itself_makes_of_the_names(
    way: str, tiny_llama: tiny.TinyLlama, kept: Path, tmp_path: Path
) -> None:
    """A state_dict() by hand, of a live model, holds what all layers share once for each."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny.load(tiny_llama.fp32), kept)
    held: Any = torch.compile(model) if way == "compile" else torch.nn.DataParallel(model)
    state = {
        name: value.clone()
        for name, value in held.state_dict().items()
        if "vera_" in name or ".modules_to_save." in name
    }
    first = "_orig_mod." if way == "compile" else "module."
    assert all(name.startswith(first) for name in state) and any(name.endswith(".default") for name in state)
    assert sum("vera_A" in name for name in state) > 1
    folder = shutil.copytree(kept, tmp_path / "by-hand")
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    same_but_digest = read(folder)
    assert list(same_but_digest.vectors) == list(read(kept).vectors)
    assert same_but_digest.modules_to_save.keys() == read(kept).modules_to_save.keys()


def test_it_merges_and_is_inspected_with_the_note(
    tiny_llama: tiny.TinyLlama, kept: Path, tmp_path: Path, cli: Cli
) -> None:
    wrapped = renamed(kept, tmp_path / "wrapped", lambda name: f"_orig_mod.{name}")
    merged = cli("merge", tiny_llama.fp32, wrapped, "-o", tmp_path / "m", "--to", "fp32", "--json")
    assert merged.exit_code == 0
    assert any("_orig_mod" in note for note in json.loads(merged.stdout)["notes"])
    ids = exported.tokens(20)
    with torch.no_grad():
        found = tiny.load(tmp_path / "m").eval()(torch.from_numpy(ids[None])).logits[0].numpy()
    assert exported.error(found, exported.peft_logits(tiny_llama.fp32, kept, ids)) < 1e-4
    for words in ([], ["--base", str(tiny_llama.fp32)]):
        shown = cli("inspect", wrapped, *words, "--json")
        assert any("_orig_mod" in note for note in json.loads(shown.stdout)["notes"])


@pytest.mark.parametrize("inside", [".layers.module.", "._orig_mod.layers."])
def test_a_bases_own_part_of_such_a_name_is_found(
    inside: str, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    """A base with a part called module, or one that was saved while it was wrapped."""
    base = shutil.copytree(tiny_llama.fp32, tmp_path / "base")
    path = base / "model.safetensors"
    tensors = {name.replace(".layers.", inside): value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    folder = renamed(tiny_adapter, tmp_path / "adapter", lambda name: name.replace(".layers.", inside))
    found = alignment.read(folder, Checkpoint.open(base))
    assert found.vectors.keys() <= Checkpoint.open(base).linears.keys()
    assert all(inside in module for module in found.vectors)


REFUSED: dict[str, tuple[Rename, str]] = {
    "an unknown wrapper": (
        lambda name: f"strange.{name}",
        r"named after a wrapper that isn't known \(strange\)",
    ),
    "an unknown wrapper among known ones": (
        lambda name: f"_orig_mod.strange.{name}",
        r"named after a wrapper that isn't known \(strange\)",
    ),
    "an unknown one on the projections": (
        lambda name: f"strange.{name}" if "vera_A" in name else name,
        "isn't part of a VeRA adapter|isn't known",
    ),
    "two adapters": (
        lambda name: name + (".one" if "layers.0" in name else ".two") if "lambda" in name else name,
        "holds the adapters one and two in one file",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_isnt_known_is_still_refused(way: str, kept: Path, tmp_path: Path) -> None:
    rename, says = REFUSED[way]
    with pytest.raises(AdapterError, match=says):
        read(renamed(kept, tmp_path / "wrapped", rename))


def test_two_names_that_become_one_are_refused(kept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kept, tmp_path / "twice")
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("vera_lambda_b"))
    for again in (f"module.{name}", f"{name}.default", name.removeprefix("base_model.model.")):
        save_file({**tensors, again: tensors[name] * 2}, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(AdapterError, match=r"tensors .* and .* of .* are one without the names of wrap"):
            read(folder)


def test_projections_that_differ_by_layer_are_refused(kept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kept, tmp_path / "differ")
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("vera_lambda_b")).replace("lambda_b", "A")
    other = tensors["base_model.vera_A"] * 2
    save_file({**tensors, name: other}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match="differs from another vera_A there; all layers share one"):
        read(folder)
