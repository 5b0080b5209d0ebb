"""A plan cut into units of work: each reads one piece of the base and gives the tensors that replace it.

Units don't depend on each other, and each gives the same bytes whenever it is run: that is what lets a merge
keep one tensor in memory, and be spread over workers or taken up again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vera_edge import formats
from vera_edge.adapter import Adapter
from vera_edge.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, PlanError
from vera_edge.formats import Weight, affine, dense, row_chunks
from vera_edge.merge.delta import Delta
from vera_edge.merge.measure import measure
from vera_edge.merge.report import LayerReport
from vera_edge.plan import Step
from vera_edge.projection import Projections
from vera_edge.requantize import Codes
from vera_edge.shards import Layout
from vera_edge.tensors import FLOATS, Float32, RawTensor


@dataclass(frozen=True)
class Result:
    """What a unit gives: tensors by name, and for a layer that an adapter changed, what became of it."""

    tensors: Mapping[str, RawTensor]
    layer: LayerReport | None = None


class Unit(Protocol):
    """One piece of work."""

    @property
    def layout(self) -> Layout:
        """The tensors it will give: name -> (dtype, shape)."""

    @property
    def names(self) -> Sequence[str]:
        """The base's tensors it reads."""

    def run(self) -> Iterator[Result]:
        """Do it; a result at a time, so that no more than one tensor is held."""


@dataclass(frozen=True)
class Copy:
    """Tensors that keep their bytes."""

    checkpoint: Checkpoint
    names: Sequence[str]

    @property
    def layout(self) -> Layout:
        infos = [self.checkpoint.tensors[name] for name in self.names]
        return {info.name: (info.dtype, info.shape) for info in infos}

    def run(self) -> Iterator[Result]:
        for name in self.names:
            yield Result({name: self.checkpoint.tensors.read(name)})


@dataclass(frozen=True)
class Cast:
    """A float tensor that isn't quantized, in another dtype."""

    checkpoint: Checkpoint
    name: str
    dtype: str

    @property
    def names(self) -> Sequence[str]:
        return (self.name,)

    @property
    def layout(self) -> Layout:
        return {self.name: (self.dtype, self.checkpoint.tensors[self.name].shape)}

    def run(self) -> Iterator[Result]:
        yield Result({self.name: cast(self.name, self.checkpoint.tensors.read(self.name), self.dtype)})


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

    def run(self) -> Iterator[Result]:
        yield Result({self.name: cast(self.name, self.tensor, self.dtype)})


@dataclass(frozen=True)
class Untie:
    """The base's embedding under the output head's name, where the adapter replaced the other of the two."""

    checkpoint: Checkpoint
    name: str
    source: str
    dtype: str

    @property
    def names(self) -> Sequence[str]:
        return (self.source,)

    @property
    def layout(self) -> Layout:
        return {self.name: (self.dtype, self.checkpoint.tensors[self.source].shape)}

    def run(self) -> Iterator[Result]:
        yield Result({self.name: cast(self.source, self.checkpoint.tensors.read(self.source), self.dtype)})


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight changes: its value, its format, or both."""

    checkpoint: Checkpoint
    step: Step
    adapters: Sequence[tuple[Adapter, float]]
    projections: Projections
    requantized: Mapping[str, Codes] = field(default_factory=dict)  # what was rounded elsewhere, by module

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.checkpoint.linear(self.step.module).tensors.values())

    @property
    def layout(self) -> Layout:
        planned = formats.get(self.step.result).layout(self.step.shape, self.step.options)
        return {self.step.module + suffix: entry for suffix, entry in planned.items()}

    def run(self) -> Iterator[Result]:
        step, target = self.step, formats.get(self.step.result)
        base = self.checkpoint.load(step.module)
        merged = merge_rows(step.module, base, self.delta())
        codes = self.requantized.get(step.module)
        result = target.quantize(merged, step.options) if codes is None else _stored(codes, step)
        check_range(step, merged, result)
        layer = None
        if step.action == "merge":
            survival = measure(base, merged, result, target, step.options, self.on_grid)
            layer = LayerReport(step.module, step.source, step.result, survival)
        tensors = {step.module + suffix: tensor for suffix, tensor in result.tensors().items()}
        yield Result(tensors, layer)

    @property
    def on_grid(self) -> bool:
        """Whether the base stores the weight in the very format, options included, that it will have."""
        linear, result = self.checkpoint.linear(self.step.module), self.step.result
        return linear.format == result and formats.get(result).options_of(linear) == self.step.options

    def delta(self) -> Delta | None:
        """What is added to the weight, None when nothing is."""
        if self.step.action != "merge":
            return None
        return Delta(self.step.module, self.step.shape[1], self.adapters, self.projections)


def _stored(codes: Codes, step: Step) -> Weight:
    """Codes that were chosen elsewhere, in the format that stores them."""
    pack = getattr(formats.get(step.result), "pack", None)
    if pack is None:
        return codes.weight()
    zeros = np.full_like(codes.scales, codes.grid.middle)
    if codes.zeros is not None:
        zeros = codes.zeros.astype(np.float32)
    weight: Weight = pack(affine.Grid(codes.codes, codes.scales, zeros), step.options)
    return weight


def merge_rows(module: str, base: Weight, delta: Delta | None) -> Float32:
    """The base's weight plus the delta, float32 (out, in). Raises CheckpointError when it isn't finite."""
    merged = np.empty(base.shape, np.float32)
    if delta is not None:
        delta.into(merged)
    for start, stop in row_chunks(base.shape):
        rows = merged[start:stop]
        if delta is None:
            rows[:] = base.rows(start, stop)
        else:
            rows += base.rows(start, stop)
        if not np.isfinite(rows).all():
            raise CheckpointError(
                f"the weight of {module} holds NaN or infinite values, so nothing sound can be made of it; "
                "the checkpoint is damaged: copy it again"
            )
    return merged


def check_range(step: Step, merged: Float32, result: Weight) -> None:
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
