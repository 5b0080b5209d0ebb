"""Remembered digests: what they vouch for, and everything they must not."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vera_edge.storage import digest_notes
from vera_edge.storage.digest_notes import DigestNotes
from vera_edge.storage.files import sha256_bytes

DATA = os.urandom(1 << 20)
SHA = sha256_bytes(DATA)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="nothing is remembered on Windows")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written a moment ago counts as written long ago."""
    monkeypatch.setattr(digest_notes, "SETTLED", -1_000_000_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx_data"
    path.write_bytes(DATA)
    return path


def looked(file: Path, store: Path, reread: bool = False) -> tuple[bool, int]:
    """Whether the file has the digest, and how many bytes weren't read for it."""
    notes = DigestNotes(store, reread)
    return notes.has(file, SHA), sum(notes.remembered.values())


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once(file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert looked(file, store) == (True, 0)
    assert looked(file, store) == (True, len(DATA))
    assert looked(file, store, reread=True) == (True, 0)
    assert store.stat().st_mode & 0o077 == 0
    assert [path.stat().st_mode & 0o077 for path in store.iterdir()] == [0]


def test_what_was_written_just_now_is_read_again(file: Path, tmp_path: Path) -> None:
    """Within a tick of the clock it could change, and look the same."""
    for _ in range(2):
        assert looked(file, tmp_path / "store") == (True, 0)


@pytest.mark.usefixtures("settled")
def test_a_file_from_the_future_is_read_again(file: Path, tmp_path: Path) -> None:
    later = time.time_ns() + 10**12
    os.utime(file, ns=(later, later))
    for _ in range(2):
        assert looked(file, tmp_path / "store") == (True, 0)


def rewritten(file: Path) -> None:
    """One byte is another, and the modification time that of before."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(bytes([DATA[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [rewritten, replaced])
def test_a_change_is_found_though_its_time_was_set_back(
    change: Callable[[Path], None], file: Path, tmp_path: Path
) -> None:
    looked(file, tmp_path / "store")
    time.sleep(0.02)  # longer than a tick of the file system's clock
    change(file)
    assert looked(file, tmp_path / "store") == (False, 0)


@pytest.mark.usefixtures("settled")
def test_a_note_of_another_digest_says_nothing(file: Path, tmp_path: Path) -> None:
    """A manifest that lists another digest is right or wrong by the file itself."""
    looked(file, tmp_path / "store")
    notes = DigestNotes(tmp_path / "store")
    assert not notes.has(file, "0" * 64) and not notes.remembered
    assert not list((tmp_path / "store").iterdir()), "what was noted of it is gone"


@pytest.mark.usefixtures("settled")
def test_a_note_that_reading_contradicts_goes(file: Path, tmp_path: Path) -> None:
    """A disk that decays leaves the stamps; `verify` reads all the same, and then no start may believe."""
    store = tmp_path / "store"
    looked(file, store)
    (note,) = store.iterdir()
    found = note.read_text()
    note.write_text(found.replace(SHA, "0" * 64))
    assert not DigestNotes(store, reread=True).has(file, "0" * 64)
    assert not DigestNotes(store).has(file, "0" * 64)


@pytest.mark.usefixtures("settled")
def test_a_link_to_the_file_is_the_file(file: Path, tmp_path: Path) -> None:
    """`models/current` leads to the version that runs."""
    looked(file, tmp_path / "store")
    (tmp_path / "current").symlink_to(tmp_path)
    assert looked(tmp_path / "current" / file.name, tmp_path / "store") == (True, len(DATA))


@pytest.mark.usefixtures("settled")
def test_small_files_are_always_read(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(DATA[:-1])
    notes = DigestNotes(tmp_path / "store")
    assert notes.has(small, sha256_bytes(DATA[:-1])) and not (tmp_path / "store").exists()


def writable(store: Path) -> None:
    store.chmod(0o777)


def writable_note(store: Path) -> None:
    next(store.iterdir()).chmod(0o620)


def damaged(store: Path) -> None:
    next(store.iterdir()).write_bytes(b'{"identity": [1, 2')


def a_link(store: Path) -> None:
    store.rename(store.with_name("elsewhere"))
    store.symlink_to(store.with_name("elsewhere"))


def a_file(store: Path) -> None:
    shutil.rmtree(store)
    store.write_bytes(b"")


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("spoil", [writable, writable_note, damaged, a_link, a_file])
def test_a_store_that_others_may_have_written_is_not_believed(
    spoil: Callable[[Path], None], file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    looked(file, store)
    spoil(store)
    notes = DigestNotes(store)
    assert notes.has(file, SHA) and not notes.remembered
    assert notes.trouble is not None and str(store) in notes.trouble and "\n" not in notes.trouble


@pytest.mark.usefixtures("settled")
def test_anothers_store_is_not_believed(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked(file, tmp_path / "store")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    notes = DigestNotes(tmp_path / "store")
    assert notes.has(file, SHA) and not notes.remembered and "another user" in (notes.trouble or "")


@pytest.mark.usefixtures("settled")
def test_there_is_a_bound_on_what_is_remembered(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_notes, "_MOST", 6)
    store = tmp_path / "store"
    names = [file.with_name(f"{number}") for number in range(20)]
    for name in names:
        os.link(file, name)
    for name in names:
        looked(name, store)
        assert len(list(store.iterdir())) <= 6
    assert looked(names[-1], store) == (True, len(DATA))
    assert looked(names[0], store) == (True, 0)


@pytest.mark.usefixtures("settled")
def test_a_place_that_cannot_be_written_costs_only_the_time(file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    notes = DigestNotes(tmp_path / "file" / "store")
    assert notes.has(file, SHA) and not notes.has(file, "0" * 64)
