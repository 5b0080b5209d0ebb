"""What long work has finished so far, as lines of JSON that are appended as it goes on.

A line is taken only when it's whole: it begins with a digest of the rest. The first one says which work it
is, so that no other goes on from here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from vera_edge.storage.files import sha256_bytes

_MARK = 16  # hex digits of a line's digest


class LineJournal:
    """The journal in file `path` of the work `key`; `entries` is what it holds, in the order of writing.

    One of other work is started anew, and what follows a line that isn't whole is cut off. Not flushed to the
    disk: who goes on from an entry holds it against the file it names. Use as a context manager.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.entries: list[Any] = []

    def __enter__(self) -> LineJournal:
        kept = self._read()
        self._stream = self._path.open("ab")
        self._stream.truncate(kept)
        if not kept:
            self._append({"work": self._key})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, entry: Any) -> None:
        """Take note of something that is finished: a JSON value."""
        self.entries.append(entry)
        self._append(entry)

    def _append(self, entry: Any) -> None:
        self._stream.write(line(entry))
        self._stream.flush()

    def _read(self) -> int:
        """Fill `entries`; returns how many bytes of the file are sound and of this work."""
        data, kept = self._path.read_bytes() if self._path.exists() else b"", 0
        for number, written in enumerate(data.splitlines(keepends=True)):
            entry = parsed(written)
            if entry is None or (number == 0 and entry != {"work": self._key}):
                break
            if number:
                self.entries.append(entry)
            kept += len(written)
        return kept


def line(entry: Any) -> bytes:
    """A JSON value as a line that begins with a digest of the rest."""
    text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    return sha256_bytes(text)[:_MARK].encode() + b" " + text + b"\n"


def parsed(written: bytes) -> Any:
    """What `line` wrote; None for one that isn't whole."""
    mark, _, text = written.removesuffix(b"\n").partition(b" ")
    if not written.endswith(b"\n") or mark != sha256_bytes(text)[:_MARK].encode():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
