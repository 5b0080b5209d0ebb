"""A float32 model that is computed as it's read is the one that a merge writes, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from vera_edge import merging as merge
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError
from vera_edge.merging.computed import ComputedTensors, open_computed
from vera_edge.plans import plan as plans
from vera_edge.trained.trained_model import TrainedModel, open_model


def assert_same(model: TrainedModel, folder: Path) -> ComputedTensors:
    """Hold all tensors and the folder's other files against a merge that is written."""
    plan = plans.plan_model(model, "merged", "fp32")
    merge.write(plan, model, folder / "written")
    written, computed = Checkpoint.open(folder / "written"), open_computed(plan, model, folder / "computed")
    tensors = computed.tensors
    assert isinstance(tensors, ComputedTensors)
    assert tensors.keys() == written.tensors.keys() and computed.linears.keys() == written.linears.keys()
    assert {path.name for path in (folder / "computed").iterdir()} == {
        path.name for path in (folder / "written").iterdir()
    } - {"README.md", "model.safetensors", "vera_edge_merge.json"}
    config = "config.json"
    assert (folder / "computed" / config).read_bytes() == (folder / "written" / config).read_bytes()
    for name, info in written.tensors.items():
        one, other = tensors.read(name), written.tensors.read(name)
        assert (one.dtype, one.shape, one.data.tobytes()) == (other.dtype, other.shape, other.data.tobytes())
        assert np.concatenate(list(tensors.pieces(name))).tobytes() == other.data.tobytes()
        module = name.removesuffix(".weight")
        if module in written.linears:
            assert np.array_equal(rows_of(tensors, name), written.dequantize(module))
        elif len(info.shape) == 2:
            assert np.array_equal(rows_of(tensors, name), other.float32())
    return tensors


def rows_of(tensors: ComputedTensors, name: str) -> Float32:
    found = [(start, rows.copy()) for start, rows in tensors.rows(name)]
    assert [start for start, _ in found] == np.cumsum([0, *(len(rows) for _, rows in found[:-1])]).tolist()
    whole: Float32 = np.concatenate([rows for _, rows in found])
    assert whole.shape[1] == tensors.width(name)
    return whole


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8", "sharded"])
def test_a_merged_model(kind: str, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    base = getattr(tiny_llama, kind)
    adapter = tiny.make_adapter(base, tmp_path / "adapter")
    assert_same(open_model(base, [(adapter, 0.5)], "float32"), tmp_path)


def test_a_base_alone(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    model = open_model(tiny_llama.nf4, [(tiny_adapter, 1.0)])
    assert_same(replace(model, adapters=()), tmp_path)


@pytest.mark.parametrize("merged", [True, False])
def test_weights_that_are_stored_the_other_way_round(
    merged: bool, tiny_gpt2: Path, tiny_gpt2_adapter: Path, tmp_path: Path
) -> None:
    model = open_model(tiny_gpt2, [(tiny_gpt2_adapter, 1.0)])
    assert_same(model if merged else replace(model, adapters=()), tmp_path)


def test_a_head_that_was_saved_whole(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter", modules_to_save=["lm_head"])
    assert_same(open_model(tiny_llama.fp32, [(adapter, 1.0)]), tmp_path)


def test_damage_is_found_when_it_is_read(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    shutil.copytree(tiny_llama.fp32, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model = open_model(tmp_path / "base", [(adapter, 1.0)])
    computed = open_computed(plans.plan_model(model, "merged", "fp32"), model, tmp_path / "computed")
    computed.tensors.read("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="up_proj"):
        computed.tensors.read("model.layers.1.mlp.up_proj.weight")
