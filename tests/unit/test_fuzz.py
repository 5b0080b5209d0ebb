"""Every reader against inputs that are nearly right, and against those that failed once (scripts/fuzz)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import child
from tests.fuzzing.target import Seed, attempt
from tests.fuzzing.targets import ALL, SUITE

INPUTS = Path(__file__).parents[1] / "fuzzing" / "inputs"
FAILED_ONCE = sorted(INPUTS.glob("*/*.input*"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A prepared folder for each reader, made when it is first asked for."""
    return _Folders(tmp_path_factory.mktemp("fuzz"))


class _Folders(dict[str, Path]):
    def __init__(self, root: Path) -> None:
        self._root = root

    def __missing__(self, name: str) -> Path:
        self[name] = folder = self._root / name
        folder.mkdir()
        ALL[name].prepare(folder)
        return folder


@cache
def _seeds(name: str) -> list[Seed]:
    return ALL[name].seeds()


@pytest.mark.parametrize("name", SUITE)
def test_a_seed_reaches_the_reader(name: str, folders: dict[str, Path]) -> None:
    """Otherwise nothing behind the first check would be tested."""
    SUITE[name].read(_seeds(name)[0], folders[name])


@pytest.mark.parametrize("name", SUITE)
def test_what_is_nearly_right_is_read_or_refused_in_one_sentence(name: str, folders: dict[str, Path]) -> None:
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def one(draw: Random) -> None:
        attempt(SUITE[name], SUITE[name].input(_seeds(name), draw), folders[name])

    one()


@pytest.mark.parametrize("path", FAILED_ONCE, ids=[f"{path.parent.name}-{path.name}" for path in FAILED_ONCE])
def test_what_failed_once_is_read_or_refused_in_one_sentence(path: Path, tmp_path: Path) -> None:
    target = ALL[path.parent.name]
    target.prepare(tmp_path)
    attempt(target, child.saved(path), tmp_path)
