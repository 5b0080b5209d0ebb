"""A content-addressed store for finished work, shared by recipes, runs and processes.

An entry's key is the digest of everything that determines it: inputs, options, tool versions. An entry is a
folder that exists whole or not at all; two processes that want the same one build it once. Nothing in here
depends on the clock, and nothing is lost when the store is deleted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vera_edge.errors import OutputError
from vera_edge.files import (
    canonical_json,
    output_error,
    sha256_bytes,
    sha256_file,
    staged_folder,
    write_atomic,
)


def default_root() -> Path:
    """$VERA_EDGE_CACHE/store, else the user's cache folder."""
    if given := os.environ.get("VERA_EDGE_CACHE"):
        return Path(given) / "store"
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(home).expanduser() / "vera-edge" / "store"


def key_of(facts: Mapping[str, Any]) -> str:
    """The key of the work that `facts` (a JSON object) determines."""
    return sha256_bytes(canonical_json(facts))


@dataclass(frozen=True)
class Store:
    """The store under `root`. Entries are read-only once they are there."""

    root: Path

    def entry(self, key: str) -> Path | None:
        """The finished entry, or None."""
        path = self._path(key)
        return path if path.is_dir() else None

    def build(self, facts: Mapping[str, Any], make: Callable[[Path], None]) -> tuple[Path, bool]:
        """The entry that `facts` determine, and whether `make(folder)` had to be called for it.

        Raises OutputError when the store can't be written; what `make` raises passes through, and leaves
        no entry behind.
        """
        key = key_of(facts)
        if (found := self.entry(key)) is not None:
            return found, False
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path) + ".lock")
            lock.acquire()
        except OSError as cause:
            raise output_error(path, cause) from cause
        try:
            if (found := self.entry(key)) is not None:
                return found, False
            with staged_folder(path) as stage:
                make(stage)
            write_atomic(path.with_suffix(".json"), canonical_json(facts))
        finally:
            lock.release()
        return path, True

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / key

    def file_digest(self, path: Path) -> str:
        """Hex SHA-256 of a file, remembered as long as its identity on disk stays the same.

        Identity is device, inode, size, and both change times in nanoseconds: rewriting a file changes its
        status-change time even when its modification time is set back.
        """
        stat = path.stat()
        identity = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        name = sha256_bytes(os.fsencode(path.absolute()))
        note = self.root / "digests" / name[:2] / f"{name}.json"
        try:
            known = json.loads(note.read_bytes())
            if known["identity"] == identity:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = sha256_file(path)
        try:
            write_atomic(note, canonical_json({"identity": identity, "sha256": digest}))
        except OutputError:
            return digest  # a read-only store only costs the time to hash again
        return digest

    def folder_digest(self, folder: Path) -> str:
        """A digest over the names and contents of a folder's files; hidden files aren't part of it."""
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        return key_of({name: self.file_digest(folder / name) for name in names})
