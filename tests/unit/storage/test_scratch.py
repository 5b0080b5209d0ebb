"""Folders for files that only the work reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from vera_edge.errors import OutputError
from vera_edge.storage.files import leftovers
from vera_edge.storage.scratch import scratch_folder


def test_it_lies_by_the_target_and_is_gone_in_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with scratch_folder(target, "codes") as folder:
        (folder / "file").write_bytes(b"1")
        assert folder.parent == target.parent
        assert folder in leftovers(target), "a killed run's folder is swept"
    assert not list(target.parent.iterdir())


def test_a_place_that_refuses_is_said_by_the_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="out"), scratch_folder(tmp_path / "file" / "out", "codes"):
        pass
