"""Large arrays whose memory is used again: the system zeroes what it hands out anew, page by page, and a
merge that asks for each layer's memory anew spends a tenth of its time on that.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Array, Bytes

_SMALL = 1 << 20  # bytes below which nothing is gained
_current = threading.local()


class Buffers:
    """Memory of one thread. What is at work at once is kept, no more: a piece that is too small goes before
    a larger one is asked for."""

    def __init__(self) -> None:
        self._all: list[Bytes] = []

    def empty(self, nbytes: int) -> Bytes:
        """So many bytes that nothing else uses, until no array refers to them any more."""
        unused = [piece for piece in range(len(self._all)) if self._is_unused(piece)]
        fitting = [piece for piece in unused if self._all[piece].size >= nbytes]
        if fitting:
            return self._all[min(fitting, key=lambda piece: self._all[piece].size)][:nbytes]
        for piece in reversed(unused):
            del self._all[piece]
        self._all.append(np.empty(nbytes, np.uint8))
        return self._all[-1][:nbytes]

    def _is_unused(self, piece: int) -> bool:
        # Every view of an array holds it as its base. Two references are the list's and this call's.
        return sys.getrefcount(self._all[piece]) == 2


@contextmanager
def reused(buffers: Buffers) -> Iterator[None]:
    """Have `empty` take memory from `buffers` in this thread."""
    before = getattr(_current, "buffers", None)
    _current.buffers = buffers
    try:
        yield
    finally:
        _current.buffers = before


def empty(shape: tuple[int, ...] | int, dtype: npt.DTypeLike) -> Array:
    """`numpy.empty`, of memory that is used again where the thread has such."""
    buffers: Buffers | None = getattr(_current, "buffers", None)
    sides = (shape,) if isinstance(shape, int) else shape
    nbytes = int(np.prod(sides, dtype=np.int64)) * np.dtype(dtype).itemsize
    if buffers is None or nbytes < _SMALL:
        return np.empty(sides, dtype)
    return buffers.empty(nbytes).view(dtype).reshape(sides)
