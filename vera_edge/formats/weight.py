"""What a weight format is: how a linear's weight lies in a checkpoint, and what it is worth in float32.

A format answers four questions: which modules of a checkpoint are stored that way (`find`), what is one of
them worth (`load`, exact), how does a float32 weight become one (`quantize`), and which tensors will that
give (`layout`, known before a byte is read, so that a writer can lay out its files first).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.storage.tensors import RawTensor, TensorFolder

# Rows are handled in pieces of about this many values: temporaries stay in the processor's cache, and small
# beside the weight.
CHUNK_VALUES = 1 << 18


@dataclass(frozen=True)
class StoredLinear:
    """One linear layer as it lies in a checkpoint.

    `out_features` and `in_features` are nn.Linear's, whatever the stored orientation. `tensors` maps a role
    ("weight", "absmax", ...) to a tensor's name. `transposed`: stored as (in, out), as Conv1D does.
    """

    module: str
    out_features: int
    in_features: int
    format: str
    tensors: Mapping[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)


# What a format will write: suffix after the module's name (".weight", ".SCB") -> (dtype, shape).
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


class Weight(Protocol):
    """One linear's weight in memory, in the form its format stores it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), as nn.Linear has them."""

    def rows(self, start: int, stop: int) -> Float32:
        """Rows `start` to `stop` as float32 (stop - start, in_features), exactly what the format means."""

    def tensors(self) -> Mapping[str, RawTensor]:
        """The tensors to store, by suffix after the module's name."""


class WeightFormat(Protocol):
    """A way to store a linear's weight."""

    @property
    def name(self) -> str:
        """The name users give it: "bf16", "nf4", ..."""

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        """The modules stored this way. Raises CheckpointError when a module's tensors don't fit together."""

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> Weight:
        """Read one linear. Raises CheckpointError when its numbers aren't sound (NaN scales and the like)."""

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        """The options under which `quantize` stores a weight as `linear` is stored."""

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """`given` completed with defaults. Raises PlanError on an option it doesn't know or can't meet."""

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        """The tensors that `quantize` will give for a weight of this shape (out, in)."""

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> Weight:
        """Store a float32 weight (out, in) this way, to nearest."""

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """The `quantization_config` of config.json, None for an unquantized model."""


class Rounder(Protocol):
    """Stores a float32 weight piece by piece, as `quantize` stores it whole.

    A format that can has a method `rounder(shape, options)`; for the others `rounder` here keeps the pieces.
    """

    @property
    def multiple(self) -> int:
        """Every piece but the last has a multiple of this many rows."""

    def add(self, rows: Float32) -> None:
        """Take the next rows (any, in_features); they may change afterwards."""

    def weight(self) -> Weight:
        """The whole, when all rows are there."""


@dataclass
class _Kept:
    target: WeightFormat
    options: Mapping[str, Any]
    values: Float32
    multiple: int = 1
    done: int = 0

    def add(self, rows: Float32) -> None:
        self.values[self.done : self.done + len(rows)] = rows
        self.done += len(rows)

    def weight(self) -> Weight:
        return self.target.quantize(self.values, self.options)


def rounder(target: WeightFormat, shape: tuple[int, int], options: Mapping[str, Any]) -> Rounder:
    """What stores a weight (out, in) in the format `target`, piece by piece."""
    own = getattr(target, "rounder", None)
    if own is None:
        return _Kept(target, options, np.empty(shape, np.float32))
    made: Rounder = own(shape, options)
    return made


def add_rows(weight: Weight, start: int, rows: Float32) -> bool:
    """Add rows `start`, ... of a weight to float32 `rows` (any, in_features); whether all sums are finite.

    A weight that can do both in one pass has a method `add_to(rows, start)`.
    """
    own = getattr(weight, "add_to", None)
    if own is None:
        return add_values(rows, weight.rows(start, start + len(rows)))
    finite: bool = own(rows, start)
    return finite


def round_sum(rounder: Rounder, base: Weight, start: int, rows: Float32) -> bool:
    """Add rows `start`, ... of `base` to `rows`, and give the rounder the sums; whether all are finite.

    Where they aren't, the rounder's result is of no use. A rounder that can do it in one pass has a method
    `add_sum(base, start, rows)`, which returns None for a base that it can't do it for.
    """
    own = getattr(rounder, "add_sum", None)
    finite: bool | None = None if own is None else own(base, start, rows)
    if finite is None:
        finite = add_rows(base, start, rows)
        if finite:
            rounder.add(rows)
    return finite


def add_values(rows: Float32, values: Float32) -> bool:
    """Add `values` to `rows` in place; whether all sums are finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.add(rows, values, out=rows)
    return bool(np.isfinite(rows).all())


def row_chunks(
    shape: tuple[int, int], multiple: int = 1, values: int | None = None
) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a weight (out, in) in pieces of so many values, in multiples of `multiple` rows.

    values: CHUNK_VALUES where it isn't given.
    """
    out, size = shape[0], max(1, (values or CHUNK_VALUES) // max(1, shape[1]))
    size = max(multiple, size // multiple * multiple)
    for start in range(0, out, size):
        yield start, min(out, start + size)


def dequantize(weight: Weight) -> Float32:
    """The whole weight as float32 (out, in)."""
    whole: npt.NDArray[np.float32] = np.empty(weight.shape, np.float32)
    for start, stop in row_chunks(weight.shape):
        whole[start:stop] = weight.rows(start, stop)
    return whole
