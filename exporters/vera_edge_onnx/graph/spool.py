"""Initializers on disk as soon as they're made, each in a file of its own, until the data file is written.

So no more than one is in memory, and a run that was killed goes on from what is there. Each file is removed
when its bytes are in the data file, so both together never take more than the data file and the largest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vera_edge.storage.files import output_error
from vera_edge.storage.line_journal import LineJournal

_CHUNK = 1 << 22
_FOLDER, _JOURNAL = "initializers", "journal"


@dataclass(frozen=True)
class SpooledPlace:
    """Where an initializer's bytes lie: a file within the spool's folder, and the SHA-256 of them.

    dtype: of onnx_ir.
    """

    file: str
    offset: int
    size: int
    digest: str
    dtype: int
    shape: tuple[int, ...]


class Spool:
    """The initializers of one export in `folder`, and what else was noted as finished."""

    def __init__(self, folder: Path, journal: LineJournal) -> None:
        self.folder, self._journal = folder, journal
        self._places: dict[str, SpooledPlace] = {}
        self._notes: dict[str, Any] = {}
        self._count = 0
        for entry in journal.entries:
            self._take(entry)
        found = dict(self._places)
        self._places = {name: place for name, place in found.items() if self._is_there(place)}

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "note" in entry:
            self._notes[entry["note"]] = entry["value"]
            return
        place = entry["place"]
        self._places[entry["name"]] = SpooledPlace(**{**place, "shape": tuple(place["shape"])})
        self._count += 1

    def _is_there(self, place: SpooledPlace) -> bool:
        path = self.folder / place.file
        if not path.is_file() or path.stat().st_size < place.offset + place.size:
            return False
        return _digest(path, place.offset, place.size) == place.digest

    def keep(self, name: str, array: npt.NDArray[Any]) -> ir.TensorProtocol:
        """The initializer as a tensor on disk, written unless it's there. Raises OutputError."""
        if name not in self._places:
            tensor = ir.tensor(np.asarray(array, order="C"))
            data = np.asarray(array, order="C").reshape(-1).view(np.uint8)
            file, shape = f"{_FOLDER}/{self._count:06}", tuple(array.shape)
            path = self.folder / file
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data.data)
            except OSError as cause:
                raise output_error(path, cause) from cause
            digest = hashlib.sha256(data.data).hexdigest()
            self._put(name, SpooledPlace(file, 0, data.size, digest, int(tensor.dtype), shape))
        return self.tensor(name)

    def tensor(self, name: str) -> ir.ExternalTensor:
        """An initializer that is there."""
        place = self._places[name]
        return ir.ExternalTensor(
            place.file,
            place.offset,
            place.size,
            ir.DataType(place.dtype),
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=self.folder,
        )

    @property
    def files(self) -> frozenset[Path]:
        """The files in which there is something."""
        return frozenset(self.folder / place.file for place in self._places.values())

    def has(self, names: Iterable[str]) -> bool:
        """Whether initializers are all there."""
        return all(name in self._places for name in names)

    def is_at(self, name: str, path: Path, offset: int) -> bool:
        """Whether an initializer's bytes lie there already."""
        place = self._places.get(name)
        return place is not None and (self.folder / place.file, place.offset) == (path, offset)

    def placed(self, name: str, tensor: ir.TensorProtocol, path: Path, offset: int) -> None:
        """Note that the bytes of an initializer are in a data file now, and remove the file they were in."""
        file, shape = path.relative_to(self.folder).as_posix(), tuple(tensor.shape.numpy())
        here = SpooledPlace(
            file, offset, tensor.nbytes, _digest(path, offset, tensor.nbytes), int(tensor.dtype), shape
        )
        old = Path(tensor.path) if isinstance(tensor, ir.ExternalTensor) else None
        same = [other for other, place in self._places.items() if self.folder / place.file == old]
        for other in same:
            there = self._places[other]
            self._put(other, SpooledPlace(file, offset, here.size, here.digest, there.dtype, there.shape))
        if name not in same:
            self._put(name, here)
        if old is not None and same:
            old.unlink(missing_ok=True)

    def take(self, name: str, stream: BinaryIO) -> None:
        """Write an initializer's bytes to `stream`, and forget it."""
        place = self._places.pop(name)
        copy(self.folder / place.file, place.offset, place.size, stream)
        (self.folder / place.file).unlink(missing_ok=True)

    def note(self, what: str, value: Any) -> None:
        """Keep a JSON value for the next run."""
        self._notes[what] = value
        self._journal.add({"note": what, "value": value})

    def noted(self, what: str) -> Any:
        """What was noted, in this run or an earlier one; None when nothing was."""
        return self._notes.get(what)

    def _put(self, name: str, place: SpooledPlace) -> None:
        self._places[name] = place
        self._count += 1
        self._journal.add({"name": name, "place": asdict(place)})


@contextmanager
def opened(folder: Path, key: str) -> Iterator[Spool]:
    """The spool of the work `key` in `folder`, with what an earlier run of it left."""
    with LineJournal(folder / _JOURNAL, key) as journal:
        yield Spool(folder, journal)


def copy(path: Path, offset: int, size: int, stream: BinaryIO) -> None:
    """Write a range of a file to `stream`."""
    for chunk in _chunks(path, offset, size):
        stream.write(chunk)


def _digest(path: Path, offset: int, size: int) -> str:
    state = hashlib.sha256()
    for chunk in _chunks(path, offset, size):
        state.update(chunk)
    return state.hexdigest()


def _chunks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(offset)
        while size:
            chunk = stream.read(min(_CHUNK, size))
            if not chunk:
                raise OSError(f"{path} is shorter than it was")
            size -= len(chunk)
            yield chunk
