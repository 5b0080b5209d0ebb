"""compressed-tensors beyond the golden cases: groups without weights, zero points as they come, KV caches.

The values are the golden ones, which compressed-tensors itself gave.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import exported, tiny
from tests.conftest import Cli
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, FormatError
from vera_edge.exporting import target
from vera_edge.formats import ct_schemes

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "compressed_tensors"
MODULE = "model.layers.0.mlp.up_proj"
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
Config = dict[str, Any]


def changed(
    source: Path,
    folder: Path,
    config: Callable[[Config], None] = lambda config: None,
    tensors: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    config(facts["quantization_config"])
    path.write_text(json.dumps(facts))
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


def same_values(folder: Path) -> Checkpoint:
    checkpoint, expected = Checkpoint.open(folder), load_file(folder / "expected.safetensors")
    for module, values in expected.items():
        np.testing.assert_array_equal(checkpoint.dequantize(module), values.astype(np.float32))
    assert expected
    return checkpoint


ATTENTION = {"targets": ["LlamaAttention"], "weights": None, "input_activations": TOKENS}


@pytest.mark.parametrize("case", ["w4a16", "w4a16-asym", "w8a8", "fp8-dynamic"])
def test_a_group_without_weights_is_left_out_with_a_note(case: str, tmp_path: Path) -> None:
    def more(config: Config) -> None:
        config["config_groups"] = {"attention": ATTENTION, **config["config_groups"]}
        config["config_groups"]["nothing"] = {"targets": ["re:.*norm"], "weights": None}

    checkpoint = same_values(changed(GOLDEN / case, tmp_path / "base", more))
    assert checkpoint.notes == (
        "config group attention rounds what LlamaAttention computes while the base runs, and no weights; "
        "that isn't reproduced",
    )
    assert Checkpoint.open(GOLDEN / case).notes == ()


def test_siblings_of_the_schemes(tmp_path: Path) -> None:
    def more(config: Config) -> None:
        config["kv_cache_scheme"] = TOKENS
        config["ignore"] = ["lm_head", "re:.*gate.*", "re:(unclosed"]
        config["sparsity_config"] = {"format": "dense", "ignore": [], "targets": []}

    checkpoint = same_values(changed(GOLDEN / "w4a16", tmp_path / "base", more))
    assert checkpoint.notes == (
        "the base rounds its KV cache while it runs (kv_cache_scheme); that isn't reproduced",
    )
    for name, nothing in (("empty", {}), ("null", None)):
        folder = changed(GOLDEN / "w4a16", tmp_path / name)
        told = json.loads((folder / "config.json").read_text())
        told["quantization_config"]["sparsity_config"] = nothing
        (folder / "config.json").write_text(json.dumps(told))
        same_values(folder)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"weights": None}, "config group group_0 of compressed-tensors has no targets"),
        ({"targets": "Linear", "weights": None}, "config group group_0 of compressed-tensors has no targets"),
        ({"targets": ["Linear"], "weights": "int4"}, "gives 'int4' as its weights"),
        (5, "config group group_0 of compressed-tensors has no targets"),
    ],
)
def test_what_is_no_group_is_refused(group: Any, message: str, tmp_path: Path) -> None:
    folder = changed(
        GOLDEN / "w4a16", tmp_path / "base", lambda c: c.update(config_groups={"group_0": group})
    )
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)


def test_quantized_weights_that_no_group_is_about_are_refused(tmp_path: Path) -> None:
    folder = changed(GOLDEN / "w4a16", tmp_path / "base", lambda c: c.update(config_groups={"a": ATTENTION}))
    with pytest.raises(
        CheckpointError, match=r"stored quantized, but no config group of config\.json names it"
    ):
        Checkpoint.open(folder)


def widened(dtype: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("weight_zero_point")]:
            tensors[name] = tensors[name].astype(dtype)

    return change


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_zero_points_of_any_integer_dtype(dtype: str, tmp_path: Path) -> None:
    same_values(changed(GOLDEN / "w8a8-asym", tmp_path / "base", tensors=widened(dtype)))


@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_zero_points_of_packed_weights_may_be_unpacked(dtype: str, tmp_path: Path) -> None:
    def unpack(tensors: dict[str, Any]) -> None:
        """By hand: eight codes a word along the outputs, lowest first, offset by 8."""
        for name in [name for name in tensors if name.endswith("weight_zero_point")]:
            words = tensors[name].view(np.uint32)
            out, groups = tensors[name.replace("zero_point", "scale")].shape
            codes = [words[row // 8] >> np.uint32(4 * (row % 8)) & np.uint32(15) for row in range(out)]
            tensors[name] = (np.array(codes).reshape(out, groups).astype(np.int64) - 8).astype(dtype)

    same_values(changed(GOLDEN / "w4a16-asym", tmp_path / "base", tensors=unpack))


@pytest.mark.parametrize(
    ("case", "value", "message"),
    [
        ("w8a8-asym", 200, r"holds .* to 200, and 8 bits reach from -128 to 127"),
        ("w8a8-asym", -129, r"holds -129 to .*, and 8 bits reach from -128 to 127"),
    ],
)
def test_zero_points_out_of_range_are_refused(case: str, value: int, message: str, tmp_path: Path) -> None:
    def poke(tensors: dict[str, Any]) -> None:
        widened("int32")(tensors)
        next(part for name, part in tensors.items() if name.endswith("zero_point")).flat[0] = value

    folder = changed(GOLDEN / case, tmp_path / "base", tensors=poke)
    with pytest.raises(CheckpointError, match=message):
        for module in Checkpoint.open(folder).linears:
            Checkpoint.open(folder).dequantize(module)


def test_floats_arent_zero_points(tmp_path: Path) -> None:
    folder = changed(GOLDEN / "w8a8-asym", tmp_path / "base", tensors=widened("float32"))
    with pytest.raises(CheckpointError, match="dtype F32 where I16 or I32 or I64 or I8 or U8 belongs"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("case", ["w8a8", "w4a16"])
@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_a_symmetric_scheme_may_store_zeros(case: str, dtype: str, tmp_path: Path) -> None:
    """As older versions wrote it. They go when the weight does, and mean nothing."""

    def add(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name.replace("scale", "zero_point")] = np.zeros(tensors[name].shape, dtype)

    checkpoint = same_values(changed(GOLDEN / case, tmp_path / "base", tensors=add))
    assert not [name for name in checkpoint.other_names if name.endswith("zero_point")]

    def spoil(tensors: dict[str, Any]) -> None:
        add(tensors)
        next(part for name, part in tensors.items() if name.endswith("zero_point")).flat[0] = 1

    with pytest.raises(CheckpointError, match=r"zero points other than 0, and config\.json says symmetric"):
        same_values(changed(GOLDEN / case, tmp_path / "spoilt", tensors=spoil))


def test_a_base_whose_kv_cache_alone_is_rounded(tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli) -> None:
    """Its weights are floats: it merges and exports as they do, and a note tells what isn't done."""
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter", save_projection=True)
    ids = exported.tokens(20)
    expected = exported.peft_logits(tiny_llama.fp32, adapter, ids)
    for number, groups in enumerate(({}, {"group_0": ATTENTION})):
        base = shutil.copytree(tiny_llama.fp32, tmp_path / f"base{number}")
        config = json.loads((base / "config.json").read_text())
        told = {"quant_method": "compressed-tensors", "config_groups": groups, "kv_cache_scheme": TOKENS}
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
        assert not Checkpoint.open(base).quantized
        shown = cli("merge", base, adapter, "-o", tmp_path / f"m{number}", "--json")
        notes = json.loads(shown.stdout)["notes"]
        assert any("kv_cache_scheme" in note for note in notes)
        assert any("LlamaAttention" in note for note in notes) is bool(groups)
        merge.to_folder(base, [(adapter, 1.0)], tmp_path / f"f{number}", "fp32")
        assert "quantization_config" not in (tmp_path / f"f{number}" / "config.json").read_text()
        out = tmp_path / f"out{number}"
        target.export(base, [(adapter, 1.0)], out, mode="merged", weights="fp32")
        assert exported.error(exported.logits(out, ids), expected) < 1e-4


@pytest.mark.parametrize("pattern", ["re:(a+)+\\1", "re:(", "re:" + "a" * 1000, "re:a{9999}"])
def test_a_pattern_that_no_name_needs_is_refused(pattern: str) -> None:
    groups = {"a": {"targets": [pattern], "weights": {"num_bits": 8}, "format": "int-quantized"}}
    found = ct_schemes.read({"config_groups": groups})
    with pytest.raises(FormatError, match="which is no pattern that vera-edge takes"):
        ct_schemes.scheme_of("model.layers.0", found)


def test_a_pattern_that_goes_back_over_a_name_takes_no_time() -> None:
    groups = {
        "a": {"targets": ["re:(a+)+$", "Linear"], "weights": {"num_bits": 8}, "format": "int-quantized"}
    }
    found = ct_schemes.read({"config_groups": groups})
    assert ct_schemes.scheme_of("a" * 60 + "!", found).bits == 8
    assert found[0].rank("a" * 60) == 2
    many = {"a": groups["a"] | {"targets": ["re:a"] * 300}}
    with pytest.raises(FormatError, match="over 256 patterns"):
        ct_schemes.read({"config_groups": many})
