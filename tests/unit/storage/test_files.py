"""Outputs are whole or not at all, and never at the price of what they're made of."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from vera_edge.errors import CheckpointError, OutputError
from vera_edge.storage import files
from vera_edge.storage.files import check_output, safe_join, staged_folder, sweep, write_atomic
from vera_edge.storage.json_text import read_json


@pytest.fixture
def full(tmp_path: Path) -> Path:
    (tmp_path / "full" / "base").mkdir(parents=True)
    (tmp_path / "full" / "base" / "config.json").write_text("{}")
    return tmp_path / "full"


def test_an_output_may_replace_what_is_nobodys_input(full: Path, tmp_path: Path) -> None:
    check_output(full, True, [tmp_path / "other", tmp_path / "full-too"])
    check_output(tmp_path / "new", False, [full])
    check_output(full / "base" / "out", False, [full / "base"])
    with pytest.raises(OutputError, match="pass --force"):
        check_output(full, False)


@pytest.mark.parametrize("name", ["base", "."])
def test_an_output_never_replaces_an_input(full: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(full)
    for out in (full / name, tmp_path / "link" / name):
        with pytest.raises(OutputError, match=r"would delete .*base; choose another name"):
            check_output(out, True, [full / "base"])


def test_an_output_never_replaces_the_folder_one_is_in(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(full / "base")
    for out in (Path(), full, Path("..")):
        with pytest.raises(OutputError, match="would delete"):
            check_output(out, True)


def test_a_link_that_leads_nowhere_is_no_output(tmp_path: Path) -> None:
    for name, goal in (("nowhere", "none"), ("circle", "circle")):
        (tmp_path / name).symlink_to(goal)
        with pytest.raises(OutputError, match="leads nowhere"):
            check_output(tmp_path / name, True)


def test_a_file_does_not_replace_a_folder(full: Path) -> None:
    with pytest.raises(OutputError, match="is a folder; give the name of a file"):
        write_atomic(full / "base", b"x")
    assert sorted(path.name for path in full.iterdir()) == ["base"]


def test_links_in_a_circle_end_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "index.json").symlink_to("index.json")
    with pytest.raises(CheckpointError, match="can't be read"):
        read_json(safe_join(tmp_path, "index.json", CheckpointError), CheckpointError)


def test_an_output_has_the_rights_that_the_umask_leaves_and_never_more(tmp_path: Path) -> None:
    """Nor is the umask changed for a moment, in which other threads would make files for everybody."""
    before = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the whole process's"))
            write_atomic(tmp_path / "file", b"x")
            with staged_folder(tmp_path / "folder") as stage:
                write_atomic(stage / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o640


def no_exchange(one: Path, other: Path) -> bool:
    """A system, or a file system, that can't swap two folders."""
    return False


def test_a_target_comes_back_when_it_cannot_be_replaced(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if Path(target) == full and "old-" not in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", no_exchange)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="no space left"), staged_folder(full, force=True) as stage:
        (stage / "new").touch()
    assert [path.name for path in full.iterdir()] == ["base"]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_a_kill_in_the_middle_of_a_replacement_left_is_put_back(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(self: Path, target: Path) -> Path:
        if Path(target) == full:
            raise Killed
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(files, "_exchange", no_exchange)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed), staged_folder(full, force=True) as stage:
            (stage / "new").touch()
    assert not full.exists()
    sweep(full)
    assert [path.name for path in full.iterdir()] == ["base"]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_target_that_is_a_link_is_replaced_and_what_it_leads_to_stays(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", no_exchange)
    link = tmp_path / "link"
    link.symlink_to(full)
    with staged_folder(link, force=True) as stage:
        (stage / "new").touch()
    assert [path.name for path in link.iterdir()] == ["new"]
    assert not link.is_symlink()
    assert [path.name for path in full.iterdir()] == ["base"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "link"]
