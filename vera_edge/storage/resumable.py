"""A hidden folder beside a target in which long work grows, of a fixed name, so that the next run finds it.

    .<target>.partial-<purpose>/lock       held while a run is at work here
    .<target>.partial-<purpose>/<key>/     what this work has finished; named after its inputs

The inner folder is named after the inputs of the work, so that no other work goes on from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vera_edge.errors import OutputError, ReadError, VeraEdgeError, WorkerError
from vera_edge.storage.files import PARTIAL_MARK, settle
from vera_edge.storage.lock import exclusive

_KEY_DIGITS = 16


def folder_of(target: Path, purpose: str) -> Path:
    """Where work of this purpose on `target` grows."""
    return target.absolute().with_name(f".{target.absolute().name}{PARTIAL_MARK}{purpose}")


def files_of(target: Path, purpose: str, key: str) -> Path:
    """Where in it the files of the work `key` lie."""
    return folder_of(target, purpose) / key[:_KEY_DIGITS]


def held(target: Path, purpose: str) -> int:
    """Bytes on the disk of what earlier work of this purpose left."""
    folder = folder_of(target, purpose)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def resumable_folder(
    target: Path,
    purpose: str,
    key: str,
    has_progress: Callable[[Path], bool] = lambda files: any(files.iterdir()),
) -> Iterator[Path]:
    """The folder of the work `key` (hex digits) on `target`, with what an earlier run of it left.

    Gone when the block ends, or raises a VeraEdgeError that a second run would raise too. It stays for the
    next run after a kill, an interrupt or a lost worker, and where a disk or a network said no once
    something was finished: `has_progress(folder)`. Files of work with another key are removed.
    Raises OutputError when another run is at work here, OSError when the folder can't be made.
    """
    folder, files = folder_of(target, purpose), files_of(target, purpose, key)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "lock", f"{purpose} into {target}"):
        try:
            for path in folder.iterdir():
                if path.is_dir() and path != files:
                    shutil.rmtree(path)
            files.mkdir(exist_ok=True)
            yield files
        except (VeraEdgeError, OSError) as error:
            if not _may_pass(error, files, has_progress):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _may_pass(error: Exception, files: Path, has_progress: Callable[[Path], bool]) -> bool:
    """Whether a second run may get further, and there is something that it needn't do again."""
    if isinstance(error, WorkerError):
        return True
    if not isinstance(error, OSError | OutputError | ReadError):
        return False
    try:
        return has_progress(files)
    except OSError:
        return False


def tidy(target: Path, purpose: str, results: str) -> None:
    """End what a run left that was killed while it put its result in the target's place, or after that.

    results: a pattern of the folders that become the target, within that of the purpose.
    """
    target, folder = target.absolute(), folder_of(target, purpose)
    if not folder.is_dir():
        return
    # Who holds the lock tidies up by itself.
    with suppress(OutputError, OSError), exclusive(folder / "lock", f"{purpose} into {target}"):
        settle(target)
        if (
            target.is_dir()
            and any(target.iterdir())
            and not any(path.is_dir() for path in folder.glob(results))
        ):
            shutil.rmtree(folder, ignore_errors=True)
