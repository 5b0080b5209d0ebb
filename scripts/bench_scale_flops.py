"""The operations that a merge and a calibrated export can't do without, multiplications and additions apart.

For a linear (o, i), o outputs and i inputs, and T tokens of calibration text in windows of w:

    merge            2 r o i              the delta's product of rank r
    forward          2 T o i              once for the model as trained, once behind rounded layers
    attention        2 T w h              likewise, of hidden size h: two products, half of each masked
    Gram matrices    T i i                an input: X~^T X~, symmetric
    moved            2 T i i              an input that several linears read: (X - X~)^T X~
    stream           4 T o i              o_proj and down_proj, alone at their inputs: W (X - X~)^T, and that
                                          and R - R~, the stream that W's product is added to, times X~
    factors          1/3 i i i            an input: one Cholesky factorisation, for compensation and target
    target           2 o i i              two triangular solves, and
                     2 o i i              W (X - X~)^T X~, where several linears read the input
    compensation     o i i                GPTQ: each column's error on all later ones
    refits           2 o i i              H W^T, once for all of them
    refit            o i i + 1/3 o b^3    scales of a row at once, b = i / 32 of them: T^T H T, a solve
    descent          2 o i i sweeps       H times what is left of W

Refit and descent are done `rounds` times, then a refit alone (docs/requantize.md). The search for scales
takes some 300 operations a weight, none of them in products; they aren't counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.bench_models import Size
from vera_edge.requantize.effort import Effort
from vera_edge.text.windows import WINDOW

_BLOCK = 32
_Shape = tuple[int, int]  # (out, in)


def merge(size: Size, rank: int) -> int:
    """Operations of the products of all deltas."""
    return 2 * rank * size.linear_weights


def calibrated_export(size: Size, effort: Effort) -> dict[str, float]:
    """Operations by part: forward, gram, factors, rounding; on the tokens of the effort."""
    groups, tokens = _groups(size), effort.tokens
    linears = list(size.shapes().values())
    weights = sum(out * inside for out, inside in linears)
    one = {
        "forward": 2 * (2 * tokens * weights + 2 * tokens * WINDOW * size.hidden),
        "gram": tokens * sum(map(_statistics, groups)),
        "factors": sum(map(_targets, groups)),
        "rounding": sum(_rounding(out, inside, effort) for out, inside in linears),
    }
    return {part: float(size.layers * value) for part, value in one.items()}


def _groups(size: Size) -> list[list[_Shape]]:
    """A layer's linears by the input that they read."""
    q, k, v, o, gate, up, down = size.shapes().values()
    return [[q, k, v], [o], [gate, up], [down]]


def _statistics(group: Sequence[_Shape]) -> int:
    """Of one input, for a token."""
    out, inside = group[0]
    return inside**2 + (4 * out * inside if len(group) == 1 else 2 * inside**2)


def _targets(group: Sequence[_Shape]) -> float:
    """The factor of one input's matrix, and the targets of the linears that read it."""
    inside = group[0][1]
    return inside**3 / 3 + (2 if len(group) == 1 else 4) * sum(out for out, _ in group) * inside**2


def _rounding(out: int, inside: int, effort: Effort) -> float:
    refit = out * inside**2 + 1 / 3 * out * (inside / _BLOCK) ** 3
    descent = 2 * out * inside**2 * effort.sweeps
    return 3 * out * inside**2 + effort.rounds * (refit + descent) + refit
