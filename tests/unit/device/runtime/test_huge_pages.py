"""Pages of 2 MB: which memory is moved to them, by what the kernel says of it, and what isn't."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Cli
from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime import huge_pages, pages
from vera_edge.device.runtime.huge_pages import SIZE, collapse, moving
from vera_edge.device.runtime.session import Session

FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@pytest.fixture(autouse=True)
def can() -> None:
    """Skips where nothing can be moved."""
    if not huge_pages._allowed() or "[always]" in huge_pages._ALLOWED.read_text():
        pytest.skip("this system has no such pages, or gives them to everything")
    whole = region(1)
    whole[:] = 1
    if not collapse([addresses(whole)]):
        pytest.skip("this kernel moves nothing when it's asked")


def region(pages: int) -> np.ndarray:
    """Memory of its own for some pages of 2 MB, at such a page, of which nothing is there yet."""
    whole = np.frombuffer(mmap.mmap(-1, (pages + 1) * SIZE, flags=FLAGS), np.uint8)
    start = -whole.ctypes.data % SIZE
    return whole[start : start + pages * SIZE]


def filled(count: int) -> np.ndarray:
    new = region(count)
    new[:] = np.arange(new.size, dtype=np.uint8)
    return new


def addresses(array: np.ndarray) -> tuple[int, int]:
    return array.ctypes.data, array.ctypes.data + array.nbytes


def kilobytes(array: np.ndarray, what: str) -> int:
    """What smaps says of the mapping that an array lies in."""
    at, found = array.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(place[1], 16) <= at < int(place[2], 16)
        elif found and line.startswith(f"{what}:"):
            return int(line.split()[1])
    raise AssertionError(what)


def small_pages(array: np.ndarray) -> int:
    """How many of an array's pages of 4 KB are in memory."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as stream:
        stream.seek(array.ctypes.data // mmap.PAGESIZE * 8)
        entries = np.frombuffer(stream.read(array.nbytes // mmap.PAGESIZE * 8), np.uint64)
    return int((entries >> np.uint64(63)).sum())


def test_new_memory_is_moved_and_older_is_not() -> None:
    old = region(2)
    old[:] = 3
    before = kilobytes(old, "AnonHugePages")
    new, moved = moving(lambda: filled(3))
    assert moved >= 3 * SIZE
    assert kilobytes(new, "AnonHugePages") >= 2 * SIZE // 1024
    np.testing.assert_array_equal(new, np.arange(new.size, dtype=np.uint8))
    if kilobytes(old, "Size") < 3 * SIZE // 1024:  # it is a mapping by itself
        assert kilobytes(old, "AnonHugePages") == before


def test_what_is_not_there_takes_no_memory() -> None:
    sparse = region(4)
    sparse[:: 2 * mmap.PAGESIZE] = 1
    sparse[SIZE : 2 * SIZE] = 2
    before = small_pages(sparse)
    assert collapse([addresses(sparse)]) == SIZE
    assert small_pages(sparse) == before == SIZE * 5 // 2 // mmap.PAGESIZE
    assert sparse[SIZE] == 2 and sparse[0] == 1 and sparse[mmap.PAGESIZE] == 0


def test_caches_that_grow_by_small_pages_stay_so() -> None:
    cache, _ = moving(lambda: pages.zeros((4, SIZE), np.dtype(np.uint8)))
    cache[:] = 1
    collapse([addresses(cache)])
    assert kilobytes(cache, "AnonHugePages") == 0


def test_a_system_that_does_not_let_it_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_PAGEMAP", "_MAPS", "_ALLOWED"):
        with monkeypatch.context() as patch:
            patch.setattr(huge_pages, name, tmp_path / "none")
            new, moved = moving(lambda: filled(2))
            assert moved == 0 and new[SIZE] == 0
    (tmp_path / "never").write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_ALLOWED", tmp_path / "never")
    assert not huge_pages._allowed()


def test_a_session_moves_its_weights_and_gives_the_same(tiny_bundles: TinyBundles, cli: Cli) -> None:
    words = ("run", tiny_bundles.branch, "The adapter", "--raw", "--max-tokens", 6)
    plain, done = cli(*words), cli(*words, "--huge-pages", "--resident")
    assert done.exit_code == 0 and done.stdout == plain.stdout
    assert "pages of 2 MB" in done.stderr and "pages of 2 MB" not in plain.stderr
    opened = Session.open(tiny_bundles.fp32, huge_pages=True)
    assert opened.graph.settings.huge and opened.graph.moved >= 0
    assert "12.6 MB of weights lie" in huge_pages.told(12_582_912)
    assert huge_pages.told(0).startswith("no weights could be moved")
