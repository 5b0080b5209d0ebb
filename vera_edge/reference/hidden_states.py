"""Hidden states of a text between two layers: in memory, or where they are many in a file without a name."""

from __future__ import annotations

import torch

from vera_edge.storage.spill import ROOM, Room, SpillFile

__all__ = ["ROOM", "HiddenStates", "Room"]


class HiddenStates:
    """Tensors by number; those that there is no `room` for lie in a file that is gone with the object.

    A tensor that replaces one of the same size takes its place, in memory or in the file.
    Raises OutputError when the disk of temporary files is full.
    """

    def __init__(self, room: Room | None = None) -> None:
        self._room = room or Room()
        self._held: dict[int, torch.Tensor] = {}
        self._kinds: dict[int, tuple[torch.dtype, torch.Size]] = {}
        self._file = SpillFile()

    def __getitem__(self, row: int) -> torch.Tensor:
        if row in self._held:
            return self._held[row]
        dtype, shape = self._kinds[row]
        # An allocation of torch's own: where a tensor begins may decide how a product is summed up.
        found = torch.empty(shape, dtype=dtype)
        self._file.read_into(row, found.view(torch.uint8).numpy().data)
        return found

    def __setitem__(self, row: int, states: torch.Tensor) -> None:
        held = self._held.pop(row, None)
        if held is not None:
            self._room.left += held.nbytes
        if row not in self._file and states.nbytes <= self._room.left:
            self._held[row] = states
            self._room.left -= states.nbytes
        else:
            self._file.write(row, states.contiguous().view(torch.uint8).numpy().data)
            self._kinds[row] = (states.dtype, states.shape)

    def __len__(self) -> int:
        return len(self._held) + len(self._file)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and disk back; nothing is kept."""
        self._room.left += sum(held.nbytes for held in self._held.values())
        self._held = {}
        self._file.close()
