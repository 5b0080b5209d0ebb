"""Adapters beside a base: each as a GGUF LoRA file, which llama.cpp swaps as it runs.

A LoRA's pairs go straight through, and so does the pair that another method's change is, where it is of low
rank (`vera_edge.exporting.branch_form`). VeRA's is the exact bridge: `diag(b) B diag(d) A x = B' A' x` with
`A' = diag(d) A[:, :in]` and `B' = diag(b) B[:out]`, as in `vera_edge.combining.to_lora`. llama.cpp scales by
alpha over the rank of the pair it reads; alpha is written as the largest rank, and B takes what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.reading import can_branch, title_of
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting.branch_form import BIASES, PAIRS, VECTORS, forms_of, kinds_of
from vera_edge.exporting.exported_adapters import names, trained_whole
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.progress import Progress, silent
from vera_edge.reference.loading import config_of
from vera_edge.tasks import task as tasks
from vera_edge.trained.trained_model import TrainedModel
from vera_edge_gguf import blocks, file
from vera_edge_gguf.families import Family, family_of
from vera_edge_gguf.tensor_names import Named, by_module, named

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
        _check(request.model.checkpoint, adapter)


def _check(checkpoint: Checkpoint, adapter: Adapter) -> None:
    if not can_branch(adapter) or set(kinds_of(adapter)) - {VECTORS, PAIRS, BIASES}:
        raise TargetError(
            f"{adapter.path} ({title_of(adapter)}) doesn't only add products of two thin matrices to "
            "weights, which is what a GGUF LoRA carries; use --mode merged"
        )
    biases = sorted(kinds_of(adapter).get(BIASES, ()))
    if more := trained_whole(checkpoint, adapter) or biases:
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
    stored = request.options.get(PROJECTIONS, _STORED[0])
    (stage / "adapters").mkdir()
    for name, (adapter, weight) in zip(names(request), request.model.adapters, strict=True):
        files[name] = f"adapters/{name}.gguf"
        lora = _Lora(request.model, adapter, weight, stored)
        lora.write(stage / files[name], name, family, tensors, request.progress)
    return files


def pack(model: TrainedModel, out: Path, stored: str, name: str) -> None:
    """Write the one adapter of `model` for an exported base; stored: "fp32" or "fp16".

    Raises TargetError when no LoRA can stand for it.
    """
    ((adapter, weight),) = model.adapters
    _check(model.checkpoint, adapter)
    family = family_of(tasks.architecture(model.checkpoint.config))
    weights = (f"{module}.weight" for module in adapter.vectors)
    tensors = by_module(named(weights, config_of(model.checkpoint), family))
    _Lora(model, adapter, weight, stored).write(out, name, family, tensors, silent)


@dataclass(frozen=True)
class _Lora:
    """An adapter on its way into a file. stored: what its factors are stored as."""

    model: TrainedModel
    adapter: Adapter
    weight: float
    stored: str

    def write(
        self, out: Path, name: str, family: Family, tensors: Mapping[str, Named], progress: Progress
    ) -> None:
        metadata = {
            "general.type": "adapter",
            "general.name": name,
            "adapter.type": "lora",
            "adapter.lora.alpha": float(self._alpha),
            "vera_edge.adapters": self.adapter.digest,
            "vera_edge.base": self.model.checkpoint.digest,
            "vera_edge.projections": self.model.projection_digest or "",
        }
        file.write(out, family.architecture, metadata, self._factors(tensors), progress)

    @cached_property
    def _pairs(self) -> Mapping[str, LoraPair]:
        """By module, of another method than VeRA. Raises MismatchError where a change is of no low rank."""
        if self.adapter.is_vera:
            return {}
        forms = forms_of(self.adapter, self.model.checkpoint)
        return {module: form.pair for module, form in forms.items() if form.pair is not None}

    @cached_property
    def _alpha(self) -> int:
        return max((pair.rank for pair in self._pairs.values()), default=self.adapter.rank)

    def _factors(self, tensors: Mapping[str, Named]) -> Iterator[file.Tensor]:
        for module in sorted(self.adapter.vectors):
            if module not in tensors:
                raise TargetError(
                    f"{self.adapter.path} adapts {module}, no tensor of its own in llama.cpp; use "
                    "--mode merged"
                )
            out, inside = self.model.checkpoint.linear(module).shape
            named, pair = tensors[module], self._pairs.get(module)
            rank = self.adapter.rank if pair is None else pair.rank
            lower = partial(self._lower, module, inside)
            yield file.Tensor(f"{named.name}.lora_a", self.stored, (rank, inside), lower)
            upper = partial(self._upper, module, out, named)
            yield file.Tensor(f"{named.name}.lora_b", self.stored, (out, rank), upper)

    def _lower(self, module: str, inside: int) -> npt.NDArray[Any]:
        if (pair := self._pairs.get(module)) is not None:
            return blocks.rounded(module, pair.a, self.stored)
        change, projections = self.adapter.vectors[module], self.model.projections
        assert isinstance(change, LambdaVectors) and projections is not None
        values = change.lambda_d[:, None] * projections.a[:, :inside]
        return blocks.rounded(module, values, self.stored)

    def _upper(self, module: str, out: int, named: Named) -> npt.NDArray[Any]:
        if (pair := self._pairs.get(module)) is not None:
            # llama.cpp multiplies by alpha over this pair's rank.
            scale = np.float32(self.weight * pair.scale * pair.rank / self._alpha)
            return blocks.rounded(module, named.rows(scale * pair.b), self.stored)
        change, projections = self.adapter.vectors[module], self.model.projections
        assert isinstance(change, LambdaVectors) and projections is not None
        lambda_b = np.float32(self.weight) * change.lambda_b
        values = lambda_b[:, None] * projections.b[:out]
        return blocks.rounded(module, named.rows(values), self.stored)
