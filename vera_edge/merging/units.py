"""A plan cut into units of work: each reads one piece of the base and gives the tensors that replace it.

Units don't depend on each other, and each gives the same bytes whenever it is run: that is what lets a merge
keep one tensor in memory, and be spread over workers or taken up again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vera_edge import formats
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections
from vera_edge.arrays import Bytes, Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, PlanError
from vera_edge.formats import Rounder, Weight, affine, dense, row_chunks
from vera_edge.merging.delta import Delta, merged_rows
from vera_edge.merging.measure import ROWS, measure, measured_rows
from vera_edge.merging.report import LayerReport
from vera_edge.plans.plan import Step
from vera_edge.requantize import Codes
from vera_edge.storage.shards import Layout
from vera_edge.storage.tensors import DTYPES, FLOATS, RawTensor, TensorFolder


class Output(Protocol):
    """Where a unit's tensors go."""

    def put(self, name: str, tensor: RawTensor) -> None:
        """Take a whole tensor."""

    def stream(self, name: str, pieces: Iterable[Bytes]) -> None:
        """Take a tensor's bytes piece by piece."""


class MergeUnit(Protocol):
    """One piece of work."""

    @property
    def layout(self) -> Layout:
        """The tensors it will give: name -> (dtype, shape)."""

    @property
    def names(self) -> Sequence[str]:
        """The base's tensors it reads."""

    def run(self, tensors: TensorFolder, out: Output) -> LayerReport | None:
        """Do it, reading the base from `tensors`; for a layer that an adapter changed, what became of it."""


@dataclass(frozen=True)
class Copy:
    """Tensors that keep their bytes."""

    checkpoint: Checkpoint
    names: Sequence[str]

    @property
    def layout(self) -> Layout:
        infos = [self.checkpoint.tensors[name] for name in self.names]
        return {info.name: (info.dtype, info.shape) for info in infos}

    def run(self, tensors: TensorFolder, out: Output) -> None:
        for name in self.names:
            out.stream(name, copied(tensors, name))


@dataclass(frozen=True)
class Cast:
    """A float tensor that isn't quantized, in another dtype, and under another name where one is given.

    A name of its own gets the base's embedding as an output head, where the adapter replaced one of the two.
    """

    checkpoint: Checkpoint
    source: str
    dtype: str
    name: str = ""

    @property
    def names(self) -> Sequence[str]:
        return (self.source,)

    @property
    def layout(self) -> Layout:
        return {self.name or self.source: (self.dtype, self.checkpoint.tensors[self.source].shape)}

    def run(self, tensors: TensorFolder, out: Output) -> None:
        out.stream(self.name or self.source, self.pieces(tensors))

    def pieces(self, tensors: TensorFolder) -> Iterator[Bytes]:
        """What it gives, piece by piece."""
        info = tensors[self.source]
        for piece in copied(tensors, self.source):
            count = piece.size // DTYPES[info.dtype][0]
            yield cast(self.source, RawTensor(info.dtype, (count,), piece), self.dtype).data


