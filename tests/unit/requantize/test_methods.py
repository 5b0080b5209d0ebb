"""The methods: each step lowers the error it claims to lower, and the bytes don't depend on threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from tests.unit.requantize.test_grids import GRIDS, gram, normal
from vera_edge.arrays import Float32, Float64
from vera_edge.formats.nested import quantize_absmax
from vera_edge.requantize import Effort, Gram, Grid, output_error, requantize
from vera_edge.requantize.gptq import compensate, descend
from vera_edge.requantize.piece import Piece
from vera_edge.requantize.refit import NestedScales
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


def piece(weight: Float32, grid: Grid, prepared: Gram) -> Piece:
    """All of a weight as one piece, on searched scales."""
    return Piece(weight, grid, *search(weight, grid, prepared.importance), prepared)


def error_of(some: Piece, scales: Float32 | None = None) -> float:
    """A piece's output error from its levels, with other scales (rows, blocks) where they are given."""
    found = (some.scales if scales is None else scales.T)[some.blocks] * some.levels
    return output_error(some.weight.T, found.T, some.gram)


def nearest(scaled: Float64, grid: Grid, zero: Float32) -> Float64:
    """The nearest level by trying all."""
    every = np.unique(grid.levels_of(np.arange(grid.top + 1, dtype=np.uint8), np.zeros(1, np.float32)))
    levels = every - zero[..., None] if grid.integer else np.broadcast_to(every, (*scaled.shape, every.size))
    best = np.abs(scaled[..., None] - levels).argmin(axis=-1)
    return np.take_along_axis(levels, best[..., None], axis=-1)[..., 0].astype(np.float64)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int2", "int4", "int4-asymmetric", "int8-rows"])
def test_compensation_is_the_textbook_recursion(name: str, act_order: bool) -> None:
    """Against a plain loop over the inverse, from which each column is removed (OBQ, equations 2 and 3)."""
    grid, weight = GRIDS[name], normal(70, 96)
    prepared = Gram.of(gram(96), act_order=act_order)
    found = piece(weight, grid, prepared)
    compensate(found)

    left, inverse = weight.astype(np.float64), np.linalg.inv(prepared.values.astype(np.float64))
    expected = np.empty_like(weight)
    for column in prepared.order:
        block = found.blocks[column]
        scale, zero = found.scales[block].astype(np.float64), found.zeros[block]
        level = nearest(left[:, column] / scale, grid, zero)
        expected[:, column] = level
        error = (left[:, column] - level * scale) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert (expected == found.levels.T).mean() > 0.995  # float32 against float64, at ties


