"""A content-addressed store for finished work, shared by recipes, runs and processes.

An entry's key is the digest of everything that determines it: inputs, options, tool versions. An entry is a
folder that exists whole or not at all; two processes that want the same one build it once. No result depends
on the clock, and nothing is lost when the store is deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vera_edge.errors import VeraEdgeError
from vera_edge.storage.cache_folder import cache_folder
from vera_edge.storage.digest_notes import identity, is_settled
from vera_edge.storage.files import (
    output_error,
    sha256_bytes,
    sha256_file,
    staged_folder,
    sweep,
)
from vera_edge.storage.json_text import canonical_json, read_json

_FILES, _FACTS = "files", "facts.json"  # of an entry: what was made, and what determined it
_WRITABLE = 0o222
_PIECE = 1 << 18  # bytes; stays in the processor's cache from reading to writing


def default_root() -> Path:
    """$VERA_EDGE_CACHE/store, else in the user's cache folder."""
    return cache_folder() / "store"


def key_of(facts: Mapping[str, Any]) -> str:
    """The key of the work that `facts` (a JSON object) determines."""
    return sha256_bytes(canonical_json(facts))


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here by the same `lock`, a file. Raises OutputError if none can."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(str(lock))
        held.acquire()
    except OSError as cause:
        raise output_error(lock, cause) from cause
    try:
        yield
    finally:
        held.release()


def link(source: Path, place: Path) -> None:
    """One file of the store under a second name in it; a copy on file systems that can't."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def publish(source: Path, place: Path) -> str:
    """A file of the store under a name outside; returns the hex SHA-256 of what is there now.

    The same file by a hard link, so long as nobody can write into it by mistake; else a copy.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if _linked(source, place):
        return sha256_file(place)
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as old, place.open("xb") as new:
        while piece := old.read(_PIECE):
            digest.update(piece)
            new.write(piece)
    return digest.hexdigest()


def _linked(source: Path, place: Path) -> bool:
    if source.stat().st_mode & _WRITABLE:
        return False
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links
        return False
    return True


def _seal(folder: Path) -> None:
    """Take away the right to write a folder's files; not on Windows, where they couldn't be removed then."""
    for path in folder.rglob("*") if os.name == "posix" else ():
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode & _WRITABLE:
            path.chmod(stat.S_IMODE(mode) & ~_WRITABLE)


@dataclass(frozen=True)
class Store:
    """The store under `root`. Entries are read-only once they are there.

    fresh: the name of a run that takes nothing from earlier ones; what it makes takes the place of theirs.
    """

    root: Path
    fresh: str | None = None

    def build(self, facts: Mapping[str, Any], make: Callable[[Path], None]) -> tuple[Path, bool]:
        """The entry that `facts` determine, and whether `make(folder)` had to be called for it.

        Raises OutputError when the store can't be written; what `make` raises passes through, and leaves
        no entry behind.
        """
        key = key_of(facts)
        entry = self.root / key[:2] / key
        if self._made(entry):
            return entry / _FILES, False
        with only_one(entry.with_suffix(".lock")):
            if self._made(entry):
                return entry / _FILES, False
            # Nobody else is at it, so what lies here half made was left by a run that was killed.
            sweep(entry)
            with staged_folder(entry, force=True) as stage:
                (stage / _FILES).mkdir()
                make(stage / _FILES)
                _seal(stage / _FILES)
                (stage / _FACTS).write_bytes(canonical_json({"facts": facts, "run": self.fresh or ""}))
        return entry / _FILES, True

    def _made(self, entry: Path) -> bool:
        """Whether an entry is there, and in a fresh run: made in this run."""
        if not entry.is_dir():
            return False
        if self.fresh is None:
            return True
        try:
            return bool(read_json(entry / _FACTS, VeraEdgeError).get("run") == self.fresh)
        except VeraEdgeError:
            return False

    def file_digest(self, path: Path) -> str:
        """Hex SHA-256 of a file, remembered as long as its identity on disk stays the same.

        See `digest_notes`, by whose rules: a file that changed just now, or in the future by this machine's
        clock, isn't remembered. Raises VeraEdgeError when the file can't be read.
        """
        try:
            return self._file_digest(path, path.stat())
        except OSError as cause:
            raise VeraEdgeError(f"{path} can't be read: {cause.strerror}") from None

    def _file_digest(self, path: Path, found: os.stat_result) -> str:
        name = sha256_bytes(os.fsencode(path.absolute()))
        note = self.root / "digests" / name[:2] / f"{name}.json"
        try:
            known = json.loads(note.read_bytes())
            if self.fresh is None and known["identity"] == identity(found):
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = sha256_file(path)
        if is_settled(found):
            try:
                note.parent.mkdir(parents=True, exist_ok=True)
                # Half a note isn't JSON, and is as good as none.
                note.write_bytes(canonical_json({"identity": identity(found), "sha256": digest}))
            except OSError:
                return digest  # a store that can't be written only costs the time to hash again
        return digest

    def folder_digest(self, folder: Path) -> str:
        """A digest over the names and contents of a folder's files; hidden files aren't part of it.

        That of its content for a file, as a base in GGUF is.
        """
        if folder.is_file():
            return self.file_digest(folder)
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        return key_of({name: self.file_digest(folder / name) for name in names})
