"""Where a merge grows: a hidden folder beside its target, of a fixed name, so that the next run finds it.

    .<target>.partial-merge/lock          held while a merge is at work here
    .<target>.partial-merge/journal       what is finished
    .<target>.partial-merge/<key>/        the model's files; in the end this folder becomes the target

The folder of files is named after the merge, so that a straggling worker of another merge finds no file of
this one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vera_edge.errors import VeraEdgeError
from vera_edge.merging.journal import Journal
from vera_edge.storage.files import PARTIAL_MARK, commit_folder, output_error
from vera_edge.storage.lock import exclusive

_KEY_DIGITS = 16


@dataclass(frozen=True)
class Stage:
    """`files`: the folder to write the model to. `journal`: open, what was finished in earlier runs."""

    target: Path
    files: Path
    journal: Journal

    def commit(self) -> None:
        """Put the files in the target's place, durably."""
        commit_folder(self.files, self.target)


def folder_of(target: Path) -> Path:
    """Where a merge into `target` grows."""
    return target.absolute().with_name(f".{target.absolute().name}{PARTIAL_MARK}merge")


def files_of(target: Path, key: str) -> Path:
    """Where in it the files of the merge `key` lie."""
    return folder_of(target) / key[:_KEY_DIGITS]


@contextmanager
def opened(target: Path, key: str) -> Iterator[Stage]:
    """The stage of the merge `key` into `target`, with what an earlier run of it left.

    Gone when the block ends, or raises a VeraEdgeError that a second run would raise too. A kill, an
    interrupt or a lost worker leave it for the next run. Raises OutputError when it can't be made, or
    another merge is at work on it.
    """
    folder = folder_of(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / "lock", f"merge into {target}"):
            try:
                yield from _stage(folder, target, key)
            except VeraEdgeError as error:
                if type(error) is not VeraEdgeError:  # the plain one is a worker's or a cluster's end
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as cause:
        raise output_error(target, cause) from cause


def _stage(folder: Path, target: Path, key: str) -> Iterator[Stage]:
    files = files_of(target, key)
    for path in folder.iterdir():
        if path.is_dir() and path != files:
            shutil.rmtree(path)
    files.mkdir(exist_ok=True)
    with Journal(folder / "journal", key) as journal:
        yield Stage(target.absolute(), files, journal)
    for old in target.absolute().parent.glob(f".{_literal(target.absolute().name)}{PARTIAL_MARK}old-*"):
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed while it replaced the target


def _literal(name: str) -> str:
    return "".join(f"[{mark}]" if mark in "*?[" else mark for mark in name)


def tidy(target: Path) -> None:
    """Remove what a run left that was killed when it had put the files in their place."""
    folder = folder_of(target)
    if target.is_dir() and folder.is_dir() and not any(path.is_dir() for path in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
