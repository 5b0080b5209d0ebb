"""Engines give the same results, pass errors on, and survive a worker that dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import foreign_code
from vera_edge.errors import PlanError, VeraEdgeError
from vera_edge.parallel import Engine


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    if number == 2:
        raise PlanError("two is refused")
    return number


def die_once(item: tuple[Path, int]) -> int:
    mark, number = item
    if number == 1 and not mark.exists():
        mark.touch()
        os._exit(9)
    return number


def die(number: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("engine", [Engine(), Engine(workers=2)])
def test_every_item_comes_back_once(engine: Engine) -> None:
    assert dict(engine.map(square, range(5))) == {number: number**2 for number in range(5)}


@pytest.mark.parametrize("engine", [Engine(), Engine(workers=2)])
def test_an_error_of_ours_passes_through(engine: Engine) -> None:
    with pytest.raises(PlanError, match="two is refused"):
        list(engine.map(refuse, range(4)))


def test_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    items = [(tmp_path / "mark", number) for number in range(4)]
    assert dict(Engine(workers=2).map(die_once, items)) == dict(enumerate(range(4)))


def test_workers_that_always_die_end_in_a_sentence() -> None:
    with pytest.raises(VeraEdgeError, match="died 3 times"):
        list(Engine(workers=2).map(die, range(2)))


@pytest.mark.parametrize(("kind", "workers"), [("dask", 1), ("local", 0)])
def test_engines_that_cannot_be(kind: str, workers: int) -> None:
    with pytest.raises(PlanError):
        Engine(kind, workers)


def test_a_clusters_address_is_for_a_cluster() -> None:
    with pytest.raises(PlanError, match="it needs --engine ray"):
        Engine(address="10.0.0.1:6379")


def test_workers_import_nothing_from_the_folder_they_start_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`multiprocessing` starts them by `python -c`, which looks there first."""
    folder = tmp_path / "folder"
    folder.mkdir()
    foreign_code.plant(folder, tmp_path / "marks")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert dict(Engine(workers=2).map(square, range(3))) == {0: 0, 1: 1, 2: 4}
    assert foreign_code.marks_in(tmp_path / "marks") == []
    assert "PYTHONSAFEPATH" not in os.environ
