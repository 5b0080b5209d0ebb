"""The versions of a bundle that a device holds, and which of them runs.

    DST/versions/000001-3f0c91ab2d4e/    a bundle each, numbered in the order they came
    DST/current -> versions/000002-...   the one that runs; where links can't be made, a file with the name

Nothing else is kept: the last good version is the highest number below the current one. Standard library
only.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vera_edge.errors import BundleError
from vera_edge.storage.files import PARTIAL_MARK, fsync_folder, make_folder, output_error, write_atomic
from vera_edge.storage.lock import exclusive

CURRENT = "current"
VERSIONS = "versions"


def current(dst: Path) -> Path | None:
    """The folder of the version that runs, None when nothing is installed. Raises BundleError when broken."""
    link = dst / CURRENT
    if link.is_symlink():
        name = str(link.readlink())
    elif link.is_file():
        name = link.read_text("utf-8", errors="replace").strip()
    else:
        return None
    parts = Path(name).parts
    if len(parts) != 2 or parts[0] != VERSIONS or number(parts[1]) is None or not (dst / name).is_dir():
        raise BundleError(f"{link} doesn't lead to a version in {dst / VERSIONS}; install the bundle again")
    return dst / name


def running_in(dst: Path) -> Path | None:
    """As `current`, with None for a link that leads nowhere: an install mends it."""
    try:
        return current(dst)
    except BundleError:
        return None


def number(name: str) -> int | None:
    head, _, tail = name.partition("-")
    return int(head) if len(head) == 6 and head.isascii() and head.isdigit() and tail else None


def versions(dst: Path) -> list[Path]:
    """The version folders, oldest first."""
    root = dst / VERSIONS
    return sorted(path for path in root.iterdir() if number(path.name) is not None) if root.is_dir() else []


def before(dst: Path, running: Path) -> Path | None:
    earlier = [path for path in versions(dst) if path.name < running.name]
    return earlier[-1] if earlier else None


def switch(dst: Path, folder: Path) -> None:
    """Make `folder` current, in one rename."""
    name = f"{VERSIONS}/{folder.name}"
    fsync_folder(dst / VERSIONS)
    temporary = Path(tempfile.mkdtemp(prefix=f".{CURRENT}{PARTIAL_MARK}", dir=dst))
    try:
        (temporary / CURRENT).symlink_to(name, target_is_directory=True)
        (temporary / CURRENT).replace(dst / CURRENT)
        fsync_folder(dst)
    except (OSError, NotImplementedError):  # no links here: Windows without the right, FAT
        write_atomic(dst / CURRENT, f"{name}\n".encode())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tidy(dst: Path, running: Path | None) -> None:
    """Remove what an interrupted install left, and versions that were rolled back."""
    for root in (dst, dst / VERSIONS):
        for path in root.iterdir() if root.is_dir() else ():
            if path.name.startswith(".") and PARTIAL_MARK in path.name:
                shutil.rmtree(path, ignore_errors=True)
    for path in versions(dst):
        if running is not None and path.name > running.name:
            _remove(path)


def forget_before(dst: Path, kept: Path) -> None:
    for path in versions(dst):
        if path.name < kept.name:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a version: renamed first, so that one that is half deleted isn't taken for a version."""
    doomed = path.with_name(f".{path.name}{PARTIAL_MARK}removed")
    path.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def locked(dst: Path) -> Iterator[None]:
    """One install at a time. A `dst` that is new is gone again when nothing was installed."""
    new = not dst.exists()
    make_folder(dst / VERSIONS)
    try:
        with exclusive(dst / ".lock", f"install into {dst}"):
            try:
                yield
            finally:
                if new and not versions(dst):
                    shutil.rmtree(dst, ignore_errors=True)
    except OSError as cause:
        raise output_error(dst, cause) from cause
