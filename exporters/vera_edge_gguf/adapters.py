"""Adapters beside a base: each as a GGUF LoRA file, which llama.cpp swaps as it runs.

A LoRA's pairs go straight through. VeRA's is the exact bridge: `diag(b) B diag(d) A x = B' A' x` with
`A' = diag(d) A[:, :in]` and `B' = diag(b) B[:out]`, as in `vera_edge.combining.to_lora`. llama.cpp scales by
alpha over the rank of the pair it reads; alpha is written as the largest rank, and B takes what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.reading import title_of
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting.exported_adapters import names, trained_whole
from vera_edge.exporting.exporter import ExportRequest
from vera_edge_gguf import blocks, file
from vera_edge_gguf.families import Family
from vera_edge_gguf.tensor_names import Named

PROJECTIONS = "projections"  # the option that says what A' and B' are stored as
_STORED = ("fp32", "fp16")


def check(request: ExportRequest) -> None:
    """Raise TargetError when no LoRA can stand for an adapter, PlanError on what factors are stored as."""
    if request.options.get(PROJECTIONS, _STORED[0]) not in _STORED:
        raise PlanError(f"a GGUF LoRA is stored as {' or '.join(_STORED)}")
    if request.plan.mode != "branch":
        if PROJECTIONS in request.options:
            raise PlanError("a merged export holds no projections to store; leave --store-projections out")
        return
    names(request)
    for adapter, _ in request.model.adapters:
        if not adapter.adds:
            raise TargetError(
                f"{adapter.path} ({title_of(adapter)}) doesn't only add to weights, which a GGUF LoRA can't "
                "carry; use --mode merged"
            )
        if more := trained_whole(request, adapter):
            raise TargetError(
                f"{adapter.path} also trained {more[0]}, which a GGUF LoRA doesn't carry; use --mode merged"
            )


def write(
    request: ExportRequest, stage: Path, family: Family, tensors: Mapping[str, Named]
) -> dict[str, str]:
    """Write one file for each adapter; its name -> the file within `stage`.

    tensors: what the base's file holds, by module. Raises TargetError for a module that isn't in it.
    """
    files = {}
    (stage / "adapters").mkdir()
    for name, (adapter, weight) in zip(names(request), request.model.adapters, strict=True):
        files[name] = f"adapters/{name}.gguf"
        metadata = {
            "general.type": "adapter",
            "general.name": name,
            "adapter.type": "lora",
            "adapter.lora.alpha": float(adapter.rank),
            "vera_edge.adapters": adapter.digest,
            "vera_edge.base": request.model.checkpoint.digest,
            "vera_edge.projections": request.model.projection_digest or "",
        }
        factors = _factors(request, adapter, weight, tensors)
        file.write(stage / files[name], family.architecture, metadata, factors, request.progress)
    return files


def _factors(
    request: ExportRequest, adapter: Adapter, weight: float, tensors: Mapping[str, Named]
) -> Iterator[file.Tensor]:
    stored = request.options.get(PROJECTIONS, _STORED[0])
    for module in sorted(adapter.vectors):
        if module not in tensors:
            raise TargetError(
                f"{adapter.path} adapts {module}, no tensor of its own in llama.cpp; use --mode merged"
            )
        out, inside = request.model.checkpoint.linear(module).shape
        named = tensors[module]
        change = adapter.vectors[module]
        rank = change.rank if isinstance(change, LoraPair) else adapter.rank
        lower = partial(_lower, request, adapter, module, inside, stored)
        yield file.Tensor(f"{named.name}.lora_a", stored, (rank, inside), lower)
        upper = partial(_upper, request, adapter, module, out, weight, named, stored)
        yield file.Tensor(f"{named.name}.lora_b", stored, (out, rank), upper)


def _lower(
    request: ExportRequest, adapter: Adapter, module: str, inside: int, stored: str
) -> npt.NDArray[Any]:
    change, projections = adapter.vectors[module], request.model.projections
    if isinstance(change, LoraPair):
        return blocks.rounded(module, change.a, stored)
    assert isinstance(change, LambdaVectors) and projections is not None
    values = change.lambda_d[:, None] * projections.a[:, :inside]
    return blocks.rounded(module, values, stored)


def _upper(
    request: ExportRequest, adapter: Adapter, module: str, out: int, weight: float, named: Named, stored: str
) -> npt.NDArray[Any]:
    change, projections = adapter.vectors[module], request.model.projections
    if isinstance(change, LoraPair):
        scale = np.float32(weight * change.scale * change.rank / adapter.rank)
        return blocks.rounded(module, named.rows(scale * change.b), stored)
    assert isinstance(change, LambdaVectors) and projections is not None
    lambda_b = np.float32(weight) * change.lambda_b
    values = lambda_b[:, None] * projections.b[:out]
    return blocks.rounded(module, named.rows(values), stored)