@pytest.mark.parametrize("inside", [32, 192, 256, 600])
def test_the_factor_is_that_of_the_gram_matrix(inside: int) -> None:
    prepared = Gram.of(gram(inside))
    root = prepared.feedback.astype(np.float64) * np.sqrt(prepared.conditional.astype(np.float64))
    np.testing.assert_allclose(root @ root.T, prepared.values, atol=2e-5)
    assert not np.tril(prepared.feedback, -1).any()
    # What is left once later inputs make up for it is the Schur complement: 1 / the inverse's diagonal.
    leading = [np.linalg.inv(prepared.values[k:, k:].astype(np.float64))[0, 0] for k in (0, inside // 2)]
    np.testing.assert_allclose(1 / prepared.conditional[[0, inside // 2]], leading, rtol=1e-3)


@pytest.mark.parametrize("inside", [64, 600])
@pytest.mark.parametrize("act_order", [False, True])
def test_equations_are_solved_by_the_factor(inside: int, act_order: bool) -> None:
    statistics, wanted = 7 * gram(inside), normal(5, inside)
    damped = statistics.astype(np.float64)
    damped[np.diag_indices(inside)] += 0.01 * np.trace(damped) / inside
    found = Gram.of(statistics, 0.01, act_order).solve(wanted)
    exact = np.linalg.solve(damped, wanted.T.astype(np.float64)).T
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()


def test_a_factor_too_near_to_singular_for_float32_is_made_in_float64() -> None:
    size = 64
    statistics = np.full((size, size), 1, np.float32) + np.eye(size, dtype=np.float32) * np.float32(1e-7)
    prepared = Gram.of(statistics, damp=1e-7)
    assert np.isfinite(prepared.feedback).all()


@ALL
@pytest.mark.parametrize("width", [64, 70])
def test_search_finds_what_numpy_does(grid: Grid, width: int) -> None:
    """Each candidate in turn, every block by itself, in float64."""
    weight, costs = normal(3, width), np.diag(gram(width)).copy()
    scales, zeros = search(weight, grid, costs)
    if not grid.rows(width):  # blocks run over row ends: one long row of them
        weight, costs = weight.reshape(1, -1), np.tile(costs, 3)
        scales, zeros = scales[None], zeros[None]
    at = grid.width(width)
    for row, values in enumerate(weight):
        for block, begin in enumerate(range(0, len(values), at)):
            part, cost = (some[begin : begin + at].astype(np.float64) for some in (values, costs))
            ours, _ = explained(part, cost, grid, scales[row, block], zeros[row, block])
            assert ours >= plain_search(part, cost, grid) * (1 - 1e-5)


def explained(part: Float64, cost: Float64, grid: Grid, scale: float, zero: float) -> tuple[float, float]:
    """How much of the weighted energy levels on this scale can explain, and the scale that does."""
    scaled = part / scale if scale else np.zeros_like(part)
    level = nearest(scaled, grid, np.full(part.shape, zero, np.float32))
    product, energy = (cost * part * level).sum(), (cost * level * level).sum()
    return (product**2 / energy, product / energy) if energy else (0.0, 0.0)


def plain_search(part: Float64, cost: Float64, grid: Grid) -> float:
    candidates: list[tuple[float, float]] = []
    largest = np.abs(part).max()
    for factor in np.linspace(0.5, 1.1, 13):
        if not grid.integer:
            candidates.append((largest * factor, 0))
        elif grid.symmetric:
            sides = [grid.middle] if grid.per_row else [-grid.middle, grid.top - grid.middle]
            candidates += [
                (sign * largest * factor / side, grid.middle) for side in sides for sign in (1, -1)
            ]
        else:
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) * factor / grid.top
            zeros = np.clip([np.floor(-low * factor / scale), np.ceil(-low * factor / scale)], 0, grid.top)
            candidates += [(scale, float(zero)) for zero in zeros]
    best, scale, zero = max((*explained(part, cost, grid, *one), one[1]) for one in candidates)
    for _ in range(3):
        best, scale = max((best, scale), explained(part, cost, grid, scale, zero))
    return best


def test_descent_never_raises_the_error_and_ends_where_no_single_weight_helps() -> None:
    grid, weight, prepared = GRIDS["nf4"], normal(24, 128), Gram.of(gram(128))
    some = piece(weight, grid, prepared)
    compensate(some)
    before = error_of(some)
    descend(some, sweeps=60)
    assert error_of(some) < before
    spread_scales = some.scales[some.blocks]
    residual = some.weight - some.levels * spread_scales
    best = some.levels + (prepared.values @ residual) / prepared.importance[:, None] / spread_scales
    assert (np.abs(grid.nearest(best, None) - some.levels) > 1e-6).mean() < 0.002


@pytest.mark.parametrize("name", ["nf4", "int4-asymmetric", "int8-rows"])
@pytest.mark.parametrize("inside", [100, 600])
def test_descent_is_the_plain_loop(name: str, inside: int) -> None:
    """Against float64, every weight in turn with a fresh product."""
    grid, weight, prepared = GRIDS[name], normal(70, inside), Gram.of(gram(inside))
    some = piece(weight, grid, prepared)
    compensate(some)
    wide, levels = prepared.values.astype(np.float64), some.levels.astype(np.float64)
    scales, zeros = some.scales.astype(np.float64)[some.blocks], some.zeros[some.blocks]
    descend(some)
    for column in range(inside):
        pull = wide[column] @ (some.weight - levels * scales)
        aim = levels[column] + pull / wide[column, column] / scales[column]
        levels[column] = nearest(aim, grid, zeros[column])
    assert (some.levels == levels).mean() > 0.995


@pytest.mark.parametrize("name", ["nf4", "int2", "int4", "int4-asymmetric", "int8-rows"])
def test_errors_are_kept_up_to_date(name: str) -> None:
    """What each step says that it changed, against the error from scratch in float64."""
    grid, weight, prepared = GRIDS[name], normal(70, 320), Gram.of(gram(320))
    some = piece(weight, grid, prepared)
    compensate(some, adapt=True)
    for step in ("compensated", "refit", "descended", "refit"):
        if step == "refit":
            some.refit()
        elif step == "descended":
            descend(some)
        left = (some.weight - some.levels * some.scales[some.blocks]).astype(np.float64)
        exact = (left * (prepared.values.astype(np.float64) @ left)).sum(axis=0)
        np.testing.assert_allclose(some.errors, exact, rtol=2e-4)
        np.testing.assert_allclose(some.residual, left, atol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "int4", "int4-asymmetric", "int8-rows"])
@pytest.mark.parametrize("inside", [128, 640])
def test_refit_is_the_least_squares_optimum(name: str, inside: int) -> None:
    grid = GRIDS[name]
    if grid.integer:
        inside -= 8  # a short block at the end
    weight, prepared = normal(24, inside), Gram.of(gram(inside))
    some = piece(weight, grid, prepared)
    compensate(some)
    best = some.normal().solve()
    for row in (0, 23):  # T^T H T and T^T H w, written out
        levels = np.zeros((inside, len(some.scales)))
        levels[np.arange(inside), some.blocks] = some.levels[:, row]
        wide = prepared.values.astype(np.float64)
        exact = np.linalg.lstsq(levels.T @ wide @ levels, levels.T @ wide @ weight[row], rcond=None)[0]
        np.testing.assert_allclose(best[row], exact, rtol=2e-3, atol=1e-5)
    assert error_of(some, best) <= error_of(some)
    for factor in (0.99, 1.01):
        for block in range(min(4, best.shape[1])):
            moved = best.copy()
            moved[:, block] *= factor
            assert error_of(some, moved) > error_of(some, best)


def test_double_quantized_scales_make_up_for_each_others_rounding() -> None:
    grid, weight, prepared = GRIDS["nf4-double"], normal(64, 512), Gram.of(gram(512))
    some = piece(weight, grid, prepared)
    compensate(some)
    normal_equations = some.normal()
    best = normal_equations.solve()
    nested = NestedScales(best)
    rows = slice(None)
    placed = normal_equations.place(best, lambda block, values: nested.nearest(values, (rows, block)))
    plain = nested.nearest(best, (rows, rows))
    assert error_of(some, placed) < error_of(some, plain)
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
