"""Hidden states of a text between two layers: in memory, or where they are many in a file without a name."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import IO

import torch

from vera_edge.errors import OutputError

ROOM = 512 << 20  # bytes that stay in memory


@dataclass
class Room:
    """Bytes that may still be kept in memory, by all that share it."""

    left: int = ROOM


class HiddenStates:
    """Tensors by number; those that there is no `room` for lie in a file that is gone with the object.

    A tensor that replaces one of the same size takes its place, in memory or in the file.
    Raises OutputError when the disk of temporary files is full.
    """

    def __init__(self, room: Room | None = None) -> None:
        self._room = room or Room()
        self._held: dict[int, torch.Tensor] = {}
        self._places: dict[int, tuple[int, torch.dtype, torch.Size]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def __getitem__(self, row: int) -> torch.Tensor:
        if row in self._held:
            return self._held[row]
        place, dtype, shape = self._places[row]
        assert self._file is not None
        # An allocation of torch's own: where a tensor begins may decide how a product is summed up.
        found = torch.empty(shape, dtype=dtype)
        self._file.seek(place)
        self._file.readinto(found.view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return found

    def __setitem__(self, row: int, states: torch.Tensor) -> None:
        held = self._held.pop(row, None)
        if held is not None:
            self._room.left += held.nbytes
        if row not in self._places and states.nbytes <= self._room.left:
            self._held[row] = states
            self._room.left -= states.nbytes
        else:
            self._write(row, states.contiguous())

    def __len__(self) -> int:
        return len(self._held) + len(self._places)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and disk back; nothing is kept."""
        self._room.left += sum(held.nbytes for held in self._held.values())
        self._held, self._places = {}, {}
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: int, states: torch.Tensor) -> None:
        known = self._places.get(row)
        same = known is not None and known[2].numel() * known[1].itemsize == states.nbytes
        place = known[0] if known is not None and same else self._end
        self._end = max(self._end, place + states.nbytes)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="vera-edge-hidden-")  # noqa: SIM115 (see close)
            self._file.seek(place)
            self._file.write(states.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as cause:
            raise OutputError(
                f"hidden states can't be kept in {tempfile.gettempdir()}: {cause.strerror}; set TMPDIR to a "
                "folder with more room"
            ) from None
        self._places[row] = (place, states.dtype, states.shape)
