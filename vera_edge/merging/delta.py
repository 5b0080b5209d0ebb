"""What the adapters add to one weight, and the sum of both, in float32, a piece of some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from vera_edge.adapters.projection import Projections
from vera_edge.adapters.vera import Adapter
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, CheckpointError
from vera_edge.formats import Rounder, Weight, add_rows, round_sum, row_chunks
from vera_edge.merging.measure import ROWS

# Values of one product: fewer make it slow, more fall out of the processor's cache before they're stored.
PRODUCT_VALUES = 1 << 21
# Rows of one product of a wide layer: BLAS copies all of diag(d) A for each.
PRODUCT_ROWS = 384


class Delta:
    """`sum_i weight_i * diag(lambda_b_i) B diag(lambda_d_i) A` for one linear (out, in).

    Raises MismatchError when an adapter's vectors don't fit the projections.
    """

    def __init__(
        self,
        module: str,
        in_features: int,
        adapters: Sequence[tuple[Adapter, float]],
        projections: Projections,
    ) -> None:
        self._b = projections.b
        self._terms: list[tuple[Float32, Float32]] = []
        for adapter, weight in adapters:
            if module in adapter.vectors:
                vectors = adapter.vectors[module]
                projections.check(vectors.lambda_b, vectors.lambda_d, in_features)
                with _quiet():
                    self._terms.append((np.float32(weight) * vectors.lambda_b, vectors.lambda_d))
        self._a = projections.a[:, :in_features]

    @property
    def is_zero(self) -> bool:
        """Whether no adapter changes this layer: it isn't adapted, or lambda_b was never trained."""
        return not any(lambda_b.any() for lambda_b, _ in self._terms)

    @cached_property
    def _scaled_a(self) -> list[Float32]:
        return [lambda_d[:, None] * self._a for _, lambda_d in self._terms]

    def into(self, out: Float32, start: int = 0) -> None:
        """Write rows `start`, ... of the delta over `out` (rows, in), by the products in PEFT's order
        (`get_delta_weight`).
        """
        stop = start + len(out)
        with _quiet():
            for number, ((lambda_b, _), scaled_a) in enumerate(zip(self._terms, self._scaled_a, strict=True)):
                scaled_b = lambda_b[start:stop, None] * self._b[start:stop]
                if number == 0:
                    np.matmul(scaled_b, scaled_a, out=out)
                else:
                    out += scaled_b @ scaled_a


def _quiet() -> np.errstate:
    """Let values grow infinite without a warning: they're found in the end, and told in a sentence."""
    return np.errstate(over="ignore", invalid="ignore")


def merged_rows(
    module: str, base: Weight, delta: Delta | None, rounder: Rounder | None = None
) -> Iterator[tuple[int, Float32]]:
    """The base's weight plus the delta, piece by piece: the first row, and float32 (rows, in).

    A piece has a multiple of `measure.ROWS` rows, but for the last. It is written over by the next one.
    rounder: is given all of them, while the processor's cache still holds them.
    Raises CheckpointError when the base isn't finite, AdapterError when the sum isn't.
    """
    multiple = rounder.multiple if rounder else 1
    buffer = np.empty((piece_rows(base.shape, multiple), base.shape[1]), np.float32)
    for start, end in _pieces(base.shape, multiple):
        piece = buffer[: end - start]
        if delta is not None:
            delta.into(piece, start)
        for first, stop in row_chunks(piece.shape, multiple):
            rows = piece[first:stop]
            if not _take(rows, base, start + first, delta is not None, rounder):
                if np.isfinite(base.rows(start + first, start + stop)).all():
                    raise AdapterError(
                        f"what the adapter adds to {module} is beyond float32; its vectors or its weight are "
                        "too large for anything sound"
                    )
                raise CheckpointError(
                    f"the weight of {module} holds NaN or infinite values, so nothing sound can be made of "
                    "it; the checkpoint is damaged: copy it again"
                )
        yield start, piece


def piece_rows(shape: tuple[int, int], multiple: int) -> int:
    """The most rows of a piece of a weight (out, in), for a rounder that takes multiples of so many."""
    return max(end - start for start, end in _pieces(shape, multiple))


def _pieces(shape: tuple[int, int], multiple: int) -> Iterator[tuple[int, int]]:
    """The row ranges of a weight's pieces.

    What whole steps of PRODUCT_VALUES leave over is a piece of its own: a product of very few rows sums in
    another order, so that who has how many decides on last bits.
    """
    out, multiple = shape[0], math.lcm(ROWS, multiple)
    step = max(1, PRODUCT_VALUES // shape[1] // multiple) * multiple
    whole = out // step * step
    size = step * max(1, PRODUCT_ROWS // step)
    yield from ((start, min(whole, start + size)) for start in range(0, whole, size))
    if whole < out:
        yield whole, out


def _take(rows: Float32, base: Weight, start: int, is_delta: bool, rounder: Rounder | None) -> bool:
    """Make `rows`, which may hold a delta, the sum, and give it to the rounder; whether it is finite."""
    if is_delta:
        return add_rows(base, start, rows) if rounder is None else round_sum(rounder, base, start, rows)
    np.copyto(rows, base.rows(start, start + len(rows)))
    finite = bool(np.isfinite(rows).all())
    if finite and rounder is not None:
        rounder.add(rows)
    return finite


def merge_rows(module: str, base: Weight, delta: Delta | None) -> Float32:
    """`merged_rows` as a whole, float32 (out, in)."""
    merged = np.empty(base.shape, np.float32)
    for start, rows in merged_rows(module, base, delta):
        merged[start : start + len(rows)] = rows
    return merged
