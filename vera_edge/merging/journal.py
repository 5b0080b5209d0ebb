"""What a merge has finished so far, on disk: a line for each unit, appended as it ends.

A line is taken only when it's whole: it begins with a digest of the rest. The first one says what the merge
is, so that no other merge goes on from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vera_edge.merging.measure import Survival
from vera_edge.merging.report import LayerReport
from vera_edge.storage.line_journal import line, parsed


@dataclass(frozen=True)
class Done:
    """A unit that is finished.

    unit: its number. digest: of the tensors it gave, see `work.digest_of`. read: the SHA-256 of each tensor
    of the base that it read.
    """

    unit: int
    digest: str
    read: Mapping[str, str]
    layer: LayerReport | None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; floats come back bit for bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Done:
        """What `to_dict` wrote. Raises KeyError, TypeError or AttributeError on anything else."""
        found = value["layer"]
        layer = None
        if found is not None:
            layer = LayerReport(**{**found, "survival": Survival(**found["survival"])})
        read = {str(name): str(digest) for name, digest in value["read"].items()}
        return cls(int(value["unit"]), str(value["digest"]), read, layer)


class Journal:
    """The journal in file `path` of the merge that `key` stands for; `done` is what it holds, by unit.

    A journal of another key is started anew, and what follows a line that isn't whole is cut off. Use as a
    context manager.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.done: dict[int, Done] = {}

    def __enter__(self) -> Journal:
        kept = self._read()
        self._stream = self._path.open("ab")
        self._stream.truncate(kept)
        if not kept:
            self._append({"merge": self._key})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, done: Done) -> None:
        """Take note of a unit that is written."""
        self.done[done.unit] = done
        self._append(done.to_dict())

    def _append(self, value: Mapping[str, Any]) -> None:
        self._stream.write(line(value))
        # Not fsynced: a run that resumes verifies each entry against the file it names, and a lost entry only
        # repeats its work.
        self._stream.flush()

    def _read(self) -> int:
        """Fill `done`; returns how many bytes of the file are sound and of this merge."""
        data, kept = self._path.read_bytes() if self._path.exists() else b"", 0
        for number, entry in enumerate(data.splitlines(keepends=True)):
            value = parsed(entry)
            if value is None or (number == 0 and value != {"merge": self._key}):
                break
            if number:
                try:
                    found = Done.from_dict(value)
                except (KeyError, TypeError, ValueError, AttributeError):
                    break
                self.done[found.unit] = found
            kept += len(entry)
        return kept
