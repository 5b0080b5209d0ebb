"""What one adapter adds to one weight: a low-rank product, whose rows are computed as they are asked for."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vera_edge.adapters.adapter import LayerChange
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.projection import Projections
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Float32


class Term(Protocol):
    """A low-rank product for one linear (out, in): `left` (out, r), by rows, times `right` (r, in)."""

    @property
    def is_zero(self) -> bool: ...
    @property
    def right(self) -> Float32: ...
    def left(self, start: int, stop: int) -> Float32: ...


class _VeraTerm:
    """`weight * diag(lambda_b) B diag(lambda_d) A`."""

    def __init__(
        self, vectors: LambdaVectors, weight: float, in_features: int, projections: Projections
    ) -> None:
        projections.check(vectors.lambda_b, vectors.lambda_d, in_features)
        with quiet():
            self._lambda_b = np.float32(weight) * vectors.lambda_b
        self._lambda_d, self._b, self._a = vectors.lambda_d, projections.b, projections.a[:, :in_features]

    @property
    def is_zero(self) -> bool:
        return not self._lambda_b.any()

    @property
    def right(self) -> Float32:
        scaled: Float32 = self._lambda_d[:, None] * self._a
        return scaled

    def left(self, start: int, stop: int) -> Float32:
        scaled: Float32 = self._lambda_b[start:stop, None] * self._b[start:stop]
        return scaled


class _LoraTerm:
    """`weight * scale * B A`."""

    def __init__(self, pair: LoraPair, weight: float) -> None:
        self._pair, self._scale = pair, np.float32(weight * pair.scale)

    @property
    def is_zero(self) -> bool:
        return self._pair.is_zero or not self._scale

    @property
    def right(self) -> Float32:
        return self._pair.a

    def left(self, start: int, stop: int) -> Float32:
        scaled: Float32 = self._scale * self._pair.b[start:stop]
        return scaled


def term_of(change: LayerChange, weight: float, in_features: int, projections: Projections | None) -> Term:
    """What the adapters of a method add, times `weight`. Raises MismatchError where sizes don't fit."""
    if isinstance(change, LoraPair):
        return _LoraTerm(change, weight)
    assert isinstance(change, LambdaVectors) and projections is not None
    return _VeraTerm(change, weight, in_features, projections)


def quiet() -> np.errstate:
    """Let values grow infinite without a warning: they're found in the end, and told in a sentence."""
    return np.errstate(over="ignore", invalid="ignore")
