"""The compiled loops of rounding and search.

Arrays are float32 and transposed: a row is an input, a column an output (a "lane"). Lanes don't depend on
each other, and every loop runs over neighbouring ones innermost. `table`: the levels of a code book in order,
`bounds`: the middles between them; both empty for integers, whose codes end at `top`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vera_edge.arrays import Float32, Float64
from vera_edge.requantize.compiled import compiled

_LANES = 256  # at a time; fewer cost more calls, more leave the first cache
_TINY = np.float32(1e-30)
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def _reciprocals(scales: Float32, found: Float32) -> None:
    """1 / scales, and 0 for a scale of 0: a block of zeros stays one."""
    for lane in range(scales.size):
        scale = scales[lane]
        found[lane] = _ONE / scale if abs(scale) > _TINY else _ZERO


@compiled
def _nearest(
    scaled: Float32, zeros: Float32, table: Float32, bounds: Float32, top: Any, found: Float32
) -> None:
    """The level nearest to each value of `scaled`, which is in units of its scale."""
    if table.size == 0:
        # Comparisons and not min and max, which numba doesn't turn into vector instructions.
        for lane in range(scaled.size):
            low = -zeros[lane]
            high = top + low
            level = np.rint(scaled[lane])
            level = level if level > low else low
            found[lane] = level if level < high else high
    else:
        for lane in range(scaled.size):
            found[lane] = table[0]
        for index in range(bounds.size):
            bound, above = bounds[index], table[index + 1]
            for lane in range(scaled.size):
                found[lane] = above if scaled[lane] > bound else found[lane]


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
    works = np.empty((3, _LANES), np.float32)
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        value, inverse, scaled = works[0, : end - begin], works[1, : end - begin], works[2, : end - begin]
        for index in range(aims.shape[0]):
            aim = aims[index, begin:end]
            scale, zero = scales[blocks[index], begin:end], zeros[blocks[index], begin:end]
            weight, level = weights[index, begin:end], levels[index, begin:end]
            residual, error, cost = residuals[index, begin:end], errors[begin:end], costs[index]
            _add_products(aim, shares[index, :index], residuals[:index, begin:end])
            _reciprocals(scale, inverse)
            for lane in range(aim.size):
                scaled[lane] = aim[lane] * inverse[lane]
            _nearest(scaled, zero, table, bounds, top, value)
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
    works = np.empty((3, _LANES), np.float32)
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        value, inverse, scaled = works[0, : end - begin], works[1, : end - begin], works[2, : end - begin]
        for index in range(pulls.shape[0]):
            pull, step = pulls[index, begin:end], steps[index, begin:end]
            scale, zero = scales[blocks[index], begin:end], zeros[blocks[index], begin:end]
            level, residual = levels[index, begin:end], residuals[index, begin:end]
            error, cost = errors[begin:end], gram[index, index]
            # Steps are kept with their sign turned, so that here they are added.
            _add_products(pull, gram[index, :index], steps[:index, begin:end])
            _reciprocals(scale, inverse)
            for lane in range(pull.size):
                scaled[lane] = level[lane] + pull[lane] * inverse[lane] / cost
            _nearest(scaled, zero, table, bounds, top, value)
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
def _offer(
    weights: Float32,
    costs: Float32,
    scales: Float32,
    zeros: Float32,
    table: Float32,
    bounds: Float32,
    top: Any,
    works: Float32,
    bests: Float32,
    begin: int,
) -> None:
    """Take scales and zero points of lanes from `begin` on where they beat the best, after least squares."""
    size = scales.size
    end = begin + size
    product, energy, inverse = works[0, :size], works[1, :size], works[2, :size]
    scaled, level = works[3, :size], works[4, :size]
    for lane in range(size):
        product[lane], energy[lane] = _ZERO, _ZERO
    _reciprocals(scales, inverse)
    for index in range(weights.shape[0]):
        weight, cost = weights[index, begin:end], costs[index, begin:end]
        for lane in range(size):
            scaled[lane] = weight[lane] * inverse[lane]
        _nearest(scaled, zeros, table, bounds, top, level)
        for lane in range(size):
            costly = level[lane] * cost[lane]
            product[lane] += weight[lane] * costly
            energy[lane] += level[lane] * costly
    for lane in range(size):
        fitted = product[lane] / (energy[lane] if energy[lane] > _TINY else _TINY)
        gain = product[lane] * fitted
        if gain > bests[0, lane]:
            bests[0, lane], bests[1, lane], bests[2, lane] = gain, fitted, zeros[lane]


@compiled
def _candidate(
    low: Float32,
    high: Float32,
    factor: Any,
    side: int,
    middle: Any,
    top: Any,
    least: Any,
    kind: int,
    scale: Float32,
    zero: Float32,
) -> None:
    """Scales and zero points that stretch the ranges of blocks, low to high (lanes,), by a factor.

    side: of two, below or above the exact zero point; or which side reaches the end of the range.
    """
    if kind == 1:
        for lane in range(scale.size):
            scale[lane] = (high[lane] - low[lane]) * (factor / top)
            inverse = _ONE / scale[lane] if scale[lane] > _TINY else _ZERO
            exact = -low[lane] * factor * inverse
            rounded = np.floor(exact) if side == 0 else np.ceil(exact)
            zero[lane] = min(max(rounded, least), top)
        return
    # The negative side has one code more: it is tried on either side, as is a code book that isn't symmetric.
    book = kind == 0 or kind == 4
    reach = _ONE if book else middle if side == 0 else middle - top
    for lane in range(scale.size):
        largest = max(high[lane], -low[lane])
        sign = _ONE if kind != 2 or -low[lane] >= largest else -_ONE
        sign = -sign if kind == 4 and side == 1 else sign
        scale[lane] = largest * (factor / reach) * sign
        zero[lane] = _ZERO if book else middle


@compiled
def search_block(
    weights: Float32,
    costs: Float32,
    factors: Float32,
    turns: int,
    middle: Any,
    top: Any,
    least: Any,
    kind: int,
    table: Float32,
    bounds: Float32,
    scales: Float32,
    zeros: Float32,
) -> None:
    """The best scale and zero point of one block in every lane, written to scales and zeros (lanes,).

    weights, costs (n, lanes). kind: 0 a code book, 1 integers with zero points, 2 integers about `middle`,
    3 the same, with as many codes on either side, 4 a code book that isn't the same on both. factors: by
    which the block's range is stretched. least: the least zero point.
    """
    lanes = weights.shape[1]
    works, bests = np.empty((7, _LANES), np.float32), np.empty((3, _LANES), np.float32)
    lows, highs = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for begin in range(0, lanes, _LANES):
        end = min(begin + _LANES, lanes)
        size = end - begin
        low, high = lows[:size], highs[:size]
        scale, zero = works[5, :size], works[6, :size]
        for lane in range(size):
            bests[0, lane], bests[1, lane], bests[2, lane] = -_ONE, _ZERO, _ZERO
            low[lane], high[lane] = _ZERO, _ZERO
        for index in range(weights.shape[0]):
            weight = weights[index, begin:end]
            for lane in range(size):
                low[lane] = min(low[lane], weight[lane])
                high[lane] = max(high[lane], weight[lane])
        for factor in factors:
            for side in range(1 if kind == 0 or kind == 3 else 2):
                _candidate(low, high, factor, side, middle, top, least, kind, scale, zero)
                _offer(weights, costs, scale, zero, table, bounds, top, works, bests, begin)
        for _turn in range(turns):
            for lane in range(size):
                scale[lane], zero[lane] = bests[1, lane], bests[2, lane]
            _offer(weights, costs, scale, zero, table, bounds, top, works, bests, begin)
        for lane in range(size):
            scales[begin + lane], zeros[begin + lane] = bests[1, lane], bests[2, lane]
