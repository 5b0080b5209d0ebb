"""The compiled loops. Arrays are float32 and transposed: a row is an input, a column an output (a "lane").

Lanes don't depend on each other, and every loop runs over neighbouring ones innermost. `table`: the levels of
a code book in order, `bounds`: the middles between them; both empty for integers, whose codes end at `top`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vera_edge.arrays import Float32, Float64
from vera_edge.requantize.compiled import compiled

_LANES = 64
_TINY = np.float32(1e-30)
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def _reciprocals(scales: Float32, found: Float32) -> None:
    """1 / scales, and 0 for a scale of 0: a block of zeros stays one."""
    for lane in range(scales.size):
        scale = scales[lane]
        found[lane] = _ONE / scale if abs(scale) > _TINY else _ZERO


@compiled
def _nearest(scaled: Float32, zeros: Float32, table: Float32, bounds: Float32, top: Any) -> None:
    """Each value of `scaled`, in units of its scale, becomes the nearest level."""
    if table.size == 0:
        for lane in range(scaled.size):
            low = -zeros[lane]
            scaled[lane] = min(max(np.rint(scaled[lane]), low), top + low)
    else:
        for lane in range(scaled.size):
            value = scaled[lane]
            level = table[0]
            for index in range(bounds.size):
                level = table[index + 1] if value > bounds[index] else level
            scaled[lane] = level


@compiled
def _add_products(total: Float32, factors: Float32, values: Float32) -> None:
    """total (lanes,) += factors (n,) @ values (n, lanes), in a fixed order."""
    count = factors.size
    whole = count - count % 4
    for index in range(0, whole, 4):
        a, b, c, d = factors[index], factors[index + 1], factors[index + 2], factors[index + 3]
        first, second, third, fourth = values[index], values[index + 1], values[index + 2], values[index + 3]
        for lane in range(total.size):
            total[lane] += (a * first[lane] + b * second[lane]) + (c * third[lane] + d * fourth[lane])
    for index in range(whole, count):
        a, first = factors[index], values[index]
        for lane in range(total.size):
            total[lane] += a * first[lane]


@compiled
def round_columns(
    aims: Float32,
    weights: Float32,
    levels: Float32,
    residuals: Float32,
    shares: Float32,
    costs: Float32,
    scales: Float32,
    zeros: Float32,
    blocks: Any,
    table: Float32,
    bounds: Float32,
    top: Any,
    errors: Float64,
) -> None:
    """Round n inputs one after the other, each aiming to make up for the errors of those before it.

    aims (n, lanes): what each would be rounded to but for the errors among these n; used up. shares (n, n):
    row i, before the diagonal: how much of each earlier error goes into aim i. costs (n,): of a miss of an
    aim. scales, zeros (blocks, lanes); blocks (n,): which of them is input i's. Writes levels, residuals
    (weights less what they became), and adds to errors (lanes,).
    """
    lanes = aims.shape[1]
    values = np.empty(_LANES, np.float32)
    inverses = np.empty(_LANES, np.float32)
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        value, inverse = values[: end - begin], inverses[: end - begin]
        for index in range(aims.shape[0]):
            aim = aims[index, begin:end]
            scale, zero = scales[blocks[index], begin:end], zeros[blocks[index], begin:end]
            weight, level = weights[index, begin:end], levels[index, begin:end]
            residual, error, cost = residuals[index, begin:end], errors[begin:end], costs[index]
            _add_products(aim, shares[index, :index], residuals[:index, begin:end])
            _reciprocals(scale, inverse)
            for lane in range(aim.size):
                value[lane] = aim[lane] * inverse[lane]
            _nearest(value, zero, table, bounds, top)
            for lane in range(aim.size):
                chosen = value[lane] * scale[lane]
                miss = aim[lane] - chosen
                level[lane] = value[lane]
                residual[lane] = weight[lane] - chosen
                error[lane] += np.float64(cost * (miss * miss))


@compiled
def free_columns(aims: Float32, weights: Float32, residuals: Float32, shares: Float32) -> None:
    """As `round_columns`, of weights that may take any value: aims become what they would take."""
    lanes = aims.shape[1]
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        for index in range(aims.shape[0]):
            aim, weight = aims[index, begin:end], weights[index, begin:end]
            residual = residuals[index, begin:end]
            _add_products(aim, shares[index, :index], residuals[:index, begin:end])
            for lane in range(aim.size):
                residual[lane] = weight[lane] - aim[lane]


@compiled
def descend_columns(
    pulls: Float32,
    levels: Float32,
    residuals: Float32,
    steps: Float32,
    gram: Float32,
    scales: Float32,
    zeros: Float32,
    blocks: Any,
    table: Float32,
    bounds: Float32,
    top: Any,
    errors: Float64,
) -> None:
    """Give n inputs, one after the other, the level that is best with all others fixed.

    pulls (n, lanes): H times the residuals, but for steps among these n; used up. gram (n, n): their part of
    H. Other arrays as in `round_columns`; writes levels, residuals, steps (what values rose by) and takes
    what each step saves off errors.
    """
    lanes = pulls.shape[1]
    values = np.empty(_LANES, np.float32)
    inverses = np.empty(_LANES, np.float32)
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        value, inverse = values[: end - begin], inverses[: end - begin]
        for index in range(pulls.shape[0]):
            pull, step = pulls[index, begin:end], steps[index, begin:end]
            scale, zero = scales[blocks[index], begin:end], zeros[blocks[index], begin:end]
            level, residual = levels[index, begin:end], residuals[index, begin:end]
            error, cost = errors[begin:end], gram[index, index]
            # Steps are kept with their sign turned, so that here they are added.
            _add_products(pull, gram[index, :index], steps[:index, begin:end])
            _reciprocals(scale, inverse)
            for lane in range(pull.size):
                value[lane] = level[lane] + pull[lane] * inverse[lane] / cost
            _nearest(value, zero, table, bounds, top)
            for lane in range(pull.size):
                rise = (value[lane] - level[lane]) * scale[lane]
                saved = rise * (pull[lane] + pull[lane] - rise * cost)
                better = saved > _ZERO
                step[lane] = -rise if better else _ZERO
                level[lane] = value[lane] if better else level[lane]
                residual[lane] += step[lane]
                error[lane] -= np.float64(saved) if better else np.float64(0)


@compiled
def subtract(weights: Float32, levels: Float32, scales: Float32, blocks: Any, residuals: Float32) -> None:
    """residuals = weights - levels * scales, all (n, lanes) but scales (blocks, lanes)."""
    for index in range(weights.shape[0]):
        scale = scales[blocks[index]]
        weight, level, residual = weights[index], levels[index], residuals[index]
        for lane in range(weight.size):
            residual[lane] = weight[lane] - level[lane] * scale[lane]


@compiled
def add_to_normal(products: Float32, levels: Float32, width: int, row: int, first: int, matrix: Any) -> None:
    """matrix[lane, row, first + k] = the sum of products * levels over the k-th `width` inputs of n.

    products, levels (n, lanes); matrix (lanes, blocks, blocks).
    """
    count, lanes = products.shape
    blocks = -(-count // width)
    sums = np.empty((blocks, _LANES), np.float32)
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        sums[:] = _ZERO
        for index in range(count):
            total = sums[index // width]
            product, level = products[index, begin:end], levels[index, begin:end]
            for lane in range(end - begin):
                total[lane] += product[lane] * level[lane]
        for lane in range(begin, end):
            for block in range(blocks):
                matrix[lane, row, first + block] = sums[block, lane - begin]


@compiled
def finish_normal(matrix: Any, ridge: Any, ridges: Float32) -> None:
    """Mirror what lies above the diagonals of matrix (lanes, n, n); add `ridge` times the mean diagonal.

    Writes what was added to ridges (lanes,).
    """
    size = matrix.shape[1]
    for lane in range(matrix.shape[0]):
        one = matrix[lane]
        total = np.float64(0)
        for row in range(size):
            total += np.float64(one[row, row])
            for column in range(row + 1, size):
                one[column, row] = one[row, column]
        ridges[lane] = np.float32(ridge * total / size) + _TINY
        for row in range(size):
            one[row, row] += ridges[lane]


@compiled
def _offer(
    weights: Float32,
    costs: Float32,
    scales: Float32,
    zeros: Float32,
    table: Float32,
    bounds: Float32,
    top: Any,
    work: Float32,
    best: Float32,
) -> None:
    """Take a block's scales and zero points (lanes,) where they beat the best, after least squares."""
    size = scales.size
    value, product, energy, inverse = (
        work[0, :size],
        work[1, :size],
        work[2, :size],
        work[3, :size],
    )
    product[:] = _ZERO
    energy[:] = _ZERO
    _reciprocals(scales, inverse)
    for index in range(weights.shape[0]):
        weight, cost = weights[index], costs[index]
        for lane in range(size):
            value[lane] = weight[lane] * inverse[lane]
        _nearest(value, zeros, table, bounds, top)
        for lane in range(size):
            costly = value[lane] * cost[lane]
            product[lane] += weight[lane] * costly
            energy[lane] += value[lane] * costly
    for lane in range(size):
        fitted = product[lane] / max(energy[lane], _TINY)
        gain = product[lane] * fitted
        if gain > best[0, lane]:
            best[0, lane], best[1, lane], best[2, lane] = gain, fitted, zeros[lane]


