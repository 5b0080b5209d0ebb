"""Files and digests: SHA-256, atomic writes, paths that stay inside their folder.

Everything vera-edge writes goes through here, so that an output either exists whole or not at all, and
the same inputs give the same bytes.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vera_edge.errors import BundleError, OutputError, VeraEdgeError

_PIECE = 4 << 20  # bytes
PARTIAL_MARK = ".partial-"
_OLD_MARK = f"{PARTIAL_MARK}old-"  # what a target had while it is replaced


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file; of a large one the next piece is read while this one is hashed."""
    with path.open("rb", buffering=0) as stream:
        return sha256_stream(stream)


def sha256_stream(stream: FileIO) -> str:
    """Hex SHA-256 of an open file from where it stands on, as `sha256_file`."""
    if os.fstat(stream.fileno()).st_size <= _PIECE:
        return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(stream.read, _PIECE)
        while piece := coming.result():
            coming = reader.submit(stream.read, _PIECE)
            digest.update(piece)
    return digest.hexdigest()


def safe_join(root: Path, relative: str, error: type[VeraEdgeError] = BundleError) -> Path:
    """`root / relative`, refusing any name that could leave `root`.

    Refused: absolute paths, `..`, drive letters, backslashes, NUL, empty names, and links that lead out; but
    huggingface_hub's cache keeps a model as links from snapshots/<revision>/ to blobs/, which are its own.
    """
    pure = PurePosixPath(relative)
    bad = (
        not relative
        or pure.is_absolute()
        or any(part in ("..", "") for part in relative.split("/"))
        or any(mark in relative for mark in ("\\", "\0", ":"))
        or not _is_file_name(relative)
    )
    if bad:
        raise error(f"unsafe path {relative!r} in {root}; names must be relative and stay in the folder")
    path = root / relative
    within = [root.resolve()]
    if within[0].parent.name == "snapshots":
        within.append(within[0].parent.parent / "blobs")
    # Not Path.resolve, which raises on links in a circle: those are found when they're read.
    if not any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in within):
        raise error(f"{path} leads out of {root} through a link; replace the link by the file itself")
    return path


def _is_file_name(relative: str) -> bool:
    try:
        os.fsencode(relative)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def fsync_folder(path: Path) -> None:
    """Make a rename inside `path` durable, where the platform can (Windows can't open a folder)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Flush a finished file to the disk; it may be read-only, but on Windows."""
    with path.open("rb" if os.name == "posix" else "rb+") as stream:
        os.fsync(stream.fileno())


def output_error(path: Path, cause: OSError) -> OutputError:
    """The one-sentence error for a failed write to `path`."""
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no space left on the disk while writing {path}; free some and run again")
    if cause.errno == errno.EFBIG:
        return OutputError(f"{path} grows past the file size that this system allows; raise the limit")
    where = f" ({cause.filename})" if cause.filename and str(cause.filename) != str(path) else ""
    return OutputError(f"can't write {path}: {cause.strerror or cause}{where}")


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they aren't there. Raises OutputError when they can't be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise output_error(path, cause) from cause


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A stream into a temporary file that takes the place of `path` when the block ends without an error."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _hidden(path)
        stream = temporary.open("xb")
    except OSError as cause:
        raise output_error(path, cause) from cause
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as cause:
        raise output_error(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a mix."""
    with open_atomic(path) as stream:
        stream.write(data)


def _hidden(path: Path) -> Path:
    """A name beside `path` that nobody has.

    Not `tempfile`'s: what it makes is private, and only the system can give a file the rights that the umask
    leaves without the umask being changed for other threads.
    """
    return path.with_name(f".{path.name}{PARTIAL_MARK}{secrets.token_hex(4)}")


def check_output(path: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise OutputError before any work is done when `path` is taken and `force` isn't given.

    With `force` too when replacing it would delete one of `inputs`, or the folder this process is in.
    """
    if path.is_symlink() and not path.exists():
        raise OutputError(f"{path} is a link that leads nowhere; remove it or choose another name")
    if path.is_file() and not force:
        raise OutputError(f"{path} exists; choose another name or pass --force to replace it")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise OutputError(f"{path} exists and isn't empty; choose another name or pass --force to replace it")
    for kept in (*inputs, Path.cwd()):
        if Path(os.path.realpath(kept)).is_relative_to(path.resolve()):
            raise OutputError(f"replacing {path} would delete {kept}; choose another name")


@contextmanager
def staged_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    With an error (a kill included) `target` keeps what it had. With `force` an existing target is replaced.
    """
    check_output(target, force)
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = _hidden(target)
        stage.mkdir()
    except OSError as cause:
        raise output_error(target, cause) from cause
    try:
        yield stage
        commit_folder(stage, target)
    except OSError as cause:
        raise output_error(target, cause) from cause
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def commit_folder(stage: Path, target: Path) -> None:
    """Flush every file of `stage` to the disk, then put it in the place of `target`.

    On Linux the two trade places in one step, so that at no moment `target` isn't there; elsewhere `settle`
    ends what a kill between two steps left. Where `target` is a link, the link is replaced.
    """
    for path in stage.rglob("*"):
        if path.is_file() and not path.is_symlink():
            fsync_file(path)
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(stage)
    old = stage
    if not target.exists():
        stage.rename(target)
    elif not _exchange(stage, target):
        old = target.with_name(f".{target.name}{_OLD_MARK}{os.getpid()}")
        target.rename(old)
        try:
            stage.rename(target)
        except BaseException:
            old.rename(target)
            raise
    fsync_folder(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, of which what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def leftovers(target: Path) -> list[Path]:
    """What killed writers of `target` left beside it, or living ones are at work on."""
    begun = f"{target.name}{PARTIAL_MARK}"
    found = target.parent.glob(f".*{glob.escape(begun)}*")
    # A stage of a stage begins with two dots: ".." and the same name; its own stage lies beside it.
    return [path for path in found if path.name.lstrip(".").startswith(begun)]


def settle(target: Path) -> None:
    """End what a writer of `target` left that was killed while replacing it: what `target` had is put back
    where it's gone, and removed where the new one is there.

    For one who knows that nobody else is at work on it.
    """
    begun = f".{target.name}{_OLD_MARK}"
    old = [path for path in leftovers(target) if path.name.startswith(begun)]
    old.sort(key=lambda path: path.lstat().st_mtime)
    if old and not os.path.lexists(target):
        old.pop().rename(target)
    for path in old:
        _remove(path)


def sweep(target: Path) -> None:
    """`settle`, and remove the other `leftovers` of `target`."""
    settle(target)
    for path in leftovers(target):
        _remove(path)
