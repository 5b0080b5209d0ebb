"""What a request's adapters touch, and their files beside a graph with side-branches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from vera_edge.adapters.adapter import Adapter, WeightedAdapter
from vera_edge.adapters.reading import can_branch, title_of
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting import branch_form, branch_inputs
from vera_edge.exporting import onnx_adapter as packing
from vera_edge.exporting.branch_form import BIASES, INPUTS, Forms, forms_of, kinds_of
from vera_edge.exporting.branch_inputs import BranchInputs, Piece, rank_of, shared_of
from vera_edge.exporting.exported_adapters import names, trained_whole
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json
from vera_edge_onnx.graph.sites import Site

VECTORS = "vectors"
_DTYPES = {"fp32": "float32", "fp16": "float16"}


def vector_dtype(request: ExportRequest) -> str:
    """The dtype of the graph's inputs for the vectors, and of the files that bring them.

    Raises PlanError for another one than these two, or where there are no vectors.
    """
    asked = request.options.get(VECTORS, "fp32")
    if asked not in _DTYPES:
        raise PlanError(f"vectors can't be stored as {asked!r}; choose from {', '.join(_DTYPES)}")
    if VECTORS in request.options and request.plan.mode != "branch":
        raise PlanError(
            "a merged adapter leaves no vectors to store; leave vectors out, or add --mode branch"
        )
    return _DTYPES[asked]


def check(request: ExportRequest) -> None:
    """Raise TargetError when a side-branch can't carry what an adapter trained, PlanError on dtype or name.

    PEFT saves the weight of an output head beside its vectors; a copy of the base's changes nothing.
    """
    vector_dtype(request)
    if request.plan.mode == "branch":
        names(request)
    for adapter, _ in request.model.adapters if request.plan.mode == "branch" else ():
        if not can_branch(adapter):
            raise TargetError(
                f"{adapter.path} is an adapter of {title_of(adapter)}, which can't stand beside a layer; use "
                "--mode merged"
            )
        carried = kinds_of(adapter).get(BIASES, frozenset())
        if more := [name for name in trained_whole(request.model.checkpoint, adapter) if name not in carried]:
            raise TargetError(
                f"{adapter.path} also trained {more[0]}, which a side-branch doesn't carry; use --mode merged"
            )


def sizes(request: ExportRequest) -> dict[str, int]:
    """Output features of every module that an adapter touches, in the order of their names."""
    modules = sorted({module for adapter, _ in request.model.adapters for module in adapter.vectors})
    return {module: request.model.checkpoint.linear(module).out_features for module in modules}


def inputs(request: ExportRequest) -> BranchInputs:
    """What the graph's inputs for adapters have room for; none where they are merged."""
    if request.plan.mode != "branch":
        return BranchInputs({}, {})
    modules: dict[str, set[str]] = {}
    rank = 0
    for adapter, _ in request.model.adapters:
        for kind, own in kinds_of(adapter).items():
            modules.setdefault(kind, set()).update(own)
        rank = max(rank, 0 if adapter.is_vera else rank_of(_forms(request, adapter)))
    shapes = {module: request.model.checkpoint.linear(module).shape for module in sizes(request)}
    return BranchInputs(shapes, {kind: frozenset(own) for kind, own in modules.items()}, rank)


def unlike(request: ExportRequest) -> list[WeightedAdapter]:
    """The adapters, of those of one method with inputs of the same kinds for the same layers the first."""
    found: dict[object, WeightedAdapter] = {}
    for adapter, weight in request.model.adapters:
        key = adapter.method, frozenset(kinds_of(adapter).items())
        found.setdefault(key, WeightedAdapter(adapter, weight))
    return list(found.values())


def has_vectors(request: ExportRequest) -> bool:
    """Whether a side-branch of the request is VeRA's, which has projections."""
    return request.plan.mode == "branch" and any(adapter.is_vera for adapter, _ in request.model.adapters)


def partial(request: ExportRequest, found: Sequence[Site]) -> bool:
    """Whether some modules of sites have inputs of their own that others lack, so that they can't be joined.

    A factor for what one of them reads is a change of what the others read.
    """
    modules = {part.module for site in found for part in site.parts}
    kinds = inputs(request).modules
    alone = len(modules) > 1 and not modules.isdisjoint(kinds.get(INPUTS, ()))
    return alone or any(len({module in own for module in modules}) > 1 for own in kinds.values())


def arrays(
    request: ExportRequest, adapter: Adapter, layout: Sequence[Piece], weight: float, dtype: str = "float32"
) -> dict[str, npt.NDArray[Any]]:
    """What the graph takes of an adapter, by the names of its inputs. layout: the pieces in its order."""
    found = inputs(request)
    if adapter.is_vera:
        return packing.vectors(adapter, found.pieces(branch_form.VECTORS, layout), weight, dtype)
    return branch_inputs.arrays(adapter, _forms(request, adapter), found, layout, weight, dtype)


def _forms(request: ExportRequest, adapter: Adapter) -> Forms:
    return forms_of(adapter, request.model.checkpoint)


def model_version(request: ExportRequest, layout: Sequence[Piece]) -> int:
    """The model version of every adapter that is packed for this export."""
    shared = shared_of(inputs(request), request.model.projection_digest)
    return packing.model_version(base_digest(request), shared, layout)


def base_digest(request: ExportRequest) -> str:
    """Of the base's tensors, and of those of an adapter's that a graph holds since the base lacks them."""
    overlay = request.model.checkpoint.overlay
    whole = {} if overlay is None else overlay.digests
    digest = request.model.checkpoint.digest
    return digest if not whole else sha256_bytes(canonical_json([digest, whole]))


def write(request: ExportRequest, stage: Path, layout: Sequence[Piece]) -> dict[str, str]:
    """One file for each adapter, name -> file within `stage`; the first is called default."""
    files: dict[str, str] = {}
    version, dtype = model_version(request, layout), vector_dtype(request)
    for name, (adapter, weight) in zip(names(request), request.model.adapters, strict=True):
        files[name] = f"adapters/{name}.onnx_adapter"
        packing.write(stage / files[name], arrays(request, adapter, layout, weight, dtype), version)
    return files
