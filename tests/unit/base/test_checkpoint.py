"""Checkpoints of every format made by transformers and bitsandbytes, and damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import Cli
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, FormatError

DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "nf4", "fp4", "int8"])
def test_opens_what_transformers_saves(tiny_llama: tiny.TinyLlama, name: str) -> None:
    checkpoint = Checkpoint.open(getattr(tiny_llama, name))
    assert len(checkpoint.linears) == 14
    assert {linear.format for linear in checkpoint.linears.values()} == {name}
    assert checkpoint.linears[DOWN].shape == (64, 160)
    assert checkpoint.quantized is (name in ("nf4", "fp4", "int8"))
    norms = [
        f"model.layers.{layer}.{norm}_layernorm.weight"
        for layer in (0, 1)
        for norm in ("input", "post_attention")
    ]
    assert sorted(checkpoint.other_names) == sorted(
        ["model.embed_tokens.weight", "model.norm.weight", *norms]
    )


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_dequantizes_as_a_freshly_loaded_model(tiny_llama: tiny.TinyLlama, name: str) -> None:
    """Loaded and never run: bitsandbytes repacks a weight at its first forward."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    folder = getattr(tiny_llama, name)
    checkpoint, model = Checkpoint.open(folder), tiny.load(folder)
    for module in checkpoint.linears:
        layer = model.get_submodule(module)
        if name != "int8" and layer.in_features % 64:
            continue  # where bitsandbytes' CPU kernel is wrong: see test_formats_bnb4.truth
        truth = dequantize_bnb_weight(layer.weight, layer.state if name == "int8" else None)
        assert np.array_equal(checkpoint.dequantize(module), truth.float().numpy()), module


def test_dense_values(tiny_llama: tiny.TinyLlama) -> None:
    state = load_file(tiny_llama.bf16 / "model.safetensors")
    checkpoint = Checkpoint.open(tiny_llama.bf16)
    assert np.array_equal(checkpoint.dequantize(DOWN), state[f"{DOWN}.weight"].float().numpy())
    norm = "model.norm.weight"
    assert np.array_equal(checkpoint.float32(norm), state[norm].float().numpy())


def test_shards_change_nothing(tiny_llama: tiny.TinyLlama) -> None:
    single, sharded = Checkpoint.open(tiny_llama.fp32), Checkpoint.open(tiny_llama.sharded)
    assert len(sharded.tensors.files) > 1
    assert sharded.digest == single.digest
    assert sharded.layout_digest == single.layout_digest
    assert np.array_equal(sharded.dequantize(DOWN), single.dequantize(DOWN))


