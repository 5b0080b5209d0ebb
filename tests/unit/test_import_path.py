"""The folders that modules are looked for in, of a command and of the processes that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vera_edge

PACKAGE = str(Path(vera_edge.__file__).parent.parent)
SCRIPT = """
import sys
from vera_edge import import_path
import_path.protect()
import json, os
print(json.dumps([sys.path, os.environ["PYTHONPATH"].split(os.pathsep), os.environ["PYTHONSAFEPATH"]]))
"""


def paths(folder: Path, entries: list[str]) -> tuple[list[str], list[str], str]:
    """A process's path and its children's PYTHONPATH, when it was started in `folder` with `entries`."""
    (folder.parent / "start.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(folder.parent / "start.py")],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(entries)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path, children, safe = json.loads(done.stdout)
    return path, children, safe


@pytest.mark.parametrize(
    "relative", [["", PACKAGE], [".", PACKAGE], [PACKAGE, "more", ""], ["../here", PACKAGE]]
)
def test_relative_entries_are_left_out_and_whole_ones_stay(tmp_path: Path, relative: list[str]) -> None:
    here, apart = tmp_path / "here", tmp_path / "apart"
    (here / "more").mkdir(parents=True)
    apart.mkdir()
    path, children, safe = paths(here, [*relative, str(apart)])
    assert not {str(here), str(here / "more"), ""} & {*path, *children}
    assert str(apart) in path and children == [PACKAGE, str(apart)] and safe == "1"


def test_a_working_folder_that_is_named_by_its_whole_path_stays(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    path, children, _ = paths(here, ["", str(here), PACKAGE])
    assert str(here) in path and children == [str(here), PACKAGE]


def test_vera_edge_is_found_wherever_it_was_found_before(tmp_path: Path) -> None:
    """By a relative entry, say, in a checkout: what is run comes from there in any case."""
    entry = os.path.relpath(PACKAGE, tmp_path / "here")
    (tmp_path / "here").mkdir()
    path, children, _ = paths(tmp_path / "here", [entry])
    assert PACKAGE in path and children[-1] == PACKAGE
