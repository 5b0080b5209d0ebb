"""What can be won back from a requantized base, and a side-branch's vectors refitted to it, in closed form.

A branch gives `diag(lambda_b) B diag(lambda_d) A x`, with A and B fixed. Where the base W became Q, it should
give what is left to the model as trained, `L = target - Q`; the output error is `tr((L - D) H (L - D)^T)`
for the branch D and `H = X^T X / n` over the layer's inputs. It is quadratic in lambda_b with lambda_d fixed,
row by row, and in lambda_d with lambda_b fixed. Only the vectors change: kilobytes beside a base that stays.
What a layer of the graph can be given besides is in correction.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections
from vera_edge.adapters.reading import title_of
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Float32, Float64
from vera_edge.errors import PlanError
from vera_edge.requantize import CALIBRATED
from vera_edge.requantize.gram import Gram, one_blas_thread

VECTORS = ("lambda_b", "lambda_d")
LOW_RANK, BIAS = "low-rank", "bias"
PARTS = (*VECTORS, f"{LOW_RANK}=RANK", BIAS)
# Pull towards the trained vectors, relative to the mean diagonal: what the text says little about stays.
_RIDGE = 0.01
_TURNS = 2
_MOST_RANK = 1024


@dataclass(frozen=True)
class Recovery:
    """What is to be won back. vectors: of VECTORS, to be refitted. rank: of the low-rank term, or 0."""

    vectors: tuple[str, ...] = ()
    rank: int = 0
    bias: bool = False

    @property
    def corrects(self) -> bool:
        """Whether layers get something beside their weight that a graph must have a place for."""
        return self.bias or self.rank > 0


def parse(parts: Sequence[str]) -> Recovery:
    """`lambda_b`, `lambda_d`, `low-rank=RANK` and `bias`. Raises PlanError for anything else."""
    vectors, rank = [], 0
    for part in parts:
        name, _, value = part.partition("=")
        if name == LOW_RANK and value.isdecimal() and 0 < int(value) <= _MOST_RANK:
            rank = int(value)
        elif part in VECTORS:
            vectors.append(part)
        elif part != BIAS:
            raise PlanError(f"{part!r} can't be recovered; choose from {', '.join(PARTS)}")
    return Recovery(tuple(vectors), rank, BIAS in parts)


def check(
    parts: Sequence[str], adapters: Sequence[tuple[Adapter, float]], merged: bool, method: str
) -> Recovery:
    """`parse`; raises PlanError where that can't be had: vectors are one branch's, all needs statistics."""
    asked = parse(parts)
    if asked.vectors and merged:
        raise PlanError("a merged adapter has no vectors left to refit; recover needs --mode branch for them")
    if parts and method not in CALIBRATED:
        raise PlanError(f"recover needs calibration statistics, which {method} doesn't gather; use gptq")
    if asked.vectors and (len(adapters) != 1 or adapters[0][1] == 0):
        raise PlanError("vectors are refitted for one adapter at a time, with a weight that isn't 0")
    if asked.vectors and not adapters[0][0].is_vera:
        raise PlanError(
            f"{adapters[0][0].path} is an adapter of {title_of(adapters[0][0])}, and only VeRA's vectors are "
            f"refitted; recover takes {LOW_RANK}=RANK and {BIAS} for it"
        )
    return asked


def refit(
    vectors: LambdaVectors,
    left: Float32,
    projections: Projections,
    gram: Gram,
    parts: Sequence[str] = VECTORS,
) -> LambdaVectors:
    """The vectors of `parts` that bring the branch closest to `left` (out, in), the others as they are.

    With both, they take turns. The damping in `gram` and a pull towards the trained values keep what the
    calibration text hardly touches. Raises MismatchError when a size doesn't fit the projections.
    """
    projections.check(vectors.lambda_b, vectors.lambda_d, left.shape[1])
    found = vectors
    with one_blas_thread():
        for _ in range(_TURNS if len(set(parts)) > 1 else 1):
            if "lambda_b" in parts:
                found = LambdaVectors(
                    _lambda_b(vectors, found.lambda_d, left, projections, gram), found.lambda_d
                )
            if "lambda_d" in parts:
                found = LambdaVectors(
                    found.lambda_b, _lambda_d(vectors, found.lambda_b, left, projections, gram)
                )
    return found


def _lambda_b(
    trained: LambdaVectors, lambda_d: Float32, left: Float32, projections: Projections, gram: Gram
) -> Float32:
    """Row by row: b = (L_i H C_i) / (C_i H C_i) for rows C = B diag(d) A."""
    rows = projections.delta(np.ones_like(trained.lambda_b), lambda_d, left.shape[1])
    seen = rows @ gram.values
    energy = (seen * rows).sum(axis=1, dtype=np.float64)
    ridge = _RIDGE * energy.mean() + np.finfo(np.float32).tiny
    wanted = (seen * left).sum(axis=1, dtype=np.float64) + ridge * trained.lambda_b
    found: Float32 = (wanted / (energy + ridge)).astype(np.float32)
    return found


def _lambda_d(
    trained: LambdaVectors, lambda_b: Float32, left: Float32, projections: Projections, gram: Gram
) -> Float32:
    """All at once: ((B^T diag(b)^2 B) * (A H A^T)) d = diag(B^T diag(b) L H A^T)."""
    b = (lambda_b[:, None] * projections.b[: left.shape[0]]).astype(np.float64)
    a = projections.a[:, : left.shape[1]]
    seen = (a @ gram.values).astype(np.float64)
    matrix: Float64 = (b.T @ b) * (seen @ a.T)
    wanted: Float64 = ((b.T @ left) * seen).sum(axis=1)
    ridge = _RIDGE * float(np.trace(matrix)) / len(matrix) + np.finfo(np.float32).tiny
    matrix[np.diag_indices_from(matrix)] += ridge
    found: Float32 = np.linalg.solve(matrix, wanted + ridge * trained.lambda_d).astype(np.float32)
    return found
