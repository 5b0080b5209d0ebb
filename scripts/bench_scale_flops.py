"""The operations that a merge and a calibrated export can't do without, multiplications and additions apart.

For a linear (o, i), o outputs and i inputs, and T tokens of calibration text in windows of w:

    merge            2 r o i              the delta's product of rank r
    forward          2 T o i              once for the model as trained, once behind rounded layers
    attention        2 T w h              a layer of hidden size h: two products, half of each masked
    Gram matrices    3 T i i              an input: X~^T X~, symmetric, and X^T X~; q, k and v read one input,
                                          gate and up another
    stream           2 T o i              (R - R~)^T X~, where the output is added to the hidden states
    factors          1/3 i i i            an input: one Cholesky factorisation, for compensation and target
    target           4 o i i              W (X^T X~)(X~^T X~)^-1: a product and two triangular solves
    compensation     o i i                GPTQ: each column's error on all later ones
    refits           2 o i i              H W^T, once for all of them
    refit            o i i + 1/3 o b^3    scales of a row at once, b = i / 32 of them: T^T H T, a solve
    descent          2 o i i sweeps       H times what is left of W

Refit and descent are done `rounds` times, then a refit alone (docs/requantize.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scripts.bench_models import Size

_WINDOW, _BLOCK = 256, 32


@dataclass(frozen=True)
class Effort:
    """What a calibrated export does. tokens: of calibration text; rounds, sweeps: see above."""

    tokens: int = 16_384
    rounds: int = 2
    sweeps: int = 2


# By the name of --effort, as vera_edge/requantize/effort.py has them.
EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(4096, 0, 0),
    "default": Effort(),
    "thorough": Effort(32_768, 3, 2),
}


def merge(size: Size, rank: int) -> int:
    """Operations of the products of all deltas."""
    return 2 * rank * size.linear_weights


def calibrated_export(size: Size, effort: Effort) -> dict[str, float]:
    """Operations by part: forward, gram, factors, rounding."""
    shapes, tokens = size.shapes(), effort.tokens
    linears = list(shapes.values())
    weights = sum(out * inside for out, inside in linears)
    attention = 2 * tokens * _WINDOW * size.hidden
    added = [shapes["self_attn.o_proj"], shapes["mlp.down_proj"]]
    stream = sum(2 * tokens * out * inside for out, inside in added)
    gram = sum(3 * tokens * inside**2 for inside in _inputs(size)) + stream
    factors = sum(1 / 3 * inside**3 for inside in _inputs(size))
    one = {
        "forward": 2 * (2 * tokens * weights + attention),
        "gram": gram,
        "factors": factors + sum(4 * out * inside**2 for out, inside in linears),
        "rounding": sum(_rounding(out, inside, effort) for out, inside in linears),
    }
    return {part: float(size.layers * value) for part, value in one.items()}


def _inputs(size: Size) -> Iterator[int]:
    """The widths of a layer's distinct inputs: of q, k, v; of o; of gate and up; of down."""
    yield from (size.hidden, size.hidden, size.hidden, size.inner)


def _rounding(out: int, inside: int, effort: Effort) -> float:
    refit = out * inside**2 + 1 / 3 * out * (inside / _BLOCK) ** 3
    descent = 2 * out * inside**2 * effort.sweeps
    return 3 * out * inside**2 + effort.rounds * (refit + descent) + refit
