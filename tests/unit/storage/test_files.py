"""Outputs are whole or not at all, and never at the price of what they're made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from vera_edge.errors import CheckpointError, OutputError
from vera_edge.storage.files import check_output, safe_join, write_atomic
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
