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
from vera_edge.plan import SAME, Plan, Step
from vera_edge.projection import Projections
from vera_edge.requantize import Codes
from vera_edge.shards import Layout
from vera_edge.tensors import FLOATS, Float32, RawTensor, TensorInfo


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
            linear = self.checkpoint.linear(step.module)
            on_grid = linear.format == step.result and target.options_of(linear) == step.options
            survival = measure(base, merged, result, target, step.options, on_grid)
            layer = LayerReport(step.module, step.source, step.result, survival)
        tensors = {step.module + suffix: tensor for suffix, tensor in result.tensors().items()}
        yield Result(tensors, layer)

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


def cut(
    plan: Plan,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections,
    requantized: Mapping[str, Codes],
) -> tuple[list[Unit], bool]:
    """The units of a plan, in the order in which the base's files hold what they read, new tensors last.

    Also whether the output head is untied from the embedding by it.
    """
    replaced = replacements(adapters)
    units: list[Unit] = []
    for step in plan.steps:
        if f"{step.module}.weight" in replaced:
            continue
        linear = checkpoint.linear(step.module)
        unit = Linear(checkpoint, step, adapters, projections, requantized)
        delta = unit.delta()
        same = step.source == step.result and formats.get(step.result).options_of(linear) == step.options
        if step.copies or (same and (delta is None or delta.is_zero)):
            units.append(Copy(checkpoint, unit.names))
        else:
            units.append(unit)
    target = None if plan.others == SAME else dense.DTYPES[plan.others]
    for name in checkpoint.other_names:
        info = checkpoint.tensors[name]
        if name in replaced:
            continue
        if target and info.dtype in FLOATS and info.dtype != target:
            units.append(Cast(checkpoint, name, target))
        else:
            units.append(Copy(checkpoint, (name,)))
    files = {file: number for number, file in enumerate(checkpoint.tensors.files)}
    units.sort(key=lambda unit: min((files[info.file], info.start) for info in _infos(checkpoint, unit)))
    for name, tensor in sorted(replaced.items()):
        own = checkpoint.tensors[name].dtype if name in checkpoint.tensors else tensor.dtype
        units.append(Place(name, tensor, (target or own) if tensor.dtype in FLOATS else own))
    untied = _untie(checkpoint, replaced, target)
    return units + untied, bool(untied) or (_HEAD in replaced and _HEAD not in checkpoint.tensors)


_HEAD = "lm_head.weight"


def replacements(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, RawTensor]:
    """The tensors that adapters put in place of the base's, by name."""
    found: dict[str, RawTensor] = {}
    for adapter, _ in adapters:
        found |= adapter.modules_to_save
        found |= {f"{module}.bias": RawTensor.of(bias) for module, bias in adapter.biases.items()}
    return found


def _infos(checkpoint: Checkpoint, unit: Unit) -> list[TensorInfo]:
    return [checkpoint.tensors[name] for name in unit.names]


def _untie(checkpoint: Checkpoint, replaced: Mapping[str, RawTensor], target: str | None) -> list[Unit]:
    """PEFT replaces an embedding alone and leaves a head that was tied to it with the base's values."""
    if _HEAD in checkpoint.tensors or _HEAD in replaced or not tied(checkpoint):
        return []
    vocabulary = checkpoint.config.get("vocab_size")
    return [
        Untie(checkpoint, _HEAD, name, target or checkpoint.tensors[name].dtype)
        for name in replaced
        if name in checkpoint.tensors
        and dense.is_embedding(name.removesuffix(".weight"))
        and checkpoint.tensors[name].shape[0] == vocabulary
    ]


def tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head takes its weight from the embedding."""
    architectures = checkpoint.config.get("architectures") or [""]
    has_head = str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return has_head and checkpoint.config.get("tie_word_embeddings", True) is not False
