"""Works out which projections an adapter was trained with, and says how that was found.

The seed alone doesn't tell. PEFT rounds what it drew to the dtype of the layers it adapted, its rule for
4-bit layers changed in 0.19, and the adapter's config records none of it. Where the projections were saved
they are the truth, and are compared with everything the seed could have given. Where they weren't, the base
tells their size and its dtype, and `peft_version` tells which rule held.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vera_edge.adapter import Adapter
from vera_edge.checkpoint import Checkpoint
from vera_edge.errors import AdapterError, MismatchError
from vera_edge.fit import check_fit
from vera_edge.formats import StoredLinear
from vera_edge.projection import (
    ROUNDINGS,
    Projections,
    ProjectionSpec,
    Rounding,
    regenerate,
    round_to,
    stream,
)
from vera_edge.tensors import Float32

__all__ = ["Provenance", "check_fit", "resolve", "verify"]

_ASK = "give the dtype with --projection-dtype float32, bfloat16 or float16"
# As torch spells them, as vera-edge's weight formats do, and as safetensors does.
_SPELLINGS: Mapping[Rounding, tuple[str, ...]] = {
    "float32": ("float32", "fp32", "F32"),
    "bfloat16": ("bfloat16", "bf16", "BF16"),
    "float16": ("float16", "fp16", "F16"),
}
_STORAGES = {"float32": "uint8 or float32", "bfloat16": "bfloat16", "float16": "float16"}
_NAMES: Mapping[str, Rounding] = {name: key for key, names in _SPELLINGS.items() for name in names}


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
    adapter: Adapter, checkpoint: Checkpoint | None = None, projection_dtype: str | None = None
) -> Provenance:
    """Find the projections `adapter` was trained with.

    projection_dtype: what to round to ("float32", "bfloat16", "float16", or fp32, bf16, fp16), when the
        base can't tell.
    Raises AdapterError when neither tells, MismatchError when adapter and base don't belong together or
    `projection_dtype` contradicts the saved projections.
    """
    if projection_dtype is not None and projection_dtype not in _NAMES:
        raise AdapterError(f"projection dtype {projection_dtype!r} isn't known; {_ASK}")
    asked = None if projection_dtype is None else _NAMES[projection_dtype]
    notes = check_fit(adapter, checkpoint) if checkpoint is not None else ()
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
    rounding, how = (asked, f"as asked, rounded to {asked}") if asked else _infer(adapter, checkpoint)
    spec = ProjectionSpec(adapter.seed, adapter.rank, in_max, out_max, rounding)
    return Provenance(
        spec,
        regenerate(spec),
        f"drawn from seed {adapter.seed}; {how}",
        verified=False,
        from_seed=True,
        notes=notes,
    )


def verify(
    adapter: Adapter, checkpoint: Checkpoint | None = None, projection_dtype: str | None = None
) -> Provenance:
    """`resolve`, and raise when there are no saved projections or the seed doesn't give them."""
    if adapter.saved is None:
        raise AdapterError(
            f"{adapter.path} doesn't hold its projections, so there is nothing to verify them against; "
            "train with save_projection=True to keep them"
        )
    found = resolve(adapter, checkpoint, projection_dtype)
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


def _from_saved(adapter: Adapter, a: Float32, b: Float32, asked: Rounding | None) -> Provenance:
    def spec_of(rounding: Rounding, fused: bool) -> ProjectionSpec:
        return ProjectionSpec(adapter.seed, adapter.rank, a.shape[1], b.shape[0], rounding, fused)

    for fused, rounding in itertools.product((True, False), ROUNDINGS):
        spec = spec_of(rounding, fused)
        if all(np.array_equal(saved, drawn) for saved, drawn in _beside(a, b, spec)):
            if asked not in (None, rounding):
                raise MismatchError(
                    f"the projections saved in {adapter.path} are those of seed {adapter.seed} rounded to "
                    f"{rounding}, not to {asked}; leave --projection-dtype out"
                )
            how = f"the saved projections equal what seed {adapter.seed} gives, {_form(spec)}, bit for bit"
            return Provenance(spec, Projections(spec, a, b), how, verified=True, from_seed=True)
    rounding = next(name for name in ("bfloat16", "float16", "float32") if _representable(a, b, name))
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