def test_digest_sees_one_changed_byte(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama.nf4, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before, after = Checkpoint.open(tiny_llama.nf4), Checkpoint.open(tmp_path / "copy")
    assert after.digest != before.digest
    assert after.layout_digest == before.layout_digest


def test_conv1d_of_a_dense_and_a_quantized_gpt2(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = tiny.load(tiny_gpt2)
    quantized = tiny.quantize(tiny_gpt2, tmp_path / "nf4", **tiny.four_bit("nf4"))
    dense, packed = Checkpoint.open(tiny_gpt2), Checkpoint.open(quantized)
    module = "transformer.h.0.mlp.c_fc"
    assert dense.linears[module].transposed
    assert not packed.linears[module].transposed
    assert dense.linears[module].shape == packed.linears[module].shape == (160, 64)
    assert dense.is_conv1d(module)
    assert packed.is_conv1d(module)
    truth = model.get_submodule(module).weight.detach().numpy().T
    assert np.array_equal(dense.dequantize(module), truth)
    assert np.abs(packed.dequantize(module) - truth).max() < 0.2 * np.abs(truth).max()


def test_the_hub_cache_layout_opens(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """huggingface_hub keeps a model as links from snapshots/<revision>/ into blobs/."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_llama.sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert Checkpoint.open(snapshot).digest == Checkpoint.open(tiny_llama.sharded).digest


class TestRefused:
    """Every damaged folder gives one sentence that names the file or tensor."""

    @pytest.fixture
    def copy(self, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_llama.nf4, tmp_path / "copy"))

    @pytest.fixture
    def shards(self, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_llama.sharded, tmp_path / "shards"))

    def edit(self, path: Path, **changes: Any) -> None:
        facts = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(facts))

    def test_not_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="isn't a folder"):
            Checkpoint.open(tmp_path / "nothing")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "a.pt", "a.pth", "a.pkl", "a.ckpt", "A.CKPT", "a.pickle"]
    )
    def test_a_pickle(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match="as a pickle"):
            Checkpoint.open(tmp_path)

    def test_no_config(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json is missing"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
    def test_a_config_that_is_no_object(self, copy: Path, text: str) -> None:
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
    def test_a_truncated_file(self, copy: Path, keep: int) -> None:
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(copy)

    def test_a_header_that_lies_about_sizes(self, copy: Path) -> None:
        file = copy / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["model.norm.weight"]["shape"] = [1 << 40]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
            Checkpoint.open(copy)

    def test_another_quantization_than_the_config_says(self, copy: Path) -> None:
        quantization = json.loads((copy / "config.json").read_text())["quantization_config"]
        changed = quantization | {"load_in_4bit": False, "load_in_8bit": True}
        self.edit(copy / "config.json", quantization_config=changed)
        with pytest.raises(CheckpointError, match="stored as nf4, which the quantization_config"):
            Checkpoint.open(copy)

    def test_quantized_tensors_without_a_config_for_them(self, copy: Path) -> None:
        self.edit(copy / "config.json", quantization_config=None)
        with pytest.raises(CheckpointError, match="no quantization_config"):
            Checkpoint.open(copy)

    def test_a_quantization_config_without_quantized_tensors(
        self, tiny_llama: tiny.TinyLlama, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(tiny_llama.fp32, tmp_path / "copy")
        self.edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        with pytest.raises(FormatError, match="quantized with bitsandbytes, but no layer"):
            Checkpoint.open(folder)

    def test_a_quantization_config_that_is_no_object(self, copy: Path) -> None:
        self.edit(copy / "config.json", quantization_config="nf4")
        with pytest.raises(CheckpointError, match="where an object belongs"):
            Checkpoint.open(copy)

    def test_nan_scales_are_found_when_read(self, tmp_path: Path, tiny_llama: tiny.TinyLlama) -> None:
        folder = shutil.copytree(tiny_llama.fp4, tmp_path / "copy")
        state = load_file(folder / "model.safetensors")
        state[f"{DOWN}.weight.absmax"][3] = float("nan")
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"down_proj\.weight\.absmax .* NaN"):
            Checkpoint.open(folder).dequantize(DOWN)

    def test_a_missing_shard(self, shards: Path) -> None:
        next(shards.glob("model-00001*")).unlink()
        with pytest.raises(CheckpointError, match=r"model-00001.* is missing"):
            Checkpoint.open(shards)

    @pytest.mark.parametrize("name", ["../away.safetensors", "/etc/passwd", "a\\..\\b", "c:x", ""])
    def test_an_index_that_names_files_outside(self, shards: Path, name: str) -> None:
        index = shards / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map[DOWN + ".weight"] = name
        self.edit(index, weight_map=weight_map)
        with pytest.raises(CheckpointError, match="unsafe path"):
            Checkpoint.open(shards)

    def test_a_shard_that_is_a_link_out(self, shards: Path, tmp_path: Path) -> None:
        shard = next(shards.glob("model-00001*"))
        shard.rename(tmp_path / "elsewhere.safetensors")
        shard.symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(CheckpointError, match="leads out of"):
            Checkpoint.open(shards)

    def test_overlapping_shards(self, shards: Path) -> None:
        first, second = sorted(shards.glob("model-0000[12]*"))
        save_file(load_file(second) | load_file(first), second)
        with pytest.raises(CheckpointError, match="is in both"):
            Checkpoint.open(shards)

    def test_a_module_that_is_not_there(self, copy: Path) -> None:
        checkpoint = Checkpoint.open(copy)
        with pytest.raises(CheckpointError, match=r"no linear layer called model\.nowhere"):
            checkpoint.dequantize("model.nowhere")
        with pytest.raises(CheckpointError, match="no tensor called x"):
            checkpoint.float32("x")


def test_nothing_is_read_before_it_is_asked_for(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """Opening and planning must work on headers: here the values are holes in a sparse file."""
    state = load_file(tiny_llama.fp32 / "model.safetensors")
    shutil.copy(tiny_llama.fp32 / "config.json", tmp_path / "config.json")
    save_file(state, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(data[:length])
        stream.truncate(len(data))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.linears) == 14
    assert not checkpoint.dequantize(DOWN).any()
    assert torch.is_tensor(state[f"{DOWN}.weight"])


class TestAnIndex:
    """What an index says of files that it isn't for, against what transformers loads."""

    INDEX = "model.safetensors.index.json"

    @pytest.fixture
    def folder(self, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> Path:
        return shutil.copytree(tiny_llama.fp32, tmp_path / "single")

    @pytest.fixture
    def shards(self, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> Path:
        return shutil.copytree(tiny_llama.sharded, tmp_path / "shards")

    def test_a_single_file_wins_over_absent_shards(self, folder: Path) -> None:
        weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
        (folder / self.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.tensors.notes == (
            f"{self.INDEX} beside model.safetensors is left from other weights and isn't read; delete it",
        )
        expected = tiny.load(folder).get_submodule(DOWN).weight.detach().numpy()
        assert np.array_equal(checkpoint.dequantize(DOWN), expected)

    def test_a_single_file_wins_over_shards_with_other_weights(
        self, folder: Path, tiny_llama: tiny.TinyLlama
    ) -> None:
        for path in tiny_llama.sharded.glob("model*"):
            shutil.copy(path, folder)
        state = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        checkpoint = Checkpoint.open(folder)
        expected = tiny.load(folder).get_submodule(DOWN).weight.detach().numpy()
        assert np.array_equal(checkpoint.dequantize(DOWN), expected) and len(checkpoint.tensors.notes) == 1
        assert not np.array_equal(Checkpoint.open(tiny_llama.sharded).dequantize(DOWN), expected)

    @pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 5}'])
    def test_a_broken_index_beside_a_single_file_doesnt_matter(self, folder: Path, text: str) -> None:
        (folder / self.INDEX).write_text(text)
        assert len(Checkpoint.open(folder).tensors.notes) == 1

    def test_an_index_of_that_very_file_needs_no_note(self, folder: Path) -> None:
        weight_map = dict.fromkeys(Checkpoint.open(folder).tensors, "model.safetensors")
        (folder / self.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert Checkpoint.open(folder).tensors.notes == ()

    def test_a_tensor_that_the_index_doesnt_list_is_read(self, shards: Path) -> None:
        index = json.loads((shards / self.INDEX).read_text())
        place = index["weight_map"].pop(f"{DOWN}.weight")
        other = next(name for name in sorted(index["weight_map"].values()) if name != place)
        moved = next(name for name, file in index["weight_map"].items() if file == place)
        index["weight_map"][moved] = other
        (shards / self.INDEX).write_text(json.dumps(index))
        checkpoint = Checkpoint.open(shards)
        assert len(checkpoint.tensors.notes) == 1 and f"{DOWN}.weight" in checkpoint.tensors.notes[0]
        model = tiny.load(shards)
        expected = model.get_submodule(DOWN).weight.detach().numpy()
        assert np.array_equal(checkpoint.dequantize(DOWN), expected)
        assert np.array_equal(checkpoint.float32(moved), model.state_dict()[moved].numpy())

    def test_a_tensor_that_is_in_no_shard_is_refused(self, shards: Path) -> None:
        index = json.loads((shards / self.INDEX).read_text())
        index["weight_map"]["model.more.weight"] = index["weight_map"][f"{DOWN}.weight"]
        (shards / self.INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"says tensor model\.more\.weight is in .*, and it isn't"):
            Checkpoint.open(shards)

    def test_an_absent_shard_names_the_index(self, shards: Path) -> None:
        next(shards.glob("model-00001*")).unlink()
        with pytest.raises(CheckpointError, match=f"is missing, and {self.INDEX} names it"):
            Checkpoint.open(shards)

    def test_a_config_may_name_the_file(self, folder: Path, tiny_adapter: Path, tmp_path: Path) -> None:
        """As transformers reads it; what is beside it under the common name is another model's."""
        state = load_file(folder / "model.safetensors")
        save_file({name: tensor * 2 for name, tensor in state.items()}, folder / "other.safetensors")
        config = json.loads((folder / "config.json").read_text())
        named = {"transformers_weights": "other.safetensors"}
        (folder / "config.json").write_text(json.dumps(config | named))
        expected = tiny.load(folder).get_submodule(DOWN).weight.detach()
        assert torch.equal(expected, state[f"{DOWN}.weight"] * 2)
        assert np.array_equal(Checkpoint.open(folder).dequantize(DOWN), expected.numpy())
        merge.to_folder(folder, [(tiny_adapter, 0.0)], tmp_path / "m", "fp32", projection_rounding="fp32")
        assert torch.equal(tiny.load(tmp_path / "m").get_submodule(DOWN).weight.detach(), expected)
        for wrong in ("../other.safetensors", "other.bin", 5):
            (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": wrong}))
            with pytest.raises(CheckpointError, match=r"unsafe path|where a safetensors file belongs"):
                Checkpoint.open(folder)

    def test_the_note_is_told(self, folder: Path, tiny_adapter: Path, tmp_path: Path, cli: Cli) -> None:
        (folder / self.INDEX).write_text("{}")
        shown = cli(
            "merge", folder, tiny_adapter, "-o", tmp_path / "m", "--projection-rounding", "fp32", "--json"
        )
        assert any("isn't read; delete it" in note for note in json.loads(shown.stdout)["notes"])
        assert not (tmp_path / "m" / self.INDEX).exists()
        adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
        (adapter / "adapter_model.safetensors.index.json").write_text("{}")
        shown = cli("inspect", adapter, "--json")
        assert any(
            "adapter_model.safetensors.index.json beside" in n for n in json.loads(shown.stdout)["notes"]
        )
