"""Memory that is used again: never while an array still refers to it."""

from __future__ import annotations

import gc
import threading

import numpy as np

from vera_edge.arrays import Array
from vera_edge.storage import buffers
from vera_edge.storage.buffers import Buffers

LARGE = 1 << 20


def place(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    pool = Buffers()
    first = pool.empty(LARGE)
    view = first[10:20].view(np.uint8).reshape(2, 5)
    where = place(first)
    del first
    gc.collect()
    other = pool.empty(LARGE)
    assert place(other) != where  # the view still looks at it
    view[:] = 7
    other[:] = 1
    assert (view == 7).all()
    del view
    assert place(pool.empty(LARGE - 5)) == where


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    """Ever larger ones, each given back before the next."""
    pool = Buffers()
    for size in range(LARGE, 20 * LARGE, LARGE):
        pool.empty(size)
    assert sum(piece.size for piece in pool._all) == 19 * LARGE


def test_the_smallest_that_fits_is_taken() -> None:
    pool = Buffers()
    large, small = pool.empty(4 * LARGE), pool.empty(2 * LARGE)
    where = place(small)
    del large, small
    assert place(pool.empty(LARGE)) == where


def test_only_large_ones_of_the_thread_that_asks() -> None:
    pool = Buffers()
    elsewhere: list[Array] = []
    with buffers.reused(pool):
        kept = buffers.empty((2, LARGE), np.float32)
        assert kept.shape == (2, LARGE) and kept.dtype == np.float32
        assert len(pool._all) == 1
        buffers.empty(10, np.float32)
        thread = threading.Thread(target=lambda: elsewhere.append(buffers.empty(LARGE, np.uint8)))
        thread.start()
        thread.join()
        assert len(pool._all) == 1 and elsewhere[0].base is None
    buffers.empty(LARGE, np.uint8)
    assert len(pool._all) == 1
