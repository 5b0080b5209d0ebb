"""SHA-256 digests of files, remembered as long as a file's stamps say that nobody has written to it since.

A note holds for a file's identity: where it is, device, inode, size, and both change times in nanoseconds.
Rewriting a file changes its status-change time even where its modification time is set back, and only who may
set the clock can set that one. What it doesn't show is a disk that decays, or one that was written to past
its file system: a note is about who wrote, not about what the disk still holds.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from vera_edge.storage.cache_folder import cache_folder
from vera_edge.storage.files import sha256_bytes, sha256_file, sha256_stream
from vera_edge.storage.json_text import canonical_json

# Coarser than any file system's time stamps: what was changed longer ago can't change again unnoticed.
SETTLED = 2_000_000_000  # nanoseconds
_LEAST = 1 << 20  # bytes; a smaller file is read sooner than its note
_MOST = 1000  # notes
_NOTE = 1 << 14  # bytes that a note has at most
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# Windows' st_ctime is when a file was made, so writing to it could go unnoticed there.
_HAS_CHANGE_TIME = os.name == "posix"


def identity(found: os.stat_result) -> list[int]:
    """What tells a file from itself after a change: device, inode, size and both change times (ns)."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def is_settled(found: os.stat_result) -> bool:
    """Whether a file changed long enough ago to look different after another change.

    Within a tick of the clock it could change again and look the same; a time in the future says nothing.
    """
    return max(found.st_mtime_ns, found.st_ctime_ns) + SETTLED < time.time_ns()


class DigestNotes:
    """Notes in a folder that is this user's alone; where it isn't, or can't be used, every file is read.

    remembered: by path, the sizes of the files that weren't read since their notes hold. trouble: why there
    are no notes, in a sentence, where somebody should hear of it.
    """

    def __init__(self, folder: Path | None = None, reread: bool = False) -> None:
        """folder: where notes are; None: in the user's cache folder. reread: read every file all the same,
        and note it anew."""
        self.remembered: dict[Path, int] = {}
        self.trouble: str | None = None
        self._reread, self._folder = reread, folder
        if folder is None:
            with suppress(RuntimeError):
                self._folder = cache_folder() / "digests"

    def has(self, path: Path, sha256: str) -> bool:
        """Whether a file's content has this digest (hex). A note can only confirm it: else the file is read.

        Raises OSError when it can't be read.
        """
        if not _HAS_CHANGE_TIME or self._folder is None or path.stat().st_size < _LEAST:
            return sha256_file(path) == sha256
        real = Path(os.path.realpath(path))
        name = f"{sha256_bytes(os.fsencode(real))}.json"
        with real.open("rb", buffering=0) as stream:
            found = os.fstat(stream.fileno())
            note: dict[str, object] = {"identity": identity(found), "sha256": sha256}
            if not self._reread and is_settled(found) and self._read(name) == note:
                self.remembered[path] = found.st_size
                return True
            if sha256_stream(stream) == sha256:
                self._note(name, note, stream)
                return True
        self._forget(name)
        return False

    def _read(self, name: str) -> object:
        """What a note says; None where there is none that was written here, by this user."""
        try:
            with self._opened() as folder:
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                with os.fdopen(handle, "rb") as stream:
                    found = os.fstat(stream.fileno())
                    if not stat.S_ISREG(found.st_mode) or not _is_private(found):
                        raise PermissionError(None, "others may write to it")
                    value: object = json.loads(stream.read(_NOTE))
                    return value
        except FileNotFoundError:
            pass
        except (ValueError, RecursionError):
            self.trouble = f"{self._folder}/{name} is damaged, so the file that it is about was read"
        except OSError as cause:
            self.trouble = self.trouble or (
                f"{self._folder} can't be believed ({cause.strerror}), so every file was read; remove it"
            )
        return None

    def _note(self, name: str, note: dict[str, object], stream: FileIO) -> None:
        """Remember the digest of an open file, if it stayed as it was while it was read."""
        with suppress(OSError):
            # Else what a power loss takes away could be what was read, and leave the stamps.
            os.fsync(stream.fileno())
            after = os.fstat(stream.fileno())
            if identity(after) != note["identity"] or not is_settled(after):
                return
            assert self._folder is not None
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened() as folder:
                self._make_room(folder)
                hidden = f".{name}.{secrets.token_hex(4)}"
                try:
                    handle = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
                    with os.fdopen(handle, "wb") as written:
                        written.write(canonical_json(note))
                    os.replace(hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
                except OSError:
                    with suppress(OSError):
                        os.unlink(hidden, dir_fd=folder)

    def _forget(self, name: str) -> None:
        with suppress(OSError), self._opened() as folder:
            os.unlink(name, dir_fd=folder)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The folder, held open so that it can't become another. Raises OSError where it isn't ours alone."""
        assert self._folder is not None
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if not _is_private(os.fstat(folder)):
                raise PermissionError(None, "another user's, or others may write to it")
            yield folder
        finally:
            os.close(folder)

    def _make_room(self, folder: int) -> None:
        """Drop the oldest notes, and what killed writers left, before there are too many."""
        names = os.listdir(folder)
        if len(names) < _MOST:
            return
        made = {name: os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns for name in names}
        for name in sorted(made, key=lambda name: made[name])[: len(made) - _MOST // 2]:
            os.unlink(name, dir_fd=folder)


def _is_private(found: os.stat_result) -> bool:
    """Whether this user alone can have written to it."""
    return found.st_uid == os.geteuid() and not found.st_mode & _BY_OTHERS
