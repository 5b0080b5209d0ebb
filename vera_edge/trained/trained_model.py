"""What was trained, as one value: a base, the adapters on it, and the projections they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.adapters.adapter import Adapter, WeightedAdapter
from vera_edge.adapters.projection import Projections
from vera_edge.adapters.reading import title_of
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import MismatchError, PlanError
from vera_edge.trained import model, provenance


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A base and the adapters that were trained on it: the inputs of every merge, export and measurement.

    checkpoint: the base, its linears by the names that `adapters` have for them. adapters: at least one for a
    merge or an export; none where the base alone is meant. projections: VeRA's A and B, which all
    adapters share; None for other methods.
    notes: sentences for a person to read, on what was found or assumed.
    """

    checkpoint: Checkpoint
    adapters: tuple[WeightedAdapter, ...]
    projections: Projections | None
    notes: tuple[str, ...] = ()

    @property
    def projection_digest(self) -> str | None:
        """The digest of the projections, None where the method has none."""
        return None if self.projections is None else self.projections.digest

    @property
    def projection_record(self) -> dict[str, Any] | None:
        """The projections' spec and digest as a JSON object, None where the method has none."""
        found = self.projections
        return None if found is None else {**found.spec.to_dict(), "digest": found.digest}

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders it is read from."""
        return (self.checkpoint.path, *(adapter.path for adapter, _ in self.adapters))


def open_model(
    base: Path | Checkpoint,
    adapters: Sequence[tuple[Path, float]],
    projection_rounding: str | None = None,
    trained_as: TrainedAs | None = None,
    tokenizer: Path | None = None,
    summed: bool = True,
) -> TrainedModel:
    """Read a base and adapters (folders, each with its weight) as the one model that was trained.

    projection_rounding: see `provenance.resolve`. trained_as: how the base in a folder was loaded.
    tokenizer: a folder whose tokenizer is taken, instead of the adapters' or the base's. summed: whether the
    adapters are to be one sum, or run one at a time.
    Reads no weight of the base. Raises a VeraEdgeError in one sentence when an input is at fault.
    """
    checkpoint, read = model.read(base, adapters, tokenizer, trained_as)
    check_together(read, summed)
    sources = [provenance.source_of(adapter, checkpoint, projection_rounding) for adapter, _ in read]
    projections = check_projections(read, [source.projections for source in sources])
    notes = [note for source in sources for note in (source.how, *source.notes)]
    return TrainedModel(checkpoint, read, projections, tuple(dict.fromkeys([*notes, *checkpoint.notes])))


def base_alone(base: Path | Checkpoint) -> TrainedModel:
    """A base without any adapter."""
    checkpoint, _ = model.read(base)
    return TrainedModel(checkpoint, (), None, tuple(dict.fromkeys(checkpoint.notes)))


def check_together(adapters: Sequence[tuple[Adapter, float]], summed: bool = True) -> None:
    """Raise unless the adapters, each with its weight, can be summed on one base, or stand beside it in turn.

    To be `summed` they must be of one method, and where that makes another weight of a weight, one and whole.
    VeRA's projections must be the same either way: rank and seed are compared here, the values where they're
    known (`check_projections`). Raises PlanError or MismatchError, saying which field differs.
    """
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise PlanError(f"the weight of {adapter.path} is {weight}; give a finite number")
        if not adapter.adds and (weight != 1 or (summed and len(adapters) > 1)):
            raise PlanError(
                f"{adapter.path} ({title_of(adapter)}) is merged by what makes another weight of a weight, "
                "so it can't be weighted or summed; give it alone, with weight 1"
            )
        if weight != 1 and (adapter.biases or adapter.modules_to_save):
            raise PlanError(
                f"{adapter.path} also replaces whole tensors ({_replaced(adapter)[0]}), which can't be "
                "weighted; give it weight 1"
            )
    first = adapters[0][0] if adapters else None
    for other, _ in adapters[1:] if summed else ():
        if first is not None and first.method != other.method:
            raise MismatchError(
                f"{first.path} is an adapter of {title_of(first)} and {other.path} of {title_of(other)}; "
                "merge them one after the other"
            )
    drawn = [adapter for adapter, _ in adapters if adapter.is_vera]
    for other in drawn[1:]:
        for what, ours, theirs in (
            ("rank", drawn[0].rank, other.rank),
            ("projection seed", drawn[0].seed, other.seed),
        ):
            if ours != theirs:
                raise MismatchError(
                    f"{drawn[0].path} and {other.path} differ in their {what} ({ours} and {theirs}), so they "
                    "don't share projections; merge them one after the other"
                )
    taken: dict[str, Adapter] = {}
    for adapter, _ in adapters:
        # Beside the base each brings its own biases; whole tensors are in the graph.
        for name in _replaced(adapter) if summed else adapter.modules_to_save:
            if name in taken:
                raise MismatchError(
                    f"{taken[name].path} and {adapter.path} both replace {name}; merge only one"
                )
            taken[name] = adapter


def _replaced(adapter: Adapter) -> list[str]:
    return sorted([*(f"{module}.bias" for module in adapter.biases), *adapter.modules_to_save])


def check_projections(
    adapters: Sequence[tuple[Adapter, float]], projections: Sequence[Projections | None]
) -> Projections | None:
    """The projections that all adapters share, None where they have none; `projections` in their order.

    Raises MismatchError when they don't share them, saying which field of the spec differs.
    """
    drawn = [
        (adapter, own) for (adapter, _), own in zip(adapters, projections, strict=True) if own is not None
    ]
    if not drawn:
        return None
    source, first = drawn[0]
    for adapter, other in drawn[1:]:
        if other.digest == first.digest:
            continue
        ours, theirs = first.spec.to_dict(), other.spec.to_dict()
        fields = [f"{key} ({ours[key]} and {theirs[key]})" for key in ours if ours[key] != theirs[key]]
        raise MismatchError(
            f"{source.path} and {adapter.path} don't share projections: they differ in "
            f"{', '.join(fields) or 'their saved values'}; merge them one after the other"
        )
    return first
