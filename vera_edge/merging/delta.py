"""What the adapters make of one weight, in float32, a piece of some rows at a time: mostly a sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from vera_edge.adapters.adapter import Adapter, LayerChange
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.peft_methods import PeftTensors
from vera_edge.adapters.projection import Projections
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, CheckpointError
from vera_edge.formats import Rounder, Weight, add_rows, round_sum, row_chunks
from vera_edge.merging.measure import ROWS
from vera_edge.merging.terms import Term, quiet, term_of
from vera_edge.trained.peft_linear import merged

# Values of one product: fewer make it slow, more fall out of the processor's cache before they're stored.
PRODUCT_VALUES = 1 << 21
# Rows of one product of a wide layer: BLAS copies all of diag(d) A for each.
PRODUCT_ROWS = 384


class BaseRows(Protocol):
    """A weight (out, in) that gives its rows in float32."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def rows(self, start: int, stop: int) -> Float32: ...


class _ArrayRows:
    """The rows of an array."""

    def __init__(self, values: Float32) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, int]:
        return self._values.shape[0], self._values.shape[1]

    def rows(self, start: int, stop: int) -> Float32:
        return self._values[start:stop]


def _own(module: str, adapters: Sequence[tuple[Adapter, float]]) -> list[tuple[LayerChange, float]]:
    """What the adapters trained for a module, each with its weight."""
    return [(adapter.vectors[module], weight) for adapter, weight in adapters if module in adapter.vectors]


class Delta:
    """What the adapters, each with its weight, make of one linear (out, in).

    `sum_i weight_i * delta_i`, VeRA's being `diag(lambda_b_i) B diag(lambda_d_i) A` and LoRA's `scale_i B_i
    A_i`; where the only one makes another weight of the base's, its `turned` rows.
    Raises MismatchError when an adapter's vectors don't fit the projections.
    """

    def __init__(
        self,
        module: str,
        in_features: int,
        adapters: Sequence[tuple[Adapter, float]],
        projections: Projections | None,
    ) -> None:
        mine = _own(module, adapters)
        self._by_peft: Adapter | None = None
        self._magnitude: Float32 | None = None
        self._whole: Float32 | None = None
        self._module, self._terms = module, list[Term]()
        if mine and isinstance(mine[0][0], PeftTensors):
            self._by_peft = next(adapter for adapter, _ in adapters if module in adapter.vectors)
            return
        self._terms = [term_of(change, weight, in_features, projections) for change, weight in mine]
        if mine and isinstance(change := mine[0][0], LoraPair):
            self._magnitude = change.magnitude

    @property
    def is_zero(self) -> bool:
        """Whether no adapter changes this layer: it isn't adapted, or was never trained."""
        return self.adds and all(term.is_zero for term in self._terms)

    @property
    def adds(self) -> bool:
        """Whether the weight becomes its sum with what `into` writes; else what `turned` gives."""
        return self._magnitude is None and self._by_peft is None

    def turned(self, base: BaseRows, start: int, stop: int) -> Float32:
        """Rows of the weight that is made of the base's, float32 (rows, in)."""
        return self._normed(base, start, stop) if self._by_peft is None else self._merged(base)[start:stop]

    def _merged(self, base: BaseRows) -> Float32:
        """The whole weight as PEFT's layer merges it, kept for the rows that are asked for next."""
        if self._whole is None:
            assert self._by_peft is not None
            weight = np.empty(base.shape, np.float32)
            for start, stop in row_chunks(base.shape):
                weight[start:stop] = base.rows(start, stop)
            self._whole, _ = merged(self._by_peft, self._module, weight)
        return self._whole

    def _normed(self, base: BaseRows, start: int, stop: int) -> Float32:
        """Rows of the weight that a DoRA makes of the base's, as long as it trained them."""
        assert self._magnitude is not None
        rows = np.empty((stop - start, base.shape[1]), np.float32)
        self.into(rows, start)
        with quiet():
            rows += base.rows(start, stop)
            norm = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
            scale = np.divide(self._magnitude[start:stop], norm, out=np.zeros_like(norm), where=norm > 0)
            rows *= scale.astype(np.float32)[:, None]
        return rows

    @cached_property
    def _rights(self) -> list[Float32]:
        return [term.right for term in self._terms]

    def into(self, out: Float32, start: int = 0) -> None:
        """Write rows `start`, ... of the delta over `out` (rows, in), by the products in PEFT's order
        (`get_delta_weight`).
        """
        stop = start + len(out)
        with quiet():
            for number, (term, right) in enumerate(zip(self._terms, self._rights, strict=True)):
                left = term.left(start, stop)
                if number == 0:
                    np.matmul(left, right, out=out)
                else:
                    out += left @ right


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
        adds = delta is not None and delta.adds
        if delta is not None and adds:
            delta.into(piece, start)
        for first, stop in row_chunks(piece.shape, multiple):
            rows = piece[first:stop]
            turned = delta.turned if delta is not None and not adds else None
            if not _take(rows, base, start + first, adds, rounder, turned):
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


def _take(
    rows: Float32,
    base: Weight,
    start: int,
    is_delta: bool,
    rounder: Rounder | None,
    turned: Callable[[BaseRows, int, int], Float32] | None,
) -> bool:
    """Make `rows`, which may hold a delta, the weight, and give it to the rounder; whether it is finite.

    turned: gives rows of a weight that isn't the base's and a delta.
    """
    if is_delta:
        return add_rows(base, start, rows) if rounder is None else round_sum(rounder, base, start, rows)
    stop = start + len(rows)
    np.copyto(rows, base.rows(start, stop) if turned is None else turned(base, start, stop))
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


def effect(
    module: str,
    base: Float32,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections | None,
) -> Float32:
    """What the adapters, each with its weight, change of a weight `base` (out, in), float32 of that shape.

    Of adapters that only add, the same whatever the base. Raises as `Delta` does.
    """
    mine = _own(module, adapters)
    total = np.zeros(base.shape, np.float32)
    if not all(change.adds for change, _ in mine):
        delta = Delta(module, base.shape[1], adapters, projections)
        return delta.turned(_ArrayRows(base), 0, len(base)) - base
    for change, weight in mine:
        if isinstance(change, LambdaVectors) and projections is not None:
            part = projections.delta(change.lambda_b, change.lambda_d, base.shape[1])
            total += np.float32(weight) * part
        else:
            term = term_of(change, weight, base.shape[1], projections)
            total += term.left(0, len(base)) @ term.right
    return total
