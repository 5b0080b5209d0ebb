"""Where a merge grows: a hidden folder beside its target, of a fixed name, so that the next run finds it.

    .<target>.partial-merge/lock          held while a merge is at work here
    .<target>.partial-merge/journal       what is finished
    .<target>.partial-merge/<key>/        the model's files; in the end this folder becomes the target

The folder of files is named after the merge, so that a straggling worker of another merge finds no file of
this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vera_edge.errors import ReadError, VeraEdgeError
from vera_edge.merging.journal import Journal
from vera_edge.storage import resumable
from vera_edge.storage.files import commit_folder, output_error

_PURPOSE = "merge"


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
    return resumable.folder_of(target, _PURPOSE)


def files_of(target: Path, key: str) -> Path:
    """Where in it the files of the merge `key` lie."""
    return resumable.files_of(target, _PURPOSE, key)


@contextmanager
def opened(target: Path, key: str) -> Iterator[Stage]:
    """The stage of the merge `key` into `target`, with what an earlier run of it left.

    It ends, or stays for the next run, as a resumable folder does. Raises OutputError when it can't be made,
    or another merge is at work on it, ReadError when it's the base's disk.
    """
    journal = folder_of(target) / "journal"
    try:
        with (
            resumable.resumable_folder(target, _PURPOSE, key, lambda _: _has_entries(journal)) as files,
            Journal(journal, key) as opened,
        ):
            yield Stage(target.absolute(), files, opened)
    except OSError as cause:
        raise _error(target, cause) from cause


def _has_entries(journal: Path) -> bool:
    """Whether a journal has more than its first line, which says which merge it is."""
    return journal.read_bytes().count(b"\n") > 1


def _error(target: Path, cause: OSError) -> VeraEdgeError:
    """What to say of an error of the system's: it's the output's, unless it names a file elsewhere."""
    named = cause.filename
    if isinstance(named, str | bytes):
        path = Path(os.fsdecode(named)).absolute()
        places = (target.absolute(), folder_of(target))
        if not any(path.is_relative_to(place) for place in places) and path not in target.absolute().parents:
            return ReadError(f"{path} can't be read: {cause.strerror}; run again when it can")
    return output_error(target, cause)


def tidy(target: Path) -> None:
    """End what a run left that was killed while it put the files in their place, or after that."""
    resumable.tidy(target, _PURPOSE, "*")
