"""The methods: each step lowers the error it claims to lower, and the bytes don't depend on threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from tests.unit.requantize.test_grids import GRIDS, gram, normal
from vera_edge.formats.nested import quantize_absmax
from vera_edge.requantize import Effort, Gram, Grid, output_error, requantize
from vera_edge.requantize.gptq import compensate, descend
from vera_edge.requantize.gram import triangular_inverse
from vera_edge.requantize.grids import spread
from vera_edge.requantize.refit import NestedScales, Normal
from vera_edge.requantize.search import search

ALL = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
IN_ROWS = 192


@ALL
def test_each_method_beats_the_one_before(grid: Grid) -> None:
    weight, prepared = normal(96, IN_ROWS), Gram.of(gram(IN_ROWS))
    errors = {
        method: output_error(weight, requantize(weight, grid, method, prepared).dequantize(), prepared)
        for method in ("rtn", "search", "gptq")
    }
    assert errors["search"] <= errors["rtn"] * 1.001
    assert errors["gptq"] < 0.7 * errors["search"]


@ALL
def test_more_effort_never_costs(grid: Grid) -> None:
    weight, prepared = normal(64, IN_ROWS), Gram.of(gram(IN_ROWS))
    errors = [
        output_error(
            weight, requantize(weight, grid, "gptq", prepared, Effort(rounds=rounds)).dequantize(), prepared
        )
        for rounds in (0, 1, 3)
    ]
    assert errors[2] <= errors[1] * 1.0001 <= errors[0] * 1.0002


def test_weighted_search_lowers_the_weighted_error() -> None:
    grid, weight, prepared = GRIDS["int4-asymmetric"], normal(64, IN_ROWS), Gram.of(gram(IN_ROWS))

    def weighted(importance: Gram | None) -> float:
        restored = requantize(weight, grid, "search", importance).dequantize()
        return float((np.square(weight - restored) * prepared.importance).sum())

    assert weighted(prepared) < 0.97 * weighted(None)


def test_half_quadratic_lowers_the_forgiving_error() -> None:
    """What HQQ minimises, |W - Q|^0.7, falls below that of rounding, outliers or not."""
    weight = normal(64, IN_ROWS)
    weight[::7, ::31] *= 20
    for name in ("int4-asymmetric", "int4", "nf4"):
        errors = [
            float((np.abs(weight - requantize(weight, GRIDS[name], method).dequantize()) ** 0.7).sum())
            for method in ("hqq", "rtn")
        ]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("act_order", [False, True])
def test_compensation_is_the_textbook_recursion(act_order: bool) -> None:
    """Against a plain loop over the inverse, from which each column is removed (OBQ, equations 2 and 3)."""
    grid, weight = GRIDS["int4-asymmetric"], normal(16, 96)
    prepared = Gram.of(gram(96), act_order=act_order)
    scales, zeros = search(weight, grid, prepared.importance)
    found = compensate(weight, grid, scales, zeros, prepared)

    left, inverse = weight.astype(np.float64), np.linalg.inv(prepared.values.astype(np.float64))
    expected = np.empty_like(weight)
    for column in prepared.order:
        scale, zero = scales[:, column // 32], zeros[:, column // 32]
        level = np.clip(np.rint(left[:, column] / scale), -zero, 15 - zero)
        expected[:, column] = level
        error = (left[:, column] - level * scale) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert (found == expected).mean() > 0.995  # float32 against float64, at ties


def test_descent_never_raises_the_error_and_ends_where_no_single_weight_helps() -> None:
    grid, weight, prepared = GRIDS["nf4"], normal(24, 128), Gram.of(gram(128))
    scales, zeros = search(weight, grid, prepared.importance)
    levels = compensate(weight, grid, scales, zeros, prepared)
    before = output_error(weight, levels * spread(scales, grid, (24, 128)), prepared)
    final = descend(weight, levels, grid, scales, zeros, prepared, sweeps=60)
    after = output_error(weight, final * spread(scales, grid, (24, 128)), prepared)
    assert after < before
    residual = weight - final * spread(scales, grid, (24, 128))
    best = final + (residual @ prepared.values) / prepared.importance / spread(scales, grid, (24, 128))
    assert (np.abs(grid.nearest(best, None) - final) > 1e-6).mean() < 0.002


@pytest.mark.parametrize("name", ["nf4", "int4", "int4-asymmetric", "int8-rows"])
def test_refit_is_the_least_squares_optimum(name: str) -> None:
    grid, weight, prepared = GRIDS[name], normal(24, 128), Gram.of(gram(128))
    scales, zeros = search(weight, grid, prepared.importance)
    levels = compensate(weight, grid, scales, zeros, prepared)
    best = Normal(weight, levels, grid, scales, prepared).solve()

    def error(some: np.ndarray) -> float:
        return output_error(weight, levels * spread(some, grid, (24, 128)), prepared)

    assert error(best) <= error(scales)
    for factor in (0.99, 1.01):
        for block in range(best.shape[1]):
            moved = best.copy()
            moved[:, block] *= factor
            assert error(moved) > error(best)


def test_double_quantized_scales_make_up_for_each_others_rounding() -> None:
    grid, weight, prepared = GRIDS["nf4-double"], normal(64, 512), Gram.of(gram(512))
    scales, zeros = search(weight, grid, prepared.importance)
    levels = compensate(weight, grid, scales, zeros, prepared)
    normal_equations = Normal(weight, levels, grid, scales, prepared)
    best = normal_equations.solve()
    nested = NestedScales(best)
    rows = slice(None)
    placed = normal_equations.place(best, lambda block, values: nested.nearest(values, (rows, block)))
    plain = nested.nearest(best, (rows, rows))
    errors = [
        output_error(weight, levels * spread(some, grid, (64, 512)), prepared) for some in (placed, plain)
    ]
    assert errors[0] < errors[1]
    assert (nested.stored(placed).absmax().reshape(placed.shape) == placed).all()


def test_nested_scales_lie_on_the_grid_that_bitsandbytes_would_make() -> None:
    scales = np.abs(normal(40, 8)) + np.float32(0.01)
    ours, theirs = NestedScales(scales).stored(scales), quantize_absmax(scales.reshape(-1))
    assert ours.offset == theirs.offset
    assert (ours.scales == theirs.scales).all()
    assert (ours.codes == theirs.codes).mean() > 0.97  # theirs are found through a table of 65536 steps


@pytest.mark.parametrize("name", ["nf4-double", "int4-asymmetric"])
def test_the_same_bytes_whatever_the_threads(name: str) -> None:
    weight, statistics = normal(160, 384), gram(384)
    found = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            found.append(requantize(weight, GRIDS[name], "gptq", Gram.of(statistics)))
    for other in found[1:]:
        assert (other.codes == found[0].codes).all()
        assert (other.scales == found[0].scales).all()


@ALL
@pytest.mark.parametrize("method", ["rtn", "search", "hqq", "gptq"])
def test_rows_shared_out_among_threads_are_the_same_bytes(
    grid: Grid, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vera_edge.requantize.gram.available_cores", lambda: 4)
    monkeypatch.setattr("vera_edge.requantize.quantize.PIECE_VALUES", 24 * IN_ROWS)
    weight, matrix = normal(96, IN_ROWS), gram(IN_ROWS)
    one, four = (requantize(weight, grid, method, Gram.of(matrix), threads=count) for count in (1, 4))
    for name in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(one, name), getattr(four, name))


@pytest.mark.parametrize("size", [1, 7, 512, 700])
def test_the_triangular_inverse_is_the_inverse(size: int) -> None:
    lower = np.linalg.cholesky(gram(size).astype(np.float64) + np.eye(size)).astype(np.float64)
    found = triangular_inverse(lower)
    np.testing.assert_allclose(found, np.linalg.inv(lower), atol=1e-10)
    assert not np.triu(found, 1).any()


def test_pieces_of_rows_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, prepared = normal(50, 128), Gram.of(gram(128))
    whole = requantize(weight, GRIDS["int4"], "gptq", prepared)
    monkeypatch.setattr("vera_edge.requantize.quantize.PIECE_VALUES", 128 * 7)
    pieces = requantize(weight, GRIDS["int4"], "gptq", prepared)
    assert (whole.codes == pieces.codes).mean() > 0.999
    np.testing.assert_allclose(whole.scales, pieces.scales, rtol=1e-3)


def test_statistics_at_any_scale_and_dead_inputs() -> None:
    weight, statistics = normal(32, 64), gram(64)
    statistics[5], statistics[:, 5] = 0, 0
    codes = [
        requantize(weight, GRIDS["int4"], "gptq", statistics * factor).codes
        for factor in (np.float32(1), np.float32(1024))
    ]
    assert (codes[0] == codes[1]).all()
    assert np.abs(requantize(weight, GRIDS["int4"], "gptq", statistics).dequantize()[:, 5]).max() < 1


def test_act_order_goes_from_the_most_important_input() -> None:
    prepared = Gram.of(gram(64), act_order=True)
    assert (np.diff(prepared.importance[prepared.order]) <= 0).all()
    assert (replace(prepared, act_order=False).order == np.arange(64)).all()
