"""The shard writer against safetensors' and transformers' own reading."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from vera_edge.storage.shards import Shards, ShardWriter, assign
from vera_edge.storage.tensors import RawTensor, TensorFolder


def tensors(seed: int = 0) -> dict[str, RawTensor]:
    """Odd sizes and mixed widths: every later tensor would be out of line if widths weren't sorted."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, npt.NDArray[Any]] = {
        "a.bytes": rng.integers(0, 255, 7).astype(np.uint8),
        "b.floats": rng.standard_normal((3, 5)).astype(np.float32),
        "c.halves": rng.standard_normal((2, 3)).astype(np.float16),
        "d.scalar": np.array(4, np.uint8),
        "e.empty": np.zeros((0, 4), np.float32),
        "f.longs": np.arange(5),
        "g.floats": rng.standard_normal(11).astype(np.float32),
    }
    return {name: RawTensor.of(array) for name, array in arrays.items()}


def layout(found: dict[str, RawTensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}


def write(folder: Path, found: dict[str, RawTensor], limit: int, order: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    with ShardWriter(Shards(folder, layout(found), limit)) as writer:
        for name in order:
            writer.write(name, found[name])


@pytest.mark.parametrize("limit", [1 << 30, 60])
def test_safetensors_reads_what_is_written(tmp_path: Path, limit: int) -> None:
    found = tensors()
    write(tmp_path, found, limit, list(found))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) is (limit == 60)
    read = {name: value for file in files for name, value in load_file(file).items()}
    assert read.keys() == found.keys()
    for name, value in read.items():
        assert value.dtype == found[name].array().dtype
        assert np.array_equal(value, found[name].array())
    for file in files:
        with safe_open(file, "numpy") as stream:
            assert stream.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    found = tensors()
    write(tmp_path, found, 1 << 30, list(found))
    for info in TensorFolder.open(tmp_path).values():
        assert info.start % found[info.name].array().dtype.itemsize == 0


def test_the_index_names_every_tensor(tmp_path: Path) -> None:
    found = tensors()
    write(tmp_path, found, 60, list(found))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.data.nbytes for tensor in found.values())
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}
    assert TensorFolder.open(tmp_path).keys() == found.keys()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), limit=st.sampled_from([1 << 30, 60, 1]))
def test_the_order_of_writing_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, limit: int
) -> None:
    found, folder = tensors(seed % 7), tmp_path_factory.mktemp("shards")
    order = list(found)
    random.Random(seed).shuffle(order)
    write(folder / "in-order", found, limit, list(found))
    write(folder / "shuffled", found, limit, order)
    for path in (folder / "in-order").iterdir():
        assert path.read_bytes() == (folder / "shuffled" / path.name).read_bytes()


def test_shards_fill_up_to_the_limit() -> None:
    entries = {f"t{number}": ("F32", (10,)) for number in range(5)}
    places = assign(entries, 80)
    assert [places[f"t{number}"][6:11] for number in range(5)] == [
        "00001",
        "00001",
        "00002",
        "00002",
        "00003",
    ]


class TestMisuse:
    """Mistakes of a caller are bugs: they raise, and never make a file that looks finished."""

    def test_another_shape_than_announced(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ValueError, match="announced once"),
            ShardWriter(Shards(tmp_path, {"x": ("F32", (2,))})) as writer,
        ):
            writer.write("x", RawTensor.of(np.zeros(3, np.float32)))

    def test_written_twice(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ValueError, match="announced once"),
            ShardWriter(Shards(tmp_path, {"x": ("F32", (2,))})) as writer,
        ):
            writer.write("x", RawTensor.of(np.zeros(2, np.float32)))
            writer.write("x", RawTensor.of(np.zeros(2, np.float32)))

    def test_never_written(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ValueError, match="never written: x"),
            ShardWriter(Shards(tmp_path, {"x": ("F32", (2,))})),
        ):
            pass
        assert not (tmp_path / "model.safetensors.index.json").exists()
