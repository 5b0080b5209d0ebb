"""The loops of kernels.py in torch, a step of all rows for each column: for devices that numba can't reach.

Arrays, names and results are as there. Sums come in another order, so that codes may differ where two are
equally good.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
_TINY = 1e-30
_VALUES = 1 << 26  # of all candidates that are tried at once


def reciprocals(scales: Tensor) -> Tensor:
    """1 / scales, and 0 for a scale of 0."""
    return torch.where(scales.abs() > _TINY, 1 / scales, torch.zeros_like(scales))


def nearest(scaled: Tensor, zeros: Tensor, table: Tensor, bounds: Tensor, top: float) -> Tensor:
    """The level nearest to each value of `scaled`, which is in units of its scale."""
    if table.numel() == 0:
        return torch.minimum(torch.maximum(scaled.round(), -zeros), top - zeros)
    return table[torch.bucketize(scaled.contiguous(), bounds)]


def round_columns(
    aims: Tensor,
    weights: Tensor,
    levels: Tensor,
    residuals: Tensor,
    shares: Tensor,
    costs: Tensor,
    scales: Tensor,
    zeros: Tensor,
    blocks: Any,
    table: Tensor,
    bounds: Tensor,
    top: float,
    errors: Tensor,
) -> None:
    for index in range(len(aims)):
        aim = aims[index] + shares[index, :index] @ residuals[:index]
        scale, zero = scales[blocks[index]], zeros[blocks[index]]
        levels[index] = nearest(aim * reciprocals(scale), zero, table, bounds, top)
        chosen = levels[index] * scale
        residuals[index] = weights[index] - chosen
        errors += costs[index] * (aim - chosen).square()


def free_columns(aims: Tensor, weights: Tensor, residuals: Tensor, shares: Tensor) -> None:
    for index in range(len(aims)):
        aims[index] += shares[index, :index] @ residuals[:index]
        residuals[index] = weights[index] - aims[index]


def descend_columns(
    pulls: Tensor,
    levels: Tensor,
    residuals: Tensor,
    steps: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor,
    blocks: Any,
    table: Tensor,
    bounds: Tensor,
    top: float,
    errors: Tensor,
) -> None:
    for index in range(len(pulls)):
        pull = pulls[index] + gram[index, :index] @ steps[:index]
        scale, zero, cost = scales[blocks[index]], zeros[blocks[index]], gram[index, index]
        scaled = levels[index] + pull * reciprocals(scale) / cost
        value = nearest(scaled, zero, table, bounds, top)
        rise = (value - levels[index]) * scale
        saved = rise * (pull + pull - rise * cost)
        better = saved > 0
        steps[index] = torch.where(better, -rise, torch.zeros_like(rise))
        levels[index] = torch.where(better, value, levels[index])
        residuals[index] += steps[index]
        errors -= torch.where(better, saved, torch.zeros_like(saved))


def subtract(weights: Tensor, levels: Tensor, scales: Tensor, blocks: Any, residuals: Tensor) -> None:
    residuals.copy_(weights - levels * scales[torch.as_tensor(blocks, device=scales.device)])


def search_block(
    weights: Tensor,
    costs: Tensor,
    factors: Tensor,
    turns: int,
    middle: float,
    top: float,
    least: float,
    kind: int,
    table: Tensor,
    bounds: Tensor,
    scales: Tensor,
    zeros: Tensor,
) -> None:
    """As kernels.search_block, of all candidates at once; costs (n,)."""
    low, high = weights.amin(0).clamp(max=0), weights.amax(0).clamp(min=0)
    sides = range(1 if kind in (0, 3) else 2)
    offers = [_candidates(low, high, factors, side, middle, top, least, kind) for side in sides]
    # In the order of kernels.search_block: of two that are as good the first is taken.
    scale, zero = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*offers, strict=True))
    step = max(1, _VALUES // weights.numel())
    tried = [
        _offered(weights, costs, scale[at : at + step], zero[at : at + step], table, bounds, top)
        for at in range(0, len(scale), step)
    ]
    gain, fitted = (torch.cat(parts) for parts in zip(*tried, strict=True))
    best, at = gain.max(0)
    fitted, zero = fitted.gather(0, at[None])[0], zero.gather(0, at[None])[0]
    for _ in range(turns):
        gain, other = _offered(weights, costs, fitted[None], zero[None], table, bounds, top)
        fitted = torch.where(gain[0] > best, other[0], fitted)
        best = torch.maximum(best, gain[0])
    scales.copy_(fitted)
    zeros.copy_(zero)


def _offered(
    weights: Tensor, costs: Tensor, scale: Tensor, zero: Tensor, table: Tensor, bounds: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """Of candidates (n, rows): how much each explains after least squares, and the scale it then has."""
    scaled = weights * reciprocals(scale)[:, None]
    level = nearest(scaled, zero[:, None], table, bounds, top)
    costly = level * costs[:, None]
    product, energy = (weights * costly).sum(1), (level * costly).sum(1)
    fitted = product / energy.clamp(min=_TINY)
    return product * fitted, fitted


def _candidates(
    low: Tensor, high: Tensor, factors: Tensor, side: int, middle: float, top: float, least: float, kind: int
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (factors, rows), as kernels._candidate has them."""
    factor = factors[:, None]
    if kind == 1:
        scale = (high - low) * (factor / top)
        exact = -low * factor * torch.where(scale > _TINY, 1 / scale, torch.zeros_like(scale))
        return scale, (exact.floor() if side == 0 else exact.ceil()).clamp(least, top)
    book = kind in (0, 4)
    reach = 1.0 if book else middle if side == 0 else middle - top
    largest = torch.maximum(high, -low)
    one = torch.ones_like(largest)
    sign = torch.where(-low >= largest, one, -one) if kind == 2 else one
    sign = -sign if kind == 4 and side == 1 else sign
    return largest * (factor / reach) * sign, torch.full_like(largest * factor, 0.0 if book else middle)
