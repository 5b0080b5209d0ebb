"""Hidden states of a text between two layers: in memory, or where they are many in a file without a name."""

from __future__ import annotations

import tempfile
from typing import IO

import torch

BUDGET = 256 << 20  # bytes that stay in memory, of one text in one view of the model


class HiddenStates:
    """Tensors by number; those that don't fit in `budget` bytes lie in a file that is gone with the object.

    A tensor that replaces one of the same size takes its place, in memory or in the file.
    Raises OSError when the disk is full.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self._budget = budget
        self._held: dict[int, torch.Tensor] = {}
        self._places: dict[int, tuple[int, torch.dtype, torch.Size]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def __getitem__(self, row: int) -> torch.Tensor:
        if row in self._held:
            return self._held[row]
        place, dtype, shape = self._places[row]
        assert self._file is not None
        buffer = bytearray(shape.numel() * dtype.itemsize)
        self._file.seek(place)
        if self._file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise OSError("a scratch file of hidden states was cut off")
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def __setitem__(self, row: int, states: torch.Tensor) -> None:
        size = states.numel() * states.element_size()
        held = self._held.pop(row, None)
        if held is not None:
            self._budget += held.numel() * held.element_size()
        if row not in self._places and size <= self._budget:
            self._held[row], self._budget = states, self._budget - size
        else:
            self._write(row, states.contiguous(), size)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._held) + len(self._places)

    def _write(self, row: int, states: torch.Tensor, size: int) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="vera-edge-hidden-")  # noqa: SIM115 (lives as long as this)
        known = self._places.get(row)
        same = known is not None and known[2].numel() * known[1].itemsize == size
        place = known[0] if known is not None and same else self._end
        self._end = max(self._end, place + size)
        self._file.seek(place)
        self._file.write(states.view(torch.uint8).numpy().data)
        self._places[row] = (place, states.dtype, states.shape)
