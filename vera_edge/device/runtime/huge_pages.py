"""Memory that was allocated meanwhile, moved to pages of 2 MB, which Linux 6.1 and later do when asked.

A token reads every weight once. On pages of 4 KB that is tens of thousands of places to look up, each a walk
through the tables of pages, two of them in a virtual machine, and chance says which pages share a place in
the caches. What isn't there wholly stays as it is, so that no memory is taken that nobody has written to.
https://man7.org/linux/man-pages/man2/madvise.2.html, https://docs.kernel.org/admin-guide/mm/pagemap.html
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

SIZE = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE, which Python has no name for
_PRESENT = np.uint64(1 << 63)  # of an entry of pagemap
_MAPS, _PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_ALLOWED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_Range = tuple[int, int]  # addresses
T = TypeVar("T")


def moving(make: Callable[[], T]) -> tuple[T, int]:
    """What `make` gives, and how many bytes were moved of what it allocated and still holds."""
    before = _writable() if _allowed() else None
    made = make()
    return made, 0 if before is None else collapse(list(_without(_writable() or [], before)))


def collapse(ranges: list[_Range]) -> int:
    """Move what is there in 2 MB whole between these addresses: how many bytes were."""
    try:
        pages = [page for start, stop in ranges for page in _whole(start, stop)]
    except OSError:  # of a system that doesn't let a process see its own pages
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(SIZE for page in pages if madvise(page, SIZE, _COLLAPSE) == 0)


def told(moved: int) -> str:
    """What moving weights came to, for a person."""
    if moved:
        return f"{moved / 1e6:.1f} MB of weights lie on pages of 2 MB"
    return "no weights could be moved to pages of 2 MB; Linux from 6.1 on does that, where it isn't forbidden"


def _allowed() -> bool:
    """Whether this system has such pages and nobody forbids them."""
    try:
        return mmap.PAGESIZE == 4096 and "[never]" not in _ALLOWED.read_text()
    except OSError:
        return False


def _whole(start: int, stop: int) -> list[int]:
    """Addresses of the 2 MB between two of which every page is in memory."""
    first, last = -(-start // SIZE), stop // SIZE
    if last <= first:
        return []
    each = SIZE // mmap.PAGESIZE
    with _PAGEMAP.open("rb", buffering=0) as stream:
        stream.seek(first * each * 8)
        data = stream.read((last - first) * each * 8)
    entries: npt.NDArray[np.uint64] = np.frombuffer(data, np.uint64)
    there = (entries[: len(entries) // each * each] & _PRESENT).reshape(-1, each).all(axis=1)
    return [(first + int(number)) * SIZE for number in np.flatnonzero(there)]


def _writable() -> list[_Range] | None:
    """Where this process holds memory of no file that it may write, by address; None when it can't tell."""
    found = []
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, stop = (int(address, 16) for address in place.split("-"))
            found.append((start, stop))
    return found


def _without(ranges: list[_Range], gone: list[_Range]) -> Iterator[_Range]:
    """What of some ranges isn't in others, both in order."""
    for start, stop in ranges:
        for begin, end in gone:
            if begin < stop and end > start:
                if begin > start:
                    yield start, begin
                start = max(start, end)
        if start < stop:
            yield start, stop