def _representable(a: Float32, b: Float32, rounding: Rounding) -> bool:
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


def _infer(adapter: Adapter, checkpoint: Checkpoint) -> tuple[Rounding, str]:
    """What PEFT rounded to, and why, from the base's layers and the PEFT version."""
    reasons: dict[Rounding, str] = {}
    for module in adapter.vectors:
        rounding, why = _layer_rounding(adapter, checkpoint, checkpoint.linears[module])
        reasons.setdefault(rounding, why)
    # The layers share one pair of buffers, cast to each layer's dtype in turn: the coarsest cast remains.
    coarse = [rounding for rounding in reasons if rounding != "float32"]
    if len(coarse) > 1:
        raise AdapterError(
            f"{adapter.path} adapts layers that PEFT rounds to bfloat16 and others it rounds to float16, one "
            "after the other, so neither gives its projections; train with save_projection=True to keep them"
        )
    rounding = coarse[0] if coarse else "float32"
    return rounding, reasons[rounding]


def _layer_rounding(adapter: Adapter, checkpoint: Checkpoint, linear: StoredLinear) -> tuple[Rounding, str]:
    """What PEFT rounds the shared projections to when it adapts this layer, and why."""
    if linear.format in _NAMES:
        rounding = _NAMES[linear.format]
        return rounding, f"PEFT {_does(rounding)} on a base in {rounding}"
    if linear.format == "int8":
        return "float32", "PEFT leaves them as drawn on an 8-bit base"
    if linear.format in ("nf4", "fp4"):
        return _four_bit_rounding(adapter, checkpoint.config, linear)
    raise AdapterError(
        f"how PEFT rounded the projections on a {linear.format} base isn't known ({linear.module}); {_ASK}"
    )


def _four_bit_rounding(
    adapter: Adapter, config: Mapping[str, Any], linear: StoredLinear
) -> tuple[Rounding, str]:
    """PEFT 0.19 and later round to the 4-bit layer's compute dtype, earlier ones to its storage dtype.

    See https://github.com/huggingface/peft/pull/2893.
    """
    quantization = config.get("quantization_config")
    given = quantization.get("bnb_4bit_compute_dtype") if isinstance(quantization, Mapping) else None
    compute = _NAMES.get(str(given or "float32").removeprefix("torch."))
    if compute is None:
        raise AdapterError(
            f"bnb_4bit_compute_dtype {given!r} of the base isn't a dtype PEFT rounds to; {_ASK}"
        )
    storage = _NAMES.get(str(linear.params.get("storage")), "float32")
    if compute == storage:
        return compute, f"PEFT of any version {_does(compute)} on a 4-bit base that computes in {compute}"
    newer = _rounds_to_compute_dtype(adapter.peft_version)
    if newer is None:
        raise AdapterError(
            f"PEFT {adapter.peft_version} may have rounded the projections of {adapter.path} to {compute} or "
            f"to {storage}; {_ASK}"
        )
    name = adapter.peft_version or "before 0.18.1 (it records no version)"
    if newer:
        return compute, f"PEFT {name} {_does(compute)} on a 4-bit base that computes in {compute}"
    return storage, f"PEFT {name} {_does(storage)} on a 4-bit base stored as {_STORAGES[storage]}"


def _does(rounding: Rounding) -> str:
    return "leaves them as drawn" if rounding == "float32" else f"rounds them to {rounding}"


def _rounds_to_compute_dtype(version: str | None) -> bool | None:
    """Whether this PEFT rounds to the compute dtype; None for a development version that may or may not.

    PEFT before 0.18.1 writes no version, so none at all means an old one.
    """
    if version is None:
        return False
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)$", version)
    if match is None:
        return None
    release = (int(match[1]), int(match[2]), int(match[3]))
    if "dev" in match[4] and (0, 18, 1) <= release <= (0, 19, 0):
        return None
    return release >= (0, 19, 0)
