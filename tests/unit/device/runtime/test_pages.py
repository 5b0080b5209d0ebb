"""Memory of a cache is taken by the tokens that are in it, not by those that may come."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from vera_edge.device.runtime import pages

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of physical memory that this process holds."""
    return int(re.findall(r"VmRSS:\s+(\d+)", STATUS.read_text())[0]) * 1024


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells what a process holds")
def test_a_cache_takes_the_pages_that_are_written() -> None:
    rows, heads, capacity, size = 8, 4, 4096, 64
    before = resident()
    cache = [pages.zeros((rows, heads, capacity, size), np.dtype(np.float32)) for _ in range(4)]
    for array in cache:
        array[:, :, :16] = 1
    written = 4 * rows * heads * 16 * size * 4
    assert written <= resident() - before < 4 * written < sum(array.nbytes for array in cache) / 8


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (2, 4, 4096, 64), (1, 2, 0, 4)])
def test_they_are_zeros_that_can_be_written(shape: tuple[int, ...], dtype: type) -> None:
    found = pages.zeros(shape, np.dtype(dtype))
    assert found.shape == shape and found.dtype == dtype and found.flags.c_contiguous and not found.any()
    found[...] = 2
    assert (found == 2).all()