@compiled
def search_block(
    weights: Float32,
    costs: Float32,
    factors: Float32,
    turns: int,
    middle: Any,
    top: Any,
    kind: int,
    table: Float32,
    bounds: Float32,
    scales: Float32,
    zeros: Float32,
) -> None:
    """The best scale and zero point of one block in every lane, written to scales and zeros (lanes,).

    weights, costs (n, lanes). kind: 0 a code book, 1 integers with zero points, 2 integers about `middle`,
    3 the same, with as many codes on either side. factors: by which the block's range is stretched.
    """
    lanes = weights.shape[1]
    works, bests = np.empty((6, _LANES), np.float32), np.empty((3, _LANES), np.float32)
    lows, highs = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        size = end - begin
        weight, cost, work = weights[:, begin:end], costs[:, begin:end], works[:, :size]
        best, low, high = bests[:, :size], lows[:size], highs[:size]
        scale, zero = works[4, :size], works[5, :size]
        best[0] = -_ONE
        best[1] = _ZERO
        best[2] = _ZERO
        low[:] = _ZERO
        high[:] = _ZERO
        for index in range(weight.shape[0]):
            one = weight[index]
            for lane in range(size):
                low[lane], high[lane] = min(low[lane], one[lane]), max(high[lane], one[lane])
        for factor in factors:
            for side in range(2):
                if kind == 1:
                    for lane in range(size):
                        scale[lane] = (high[lane] - low[lane]) * (factor / top)
                        inverse = _ONE / scale[lane] if scale[lane] > _TINY else _ZERO
                        exact = -low[lane] * factor * inverse
                        rounded = np.floor(exact) if side == 0 else np.ceil(exact)
                        zero[lane] = min(max(rounded, _ZERO), top)
                elif side == 1 and kind != 2:
                    break
                else:
                    # The negative side has one code more: it is tried on either side.
                    reach = np.float32(1) if kind == 0 else middle if side == 0 else middle - top
                    for lane in range(size):
                        largest = max(high[lane], -low[lane])
                        sign = _ONE if kind != 2 or -low[lane] >= largest else -_ONE
                        scale[lane] = largest * (factor / reach) * sign
                        zero[lane] = _ZERO if kind == 0 else middle
                _offer(weight, cost, scale, zero, table, bounds, top, work, best)
        for _turn in range(turns):
            for lane in range(size):
                scale[lane], zero[lane] = best[1, lane], best[2, lane]
            _offer(weight, cost, scale, zero, table, bounds, top, work, best)
        for lane in range(size):
            scales[begin + lane], zeros[begin + lane] = best[1, lane], best[2, lane]
