"""Works out which projections an adapter was trained with, and says how that was found.

The seed alone doesn't tell. PEFT rounds what it drew to the dtype of the layers it adapted, its rule for
4-bit layers changed in 0.19, and the adapter's config records none of it. Where the projections were saved
they are the truth, and are compared with everything the seed could have given. Where they weren't, the base
tells their size and its dtype, and `peft_version` tells which rule held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vera_edge.adapters import reading
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import (
    ROUNDINGS,
    ProjectionDtype,
    Projections,
    ProjectionSpec,
    regenerate,
    round_to,
    stream,
)
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import AdapterError, MismatchError
from vera_edge.trained import record as training_record
from vera_edge.trained.fit import check_fit
from vera_edge.trained.peft_rounding import ASK, NAMES, infer

__all__ = ["Provenance", "check_fit", "resolve", "resolve_for_command", "verify"]


@dataclass(frozen=True, eq=False)
class Provenance:
    """The projections an adapter was trained with.

    how: one sentence that says how they were found.
    verified: they were saved with the adapter, and the spec regenerates them bit for bit.
    from_seed: `regenerate(spec)` gives these projections. When false they exist only as saved, and an
        artefact must carry them.
    notes: sentences a person should read: a base of another name, projections of unexpected size.
    """

    spec: ProjectionSpec
    projections: Projections
    how: str
    verified: bool
    from_seed: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the values themselves, as a JSON object."""
        return {
            "spec": self.spec.to_dict(),
            "digest": self.projections.digest,
            "how": self.how,
            "verified": self.verified,
            "from_seed": self.from_seed,
            "notes": list(self.notes),
        }


def resolve(
    adapter: Adapter, checkpoint: Checkpoint | None = None, projection_rounding: str | None = None
) -> Provenance:
    """Find the projections `adapter` was trained with.

    projection_rounding: what to round to ("float32", "bfloat16", "float16", "float8_e4m3fn", or fp32, bf16,
        fp16, fp8), when the base can't tell.
    Raises AdapterError when neither tells, MismatchError when adapter and base don't belong together or
    `projection_rounding` contradicts the saved projections.
    """
    if not adapter.is_vera:
        raise AdapterError(
            f"{adapter.path} is an adapter of {reading.title_of(adapter)}, which has no projections; only "
            "VeRA's are drawn from a seed"
        )
    if projection_rounding is not None and projection_rounding not in NAMES:
        raise AdapterError(f"projection rounding {projection_rounding!r} isn't known; {ASK}")
    asked = None if projection_rounding is None else NAMES[projection_rounding]
    notes = check_fit(adapter, checkpoint) if checkpoint is not None else adapter.notes
    if adapter.saved is not None:
        found = _from_saved(adapter, *adapter.saved, asked)
        return replace(
            found, notes=notes + (_size_note(adapter, checkpoint, found.spec) if checkpoint else ())
        )
    if checkpoint is None:
        raise AdapterError(
            f"{adapter.path} doesn't hold its projections, and their size depends on the base: give --base"
        )
    in_max, out_max = _sizes(adapter, checkpoint)
    rounding, how = (asked, f"as asked, rounded to {asked}") if asked else infer(adapter, checkpoint)
    spec = ProjectionSpec(adapter.seed, adapter.rank, in_max, out_max, rounding)
    return Provenance(
        spec,
        regenerate(spec),
        f"drawn from seed {adapter.seed}; {how}",
        verified=False,
        from_seed=True,
        notes=notes,
    )


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """What an adapter's folder and base tell of what was trained, for a method of any kind.

    how: one sentence. projections: VeRA's, None for other methods. notes: sentences a person should read.
    """

    how: str
    projections: Projections | None = None
    notes: tuple[str, ...] = ()


def source_of(
    adapter: Adapter, checkpoint: Checkpoint, projection_rounding: str | None = None
) -> AdapterSource:
    """What `adapter` was trained as on `checkpoint`; VeRA's projections are resolved.

    Raises as `resolve` does, and AdapterError where projections are to be rounded and there are none.
    """
    if adapter.is_vera:
        found = resolve_for_command(adapter, checkpoint, projection_rounding)
        return AdapterSource(found.how, found.projections, found.notes)
    if projection_rounding is not None:
        raise AdapterError(
            f"{adapter.path} is an adapter of {reading.title_of(adapter)}, which has no projections to "
            "round; leave --projection-rounding out"
        )
    notes = (*check_fit(adapter, checkpoint), *training_record.notes(adapter, checkpoint))
    return AdapterSource(told(adapter), None, notes)


def told(adapter: Adapter) -> str:
    """What is known of an adapter whose method has no projections."""
    rank = f" of rank {adapter.rank}" if adapter.rank else ""
    return f"{reading.described(adapter)[0]}{rank}; the folder holds all that was trained"


