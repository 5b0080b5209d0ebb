"""Arrays of zeros that take memory as they are written, a small page at a time."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from vera_edge.arrays import Array

# From this many bytes on numpy asks Linux for pages of 2 MB, each taken whole when its first byte is written.
# All of a cache for rows of 4,096 tokens would be there as soon as each row holds one.
_HUGE = 4 << 20


def zeros(shape: Sequence[int], dtype: np.dtype) -> Array:
    """Zeros of `shape` and `dtype`, C-contiguous. Raises MemoryError when there are no addresses for them."""
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    try:
        held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as cause:
        raise MemoryError(f"no memory for an array of {size} bytes") from cause
    with suppress(OSError):  # of a kernel that has no such pages
        held.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(held, dtype).reshape(shape)
