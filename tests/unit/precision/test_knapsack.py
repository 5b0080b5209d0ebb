"""The knapsack against every choice there is, on cases small enough to try them all."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vera_edge.precision.knapsack import Front, Option, front, least_loss, least_size

LOSSES = st.floats(0, 1).map(lambda value: round(value, 4))
OPTIONS = st.builds(Option, st.integers(1, 60), LOSSES)
UNITS = st.lists(st.lists(OPTIONS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)
CLOSE = 1e-9


def every(units: list[tuple[Option, ...]]) -> list[tuple[int, float]]:
    """Size and loss of every choice."""
    return [(sum(o.size for o in choice), sum(o.loss for o in choice)) for choice in product(*units)]


def picked(found: Front, point: int) -> tuple[int, float]:
    """Size and loss of a point, from the options it says were picked."""
    chosen = [unit[place] for unit, place in zip(found.units, found.picks(point), strict=True)]
    return sum(o.size for o in chosen), sum(o.loss for o in chosen)


@given(UNITS, st.integers(0, 360))
def test_within_a_size_nothing_loses_less(units: list[tuple[Option, ...]], limit: int) -> None:
    found = front(units)
    point, best = found.within_size(limit), [loss for size, loss in every(units) if size <= limit]
    if point is None:
        assert not best
        return
    size, loss = picked(found, point)
    assert size == found.sizes[point] <= limit and loss == pytest.approx(found.losses[point])
    assert loss == pytest.approx(min(best)) and found.loss_gap(point) == 0


@given(UNITS, st.floats(0, 6))
def test_within_a_loss_nothing_is_smaller(units: list[tuple[Option, ...]], limit: float) -> None:
    found = front(units)
    point, best = found.within_loss(limit), [size for size, loss in every(units) if loss <= limit - CLOSE]
    if point is None:
        assert not best
        return
    size, loss = picked(found, point)
    assert loss <= limit + CLOSE and size <= min(best, default=size)
    assert size >= min(size for size, loss in every(units) if loss <= limit + CLOSE)


@given(UNITS)
def test_the_front_is_monotone(units: list[tuple[Option, ...]]) -> None:
    found = front(units)
    assert found.exact and len(found) == len(found.sizes) == len(found.losses)
    assert all(left < right for left, right in pairwise(found.sizes))
    assert all(left > right for left, right in pairwise(found.losses))
    assert found.sizes[0] == sum(min(option.size for option in unit) for unit in units)


@given(UNITS, st.integers(0, 360))
def test_the_bounds_lie_below_every_choice(units: list[tuple[Option, ...]], limit: int) -> None:
    for size, loss in every(units):
        assert least_loss(units, size) <= loss + CLOSE
        assert least_size(units, loss) <= size + 1e-6


@given(UNITS, st.integers(2, 6), st.integers(0, 360))
def test_a_thinned_front_says_how_far_off_it_can_be(
    units: list[tuple[Option, ...]], cap: int, limit: int
) -> None:
    found = front(units, cap)
    assert len(found) <= cap
    point, choices = found.within_size(limit), every(units)
    if point is None:
        assert not any(size <= limit for size, _ in choices)
        return
    size, loss = picked(found, point)
    assert size == found.sizes[point] <= limit
    best = min(other for total, other in choices if total <= size)
    assert loss * (1 - found.loss_gap(point)) <= best + CLOSE
    smallest = min(total for total, other in choices if other <= loss + CLOSE)
    assert size * (1 - found.size_gap(point)) <= smallest + 1e-6


def test_120_units_of_alike_layers_are_solved_exactly() -> None:
    draw = np.random.default_rng(0)
    shapes = (300, 200, 900, 450) * 30
    units = [
        (Option(5 * shape, float(draw.exponential(1e-3))), Option(9 * shape, float(draw.exponential(1e-5))))
        for shape in shapes
    ]
    found = front(units)
    assert found.exact
    point = found.within_size(6 * sum(shapes))
    assert point is not None
    size, loss = picked(found, point)
    assert size <= 6 * sum(shapes) and loss == pytest.approx(found.losses[point])
    # With so many small units the relaxation is nearly tight.
    assert least_loss(units, 6 * sum(shapes)) <= loss < 1.02 * least_loss(units, 6 * sum(shapes))


def test_many_different_sizes_are_solved_nearly() -> None:
    draw = np.random.default_rng(1)
    sizes = draw.integers(1_000, 900_000, 40)
    units = [
        (
            Option(int(size), float(loss)),
            Option(int(1.3 * size), 0.1 * float(loss)),
            Option(int(2 * size), 0.0),
        )
        for size, loss in zip(sizes, 1e-9 * sizes * draw.uniform(0.9, 1.1, 40), strict=True)
    ]
    found = front(units, cap=500)
    point = found.within_size(1.4 * sizes.sum())
    assert not found.exact and point is not None
    assert 0 < found.loss_gap(point) < 0.1 and 0 < found.size_gap(point) < 0.05
