"""Content-defined chunks: they cover a file, their hash is the formula's, and an edit stays local."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vera_edge.bundle import chunks
from vera_edge.errors import BundleError
from vera_edge.storage.json_text import canonical_json


def test_rolling_hash_is_the_sum_in_its_docstring() -> None:
    data = np.random.RandomState(1).randint(0, 256, 300).astype(np.uint8)
    gear = np.random.RandomState(0x5EED).randint(0, 1 << 32, size=256, dtype=np.uint32)
    found = chunks.rolling_hash(data)
    for i in range(len(data)):
        expected = sum(int(gear[data[i - j]]) << j for j in range(min(32, i + 1))) & 0xFFFFFFFF
        assert int(found[i]) == expected


@settings(max_examples=20, deadline=None)
@given(size=st.integers(0, 3_000_000), seed=st.integers(0, 99))
def test_chunks_cover_the_file(tmp_path_factory: pytest.TempPathFactory, size: int, seed: int) -> None:
    data = np.random.RandomState(seed).bytes(size)
    path = tmp_path_factory.mktemp("chunks") / "file"
    path.write_bytes(data)
    found = chunks.split(path)
    assert b"".join(data[c.start : c.start + c.size] for c in found) == data
    assert all(hashlib.sha256(data[c.start : c.start + c.size]).hexdigest() == c.sha256 for c in found)
    assert all(c.size <= chunks.MAXIMUM for c in found)
    assert all(c.size >= chunks.MINIMUM for c in found[:-1])


def test_an_insertion_changes_the_chunks_near_it_only(tmp_path: Path) -> None:
    data = np.random.RandomState(0).bytes(20_000_000)
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(data)
    new.write_bytes(data[:9_000_000] + b"five!" + data[9_000_000:])
    known = {chunk.sha256 for chunk in chunks.split(old)}
    fresh = sum(chunk.size for chunk in chunks.split(new) if chunk.sha256 not in known)
    assert 0 < fresh <= 4 * chunks.MAXIMUM


def test_block_edges_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.random.RandomState(3).bytes(2_000_000))
    whole = chunks.split(path)
    monkeypatch.setattr(chunks, "_BLOCK", 65_537)
    assert chunks.split(path) == whole


def test_index_round_trip(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 300_000)
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / chunks.INDEX).write_bytes(
        chunks.index({name: chunks.split(tmp_path / name) for name in ("b", "a")})
    )
    assert chunks.read_index(tmp_path / chunks.INDEX) == {
        "a": tuple(chunks.split(tmp_path / "a")),
        "b": (),
    }


@pytest.mark.parametrize(
    "files",
    [{"a": 3}, {"a": [[0, "0" * 64]]}, {"a": [[1, "zz"]]}, {"a": [[1 << 40, "0" * 64]]}, {"a": [["1", 2]]}],
)
def test_malformed_index_is_refused(tmp_path: Path, files: object) -> None:
    path = tmp_path / chunks.INDEX
    path.write_bytes(canonical_json({"format": 1, "files": files}))
    with pytest.raises(BundleError, match="malformed"):
        chunks.read_index(path)


def test_newer_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / chunks.INDEX
    path.write_bytes(canonical_json({"format": 2, "files": {}}))
    with pytest.raises(BundleError, match="isn't a chunk index"):
        chunks.read_index(path)
