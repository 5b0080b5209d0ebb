"""Arrays that wait for their turn: in memory, or where they are many in a file without a name."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from vera_edge.arrays import Array
from vera_edge.errors import OutputError

ROOM = 512 << 20  # bytes that stay in memory


@dataclass
class Room:
    """Bytes that may still be kept in memory, by all that share it."""

    left: int = ROOM


class SpillFile:
    """Bytes by key, in a file of the folder of temporary files that is gone with the object.

    The place of what was replaced or dropped is taken by the next of the same size. Raises OutputError when
    that disk is full.
    """

    def __init__(self) -> None:
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._free: dict[int, list[int]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __del__(self) -> None:
        self.close()

    def write(self, key: Hashable, data: memoryview) -> None:
        """Keep bytes. data: contiguous."""
        self.drop(key)
        free = self._free.get(data.nbytes)
        place = free.pop() if free else self._end
        self._end = max(self._end, place + data.nbytes)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="vera-edge-hidden-")  # noqa: SIM115 (see close)
            self._file.seek(place)
            self._file.write(data)
            self._file.flush()
        except OSError as cause:
            raise OutputError(
                f"hidden states can't be kept in {tempfile.gettempdir()}: {cause.strerror}; set TMPDIR to a "
                "folder with more room"
            ) from None
        self._places[key] = (place, data.nbytes)

    def read_into(self, key: Hashable, buffer: Any) -> None:
        """Fill `buffer`, contiguous and as large as what was written."""
        assert self._file is not None
        self._file.seek(self._places[key][0])
        self._file.readinto(buffer)  # type: ignore[attr-defined]

    def drop(self, key: Hashable) -> None:
        """Forget a key, if it's there."""
        if key in self._places:
            place, size = self._places.pop(key)
            self._free.setdefault(size, []).append(place)

    def close(self) -> None:
        """Give the disk back; nothing is kept."""
        self._places, self._free = {}, {}
        if self._file is not None:
            self._file.close()
            self._file = None


class KeptArrays:
    """Arrays by key; those that there is no `room` for lie in a file that is gone with the object.

    Raises OutputError when the disk of temporary files is full.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._held: dict[Hashable, Array] = {}
        self._kinds: dict[Hashable, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._file = SpillFile()

    def __getitem__(self, key: Hashable) -> Array:
        if key in self._held:
            return self._held[key]
        dtype, shape = self._kinds[key]
        found = np.empty(shape, dtype)
        self._file.read_into(key, found.reshape(-1).view(np.uint8).data)
        return found

    def __setitem__(self, key: Hashable, array: Array) -> None:
        self.drop(key)
        if array.nbytes <= self._room.left:
            self._held[key] = array
            self._room.left -= array.nbytes
        else:
            self._file.write(key, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._kinds[key] = (array.dtype, array.shape)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._file

    def drop(self, key: Hashable) -> None:
        """Forget a key, if it's there."""
        held = self._held.pop(key, None)
        if held is not None:
            self._room.left += held.nbytes
        self._file.drop(key)
