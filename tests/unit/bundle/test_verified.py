"""Verification before a start: what wasn't read is counted and told, and damage is found all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vera_edge
from tests.unit.bundle.test_contents import make
from vera_edge.bundle import contents, verified
from vera_edge.errors import BundleError, PlanError
from vera_edge.storage import digest_notes

WEIGHTS, LARGE = "onnx/model.onnx_data", 1 << 20
pytestmark = pytest.mark.skipif(os.name != "posix", reason="nothing is remembered on Windows")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test, in which what was written a moment ago counts as written long ago."""
    monkeypatch.setenv("VERA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_notes, "SETTLED", -1_000_000_000)
    return tmp_path / "cache" / "digests"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make(tmp_path / "bundle")
    (made.folder / WEIGHTS).write_bytes(os.urandom(LARGE))
    contents.write(made.folder, contents.change(made))
    return made.folder


def test_the_second_start_says_what_it_did_not_read(folder: Path, store: Path) -> None:
    manifest, first = verified.verify(folder)
    assert (first.remembered, first.told, len(list(store.iterdir()))) == (0, None, 1)
    again, second = verified.verify(folder)
    assert again == manifest
    assert (second.files, second.remembered, second.remembered_size) == (4, 1, LARGE)
    assert second.size == manifest.size and "1 of 4 files (1.0 MB)" in (second.told or "")
    assert verified.verify(folder, reread=True)[1].remembered == 0
    with pytest.raises(PlanError, match="contradict"):
        verified.verify(folder, deep=False, reread=True)


@pytest.mark.usefixtures("store")
def test_damage_is_found_though_the_file_was_remembered(folder: Path) -> None:
    verified.verify(folder)
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.write(b"damage")
    with pytest.raises(BundleError, match="is damaged"):
        verified.verify(folder)


def test_verify_reads_every_byte_whatever_is_remembered(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that leaves the stamps, as of a disk that decays: `verify` finds it, and then starts do."""
    stamps = digest_notes.identity((folder / WEIGHTS).stat())
    vera_edge.verify(folder)
    assert verified.verify(folder)[1].remembered == 1
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.write(b"damage")
    monkeypatch.setattr(digest_notes, "identity", lambda found: stamps)
    assert verified.verify(folder)[1].remembered == 1, "nothing shows"
    with pytest.raises(BundleError, match="is damaged"):
        vera_edge.verify(folder)
    assert not list(store.iterdir())
    with pytest.raises(BundleError, match="is damaged"):
        verified.verify(folder)


def test_a_place_that_others_may_write_to_is_said(folder: Path, store: Path) -> None:
    verified.verify(folder)
    store.chmod(0o777)
    found = verified.verify(folder)[1]
    assert found.remembered == 0 and found.told is not None and str(store) in found.told
    assert found.to_dict()["trouble"] == found.told
