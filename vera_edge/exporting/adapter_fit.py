"""Whether an adapter belongs in a branch bundle: its projections, kinds of values, layers and sizes.

ONNX Runtime would run one that doesn't without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections, ProjectionSpec, stream_digest
from vera_edge.adapters.reading import can_branch, title_of
from vera_edge.arrays import Float32
from vera_edge.base.overlay import digest_of
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import MismatchError
from vera_edge.exporting.branch_form import BIASES, INPUTS, OUTPUTS, PAIRS, VECTORS, kinds_of
from vera_edge.exporting.branch_inputs import BranchInputs

_NAMES = {
    VECTORS: "VeRA",
    PAIRS: "LoRA",
    OUTPUTS: "factors of outputs",
    INPUTS: "factors of inputs",
    BIASES: "biases",
}


def inputs_of(manifest: Manifest) -> BranchInputs:
    """What the inputs of the bundle's graph have room for."""
    shapes, rank = module_shapes(manifest), manifest.lora_rank or 0
    if not manifest.branches:
        return BranchInputs.plain(shapes, rank)
    modules = {kind: frozenset(names) for kind, names in manifest.branches.items()}
    return BranchInputs(shapes, modules, rank)


def module_shapes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that the bundle's graph has a side-branch for."""
    steps: Any = (manifest.plan or {}).get("steps", [])
    return {
        step["module"]: (int(step["shape"][0]), int(step["shape"][1]))
        for step in steps
        if step["action"] == "branch"
    }


def check(adapter: Adapter, manifest: Manifest, spec: ProjectionSpec | None = None) -> None:
    """Raise MismatchError unless `adapter` can run in the bundle that `manifest` describes."""
    where, inputs = f"the bundle {manifest.folder}", inputs_of(manifest)
    if manifest.mode != "branch" or not (manifest.projection or manifest.lora_rank or manifest.branches):
        raise MismatchError(f"{where} has its adapter merged; export it with --mode branch to swap adapters")
    if not can_branch(adapter):
        raise MismatchError(f"{adapter.path} is an adapter of {title_of(adapter)}, which can only be merged")
    kinds = kinds_of(adapter)
    for kind in kinds:
        if kind not in inputs.modules:
            whole = kind in (VECTORS, PAIRS)
            what = f"is an adapter of {title_of(adapter)}" if whole else f"brings {_NAMES[kind]}"
            others = " and ".join(_NAMES[other] for other in inputs.modules)
            raise MismatchError(
                f"{adapter.path} {what}, and the side-branches of {where} are for {others}; export it with "
                "one that has them (--adapter)"
            )
    if adapter.is_vera:
        _check_projections(adapter, manifest, where, spec)
    elif adapter.adds and adapter.rank > inputs.rank:
        raise MismatchError(
            f"{adapter.path} has rank {adapter.rank}, and the side-branches of {where} take LoRA up to rank "
            f"{inputs.rank}"
        )
    for kind, modules in kinds.items():
        if missing := sorted(modules - inputs.modules[kind]):
            raise MismatchError(f"{adapter.path} adapts {missing[0]}, which {where} has no side-branch for")
    _check_sizes(adapter, manifest, where)


def _check_sizes(adapter: Adapter, manifest: Manifest, where: str) -> None:
    """Raise MismatchError where layers have other sizes, or the adapter holds what no input takes."""
    shapes = module_shapes(manifest)
    for module, change in adapter.vectors.items():
        out, inside = shapes[module]
        sides = (("outputs", out, change.out_features), ("inputs", inside, change.in_features))
        for side, ours, theirs in sides:
            if theirs not in (None, ours):
                raise MismatchError(
                    f"{module} has {theirs} {side} in {adapter.path} and {ours} in {where}; the adapter "
                    "belongs to another base"
                )
    whole = manifest.base.get("trained", {})  # what the graph holds of the adapter it was exported with
    held = {name for name, tensor in adapter.modules_to_save.items() if whole.get(name) == digest_of(tensor)}
    biases = adapter.biases.keys() - kinds_of(adapter).get(BIASES, frozenset())
    tables = {f"{module}.weight" for module in adapter.embeddings}  # of which nothing is known without a base
    if more := sorted([*biases, *((adapter.modules_to_save.keys() | tables) - held)]):
        raise MismatchError(
            f"{adapter.path} also trained {more[0]}, which a side-branch can't carry; merge it"
        )


def _check_projections(adapter: Adapter, manifest: Manifest, where: str, spec: ProjectionSpec | None) -> None:
    """Raise MismatchError unless a VeRA adapter was trained with the projections of the bundle."""
    ours = manifest.projection
    assert ours is not None
    low = 0xFFFFFFFF  # torch uses the low 32 bits of a seed
    if adapter.rank != ours["rank"]:
        raise MismatchError(f"{adapter.path} has rank {adapter.rank} and {where} has rank {ours['rank']}")
    if adapter.seed & low != ours["seed"] & low:
        raise MismatchError(f"{adapter.path} has projection seed {adapter.seed}, {where} has {ours['seed']}")
    if spec is not None and (theirs := spec.to_dict()) != {key: ours[key] for key in spec.to_dict()}:
        field = next(key for key in theirs if theirs[key] != ours[key])
        raise MismatchError(
            f"{adapter.path} was trained with projections of {field} {theirs[field]}, and {where} has "
            f"{ours[field]}"
        )
    if adapter.saved is not None and _saved_digest(adapter.saved, ours) != ours["digest"]:
        raise MismatchError(f"the projections saved in {adapter.path} aren't those of {where}")
    if adapter.saved is None and spec is None and not _from_seed(ours):
        raise MismatchError(
            f"{adapter.path} doesn't hold its projections, and those of {where} aren't what its seed gives"
        )


def _from_seed(facts: Mapping[str, Any]) -> bool:
    """Whether a bundle's projections are those of its spec, and not some that an adapter brought."""
    return stream_digest(_spec(facts)) == facts["digest"]


def _spec(facts: Mapping[str, Any]) -> ProjectionSpec:
    return ProjectionSpec.from_dict({key: value for key, value in facts.items() if key != "digest"})


def _saved_digest(saved: tuple[Float32, Float32], facts: Mapping[str, Any]) -> str:
    spec = _spec(facts)
    if saved[0].shape != (spec.rank, spec.in_max) or saved[1].shape != (spec.out_max, spec.rank):
        return ""
    return Projections(spec, *saved).digest
