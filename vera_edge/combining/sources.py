"""Adapters of one base, each with its weight and projections, and what each makes of a layer's weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.projection import Projections
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.combining.low_rank import LowRank
from vera_edge.errors import MismatchError, PlanError
from vera_edge.merging.delta import effect
from vera_edge.storage.side_files import SideFiles
from vera_edge.trained import model, provenance


@dataclass(frozen=True, eq=False)
class DeltaSource:
    """An adapter by the base's names, what its delta is weighted by, and VeRA's projections."""

    adapter: Adapter
    weight: float
    projections: Projections | None

    def product(self, module: str, in_features: int) -> LowRank | None:
        """The delta of a layer as the product that it is; None where the method makes another weight."""
        change = self.adapter.vectors[module]
        if isinstance(change, LoraPair) and change.adds:
            return LowRank(change.b, change.a, change.scale)
        if isinstance(change, LambdaVectors) and self.projections is not None:
            found = self.projections
            found.check(change.lambda_b, change.lambda_d, in_features)
            left = change.lambda_b[:, None] * found.b[: change.out_features]
            return LowRank(left, change.lambda_d[:, None] * found.a[:, :in_features])
        return None

    def delta(self, module: str, checkpoint: Checkpoint) -> Float32:
        """The delta of a layer (out, in), float32; of a method that makes another weight, from the base's."""
        found = self.product(module, checkpoint.linear(module).in_features)
        if found is not None:
            return found.dense()
        base = checkpoint.dequantize(module)
        return effect(module, base, [(self.adapter, 1.0)], self.projections)


@dataclass(frozen=True, eq=False)
class Sources:
    """The base as the adapters were trained on it, the adapters, and sentences for a person to read."""

    checkpoint: Checkpoint
    each: tuple[DeltaSource, ...]
    notes: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """The layers that any of them changes, sorted."""
        return sorted({module for source in self.each for module in source.adapter.vectors})

    @property
    def names(self) -> dict[str, str]:
        """What PEFT calls those layers."""
        found = dict[str, str]()
        for source in self.each:
            trained = source.adapter.as_trained or source.adapter
            found |= dict(zip(source.adapter.vectors, trained.vectors, strict=True))
        return found

    @property
    def biases(self) -> dict[str, Float32]:
        """The base's biases with the weighted sum of what is trained into them or scaled, by PEFT's names."""
        adapted, found = self.names, dict[str, Float32]()
        for source in self.each:
            trained = source.adapter.as_trained or source.adapter
            plain = dict(zip(source.adapter.biases, trained.biases, strict=False))  # computed ones come last
            for module in source.adapter.biases:
                name = f"{adapted[module]}.base_layer" if module in adapted else plain[module]
                found[f"{name}.bias"] = self._bias(module)
        return found

    def _bias(self, module: str) -> Float32:
        """In float64, so that one adapter's alone is its own to the bit."""
        base = self.checkpoint.tensors.float32(f"{module}.bias").astype(np.float64)
        total = base.copy()
        for source in self.each:
            if module in source.adapter.biases:
                total += source.weight * (source.adapter.biases[module] - base)
        bias: Float32 = total.astype(np.float32)
        return bias

    @property
    def shares_projections(self) -> bool:
        """Whether all are VeRA's with one A and B."""
        return (
            all(one.projections is not None for one in self.each)
            and len({one.projections.digest for one in self.each if one.projections is not None}) == 1
        )

    @property
    def files(self) -> SideFiles:
        """The tokenizer, templates and settings that lie beside the adapters."""
        own, files = {source.adapter.path for source in self.each}, self.checkpoint.files
        return SideFiles({name: folder for name, folder in files.folders.items() if folder in own})

    def of(self, module: str) -> list[DeltaSource]:
        """Those that change a layer."""
        return [source for source in self.each if module in source.adapter.vectors]


def open_sources(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    projection_rounding: str | None = None,
    trained_as: TrainedAs | None = None,
) -> Sources:
    """Read a base and adapters (folders, each with its weight) that needn't be of one method.

    projection_rounding: of the VeRA adapters among them; see `provenance.resolve`.
    Raises a VeraEdgeError where one can't be read, doesn't fit the base, or holds what no sum has room for.
    """
    checkpoint, read = model.read(base, adapters, None, trained_as)
    known: dict[str, Projections] = {}
    each, notes = list[DeltaSource](), list[str]()
    for adapter, weight in read:
        _check(adapter, weight)
        rounding = projection_rounding if adapter.is_vera or len(read) == 1 else None
        found = provenance.source_of(adapter, checkpoint, rounding)
        notes += [found.how, *found.notes]
        projections = found.projections
        if projections is not None:  # one A and B in memory, however many share them
            projections = known.setdefault(projections.digest, projections)
        each.append(DeltaSource(adapter, weight, projections))
    _check_apart(each)
    return Sources(checkpoint, tuple(each), tuple(dict.fromkeys([*notes, *checkpoint.notes])))


def _check(adapter: Adapter, weight: float) -> None:
    if not math.isfinite(weight):
        raise PlanError(f"the weight of {adapter.path} is {weight}; give a finite number")
    if weight != 1 and adapter.modules_to_save:
        raise PlanError(
            f"{adapter.path} also replaces whole tensors ({min(adapter.modules_to_save)}), which can't be "
            "weighted; give it weight 1"
        )


def _check_apart(each: Sequence[DeltaSource]) -> None:
    """Raise MismatchError where two adapters replace one tensor."""
    taken: dict[str, Adapter] = {}
    for source in each:
        for name in source.adapter.modules_to_save:
            if name in taken:
                raise MismatchError(f"{taken[name].path} and {source.adapter.path} both replace {name}")
            taken[name] = source.adapter