def resolve_for_command(
    adapter: Adapter, checkpoint: Checkpoint | None = None, projection_rounding: str | None = None
) -> Provenance:
    """`resolve`, and in the notes what is known or assumed of how the base was loaded in training."""
    found = resolve(adapter, checkpoint, projection_rounding)
    if checkpoint is None:
        return found
    record = (*training_record.notes(adapter, checkpoint), *_rounding_note(adapter, checkpoint, found))
    return replace(found, notes=(*found.notes, *record))


def _rounding_note(adapter: Adapter, checkpoint: Checkpoint, found: Provenance) -> tuple[str, ...]:
    """Saved projections show what they were rounded to, and so whether the base was loaded as it is here."""
    try:
        rounding, why = infer(adapter, checkpoint)
    except AdapterError:
        return ()
    if not found.verified or rounding == found.spec.rounding:
        return ()
    return (
        f"the saved projections are {_form(found.spec)}, but {why}: in training the base wasn't loaded as it "
        "is here",
    )


def verify(
    adapter: Adapter, checkpoint: Checkpoint | None = None, projection_rounding: str | None = None
) -> Provenance:
    """`resolve`, and raise when there are no saved projections or the seed doesn't give them."""
    if adapter.saved is None:
        raise AdapterError(
            f"{adapter.path} doesn't hold its projections, so there is nothing to verify them against; "
            "train with save_projection=True to keep them"
        )
    found = resolve_for_command(adapter, checkpoint, projection_rounding)
    if not found.verified:
        raise MismatchError(f"in {adapter.path}, {found.how}")
    return found


def _sizes(adapter: Adapter, checkpoint: Checkpoint) -> tuple[int, int]:
    """(in_max, out_max) as PEFT finds them: the elementwise maximum over the layers it adapts."""
    linears = [checkpoint.linears[module] for module in adapter.vectors]
    return max(linear.in_features for linear in linears), max(linear.out_features for linear in linears)


def _size_note(adapter: Adapter, checkpoint: Checkpoint, spec: ProjectionSpec) -> tuple[str, ...]:
    in_max, out_max = _sizes(adapter, checkpoint)
    if (in_max, out_max) == (spec.in_max, spec.out_max):
        return ()
    return (
        f"the saved projections are made for {spec.in_max} inputs and {spec.out_max} outputs, but the "
        f"adapted layers need {in_max} and {out_max}: the adapter was added to a model that had another one, "
        "and only the saved projections are right for it",
    )


def _from_saved(adapter: Adapter, a: Float32, b: Float32, asked: ProjectionDtype | None) -> Provenance:
    def spec_of(rounding: ProjectionDtype, fused: bool) -> ProjectionSpec:
        return ProjectionSpec(adapter.seed, adapter.rank, a.shape[1], b.shape[0], rounding, fused)

    for fused, rounding in itertools.product((True, False), ROUNDINGS):
        spec = spec_of(rounding, fused)
        if all(np.array_equal(saved, drawn) for saved, drawn in _beside(a, b, spec)):
            if asked not in (None, rounding):
                raise MismatchError(
                    f"the projections saved in {adapter.path} are those of seed {adapter.seed} rounded to "
                    f"{rounding}, not to {asked}; leave --projection-rounding out"
                )
            how = f"the saved projections equal what seed {adapter.seed} gives, {_form(spec)}, bit for bit"
            return Provenance(spec, Projections(spec, a, b), how, verified=True, from_seed=True)
    rounding = next(name for name in reversed(ROUNDINGS) if _representable(a, b, name))
    spec = spec_of(rounding, True)
    how = (
        f"the saved projections are used as they are, for seed {adapter.seed} doesn't give them: "
        f"{_difference(a, b, spec)}"
    )
    return Provenance(spec, Projections(spec, a, b), how, verified=False, from_seed=False)


def _beside(a: Float32, b: Float32, spec: ProjectionSpec) -> Iterator[tuple[Float32, Float32]]:
    """Pieces of the saved projections, each with what the spec draws there."""
    saved = {"vera_A": a.reshape(-1), "vera_B": b.reshape(-1)}
    for name, start, drawn in stream(spec):
        yield saved[name][start : start + drawn.size], drawn


def _representable(a: Float32, b: Float32, rounding: ProjectionDtype) -> bool:
    return all(np.array_equal(array, round_to(array, rounding)) for array in (a, b))


def _difference(a: Float32, b: Float32, spec: ProjectionSpec) -> str:
    different, largest = 0, 0.0
    for saved, drawn in _beside(a, b, spec):
        distance = np.abs(saved.astype(np.float64) - drawn)
        different += int(np.count_nonzero(distance))
        largest = max(largest, float(distance.max()))
    share = different / spec.elements
    return f"{share:.1%} of the values differ from those drawn {_form(spec)}, by at most {largest:.2g}"


def _form(spec: ProjectionSpec) -> str:
    kept = "unrounded" if spec.rounding == "float32" else f"rounded to {spec.rounding}"
    return kept if spec.fused else f"{kept}, by torch's kernel without fused multiply-add"
