"""The store of finished work: what is in it stays as it was made, and is shared rather than copied."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from vera_edge.releasing import cache
from vera_edge.releasing.cache import Store
from vera_edge.storage.files import sha256_bytes

DATA = b"weights" * 100


def made(folder: Path) -> Path:
    """A file of a store, made by it."""
    store = Store(folder / "store")

    def make(stage: Path) -> None:
        (stage / "w.bin").write_bytes(DATA)

    entry, anew = store.build({"stage": "test"}, make)
    assert anew
    return entry / "w.bin"


def test_a_bundle_shares_the_file_that_nobody_can_write(tmp_path: Path) -> None:
    source, place = made(tmp_path), tmp_path / "out" / "w.bin"
    assert stat.S_IMODE(source.stat().st_mode) & 0o222 == 0
    assert cache.publish(source, place) == sha256_bytes(DATA)
    assert place.samefile(source)


def test_a_file_that_can_be_written_is_copied(tmp_path: Path) -> None:
    source, place = made(tmp_path), tmp_path / "out" / "w.bin"
    source.chmod(0o644)
    assert cache.publish(source, place) == sha256_bytes(DATA)
    assert not place.samefile(source) and place.read_bytes() == DATA


def test_another_file_system_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, place = made(tmp_path), tmp_path / "out" / "w.bin"

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    assert cache.publish(source, place) == sha256_bytes(DATA)
    assert not place.samefile(source) and place.read_bytes() == DATA


def test_what_is_published_is_what_the_digest_is_of(tmp_path: Path) -> None:
    source = made(tmp_path)
    source.chmod(0o644)
    source.write_bytes(DATA[::-1])
    source.chmod(0o444)
    assert cache.publish(source, tmp_path / "out" / "w.bin") == sha256_bytes(DATA[::-1])


def test_nothing_is_written_into_a_file_that_is_there(tmp_path: Path) -> None:
    """It may be the store's own, under another name."""
    source, place = made(tmp_path), tmp_path / "w.bin"
    cache.publish(source, place)
    with pytest.raises(FileExistsError):
        cache.publish(source, place)
    assert source.read_bytes() == DATA


def test_a_base_that_is_one_file_is_known_by_its_content(tmp_path: Path) -> None:
    """As a model in GGUF is."""
    store, found = Store(tmp_path / "store"), set()
    for number in range(3):
        path = tmp_path / f"{number % 2}.gguf"
        path.write_bytes(bytes([number % 2]) * 100)
        found.add(store.folder_digest(path))
    assert len(found) == 2