@dataclass(frozen=True)
class Place:
    """A tensor of an adapter's own (a trained bias, a module saved whole), in the dtype it gets here."""

    name: str
    tensor: RawTensor
    dtype: str

    @property
    def names(self) -> Sequence[str]:
        return ()

    @property
    def layout(self) -> Layout:
        return {self.name: (self.dtype, self.tensor.shape)}

    def run(self, tensors: TensorFolder, out: Output) -> None:
        out.put(self.name, self.cast())

    def cast(self) -> RawTensor:
        """The tensor in its dtype."""
        return cast(self.name, self.tensor, self.dtype)


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight changes: its value, its format, or both."""

    checkpoint: Checkpoint
    step: Step
    adapters: Sequence[tuple[Adapter, float]]
    projections: Projections | None
    requantized: Mapping[str, Codes] = field(default_factory=dict)  # what was rounded elsewhere, by module

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.checkpoint.linear(self.step.module).tensors.values())

    @property
    def layout(self) -> Layout:
        planned = formats.get(self.step.result).layout(self.step.shape, self.step.options)
        return {self.step.module + suffix: entry for suffix, entry in planned.items()}

    def run(self, tensors: TensorFolder, out: Output) -> LayerReport | None:
        step, target, kept = self.step, formats.get(self.step.result), dict[int, Float32]()
        base = formats.load(tensors, self.checkpoint.linear(step.module))
        rounder = self._rounder()
        measured = measured_rows(step.shape) if step.action == "merge" else {}
        for start, rows in merged_rows(step.module, base, self.delta(), rounder):
            for first in range(start, start + len(rows), ROWS):
                if first in measured:
                    kept[first] = rows[first - start : measured[first] - start].copy()
        result = rounder.weight()
        check_range(step, result)
        for suffix, tensor in result.tensors().items():
            out.put(step.module + suffix, tensor)
        if step.action != "merge":
            return None
        survival = measure(base, kept, result, target, step.options, self.on_grid)
        return LayerReport(step.module, step.source, step.result, survival)

    def _rounder(self) -> Rounder:
        if self.step.module in self.requantized:
            return _Chosen(self.requantized[self.step.module], self.step)
        return formats.rounder(formats.get(self.step.result), self.step.shape, self.step.options)

    @property
    def on_grid(self) -> bool:
        """Whether the base stores the weight in the very format, options included, that it will have."""
        linear, result = self.checkpoint.linear(self.step.module), self.step.result
        return linear.format == result and formats.get(result).options_of(linear) == self.step.options

    def delta(self) -> Delta | None:
        """What is added to the weight, None when that is nothing."""
        if self.step.action != "merge":
            return None
        found = Delta(self.step.module, self.step.shape[1], self.adapters, self.projections)
        return None if found.is_zero else found


@dataclass(frozen=True)
class _Chosen:
    """Codes that were chosen elsewhere, in the format that stores them; see `formats.Rounder`."""

    codes: Codes
    step: Step
    multiple: int = 1

    def add(self, rows: Float32) -> None:
        """Nothing is left to choose."""

    def weight(self) -> Weight:
        codes, pack = self.codes, getattr(formats.get(self.step.result), "pack", None)
        if pack is None:
            return codes.weight()
        zeros = np.full_like(codes.scales, codes.grid.middle)
        if codes.zeros is not None:
            zeros = codes.zeros.astype(np.float32)
        weight: Weight = pack(affine.AffineParams(codes.codes, codes.scales, zeros), self.step.options)
        return weight


def copied(tensors: TensorFolder, name: str) -> Iterator[Bytes]:
    """A tensor's bytes, piece by piece. Raises CheckpointError at a NaN; a mask may hold infinities."""
    info = tensors[name]
    packed = f"{name}.absmax" in tensors  # bitsandbytes' 4 bits, which may lie under a float dtype
    for piece in tensors.pieces(name):
        if info.dtype in FLOATS and not packed:
            values = piece.view(DTYPES[info.dtype][1])
            # A bfloat16 is the upper half of a float32, and NaN where its exponent is full and more.
            damaged = (values & 0x7FFF) > 0x7F80 if info.dtype == "BF16" else np.isnan(values)
            if damaged.any():
                raise CheckpointError(f"{name} in {info.file} holds NaN; copy or download the model again")
        yield piece


def check_range(step: Step, result: Weight) -> None:
    """Raise when a finite weight became infinite: fp16 ends at 65504."""
    if step.result != "fp16":
        return
    for start, stop in row_chunks(result.shape):
        if not np.isfinite(result.rows(start, stop)).all():
            raise out_of_range(f"the weight of {step.module}")


def out_of_range(what: str) -> PlanError:
    """The error for values that fp16 can't hold."""
    return PlanError(f"{what} has values beyond fp16's largest, 65504; choose --to bf16 or fp32")


def cast(name: str, tensor: RawTensor, dtype: str) -> RawTensor:
    """A float tensor in another float dtype, to nearest; other tensors come back as they are."""
    if tensor.dtype == dtype or tensor.dtype not in FLOATS:
        return tensor
    values = tensor.float32()
    result = dense.to_dtype(values, dtype)
    if dtype == "F16" and not np.isfinite(result.array()[np.isfinite(values)]).all():
        raise out_of_range(name)
    return result
