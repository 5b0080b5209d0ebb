"""What a bundle is made from: base, adapter and projections as read, and what determines its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import vera_edge
from vera_edge import versions
from vera_edge.adapters.adapter import Adapter, WeightedAdapter
from vera_edge.adapters.projection import Projections, ProjectionSpec
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError
from vera_edge.releasing.cache import Store
from vera_edge.releasing.job import ReleaseJob
from vera_edge.releasing.trained import TrainedFolder, folder_of
from vera_edge.requantize import devices
from vera_edge.trained import model as trained_base
from vera_edge.trained import provenance
from vera_edge.trained.trained_model import TrainedModel

_TOOLS = ("numpy", "peft", "tokenizers", "torch", "transformers")
# What takes part beside them: in most targets, and in others. llama.cpp measures.
_OF_ONNX = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")
_OF_TARGETS = {"gguf": ("gguf", "llama-cpp-python")}

# What a variant is called, and where its files are, changes no byte of the export.
_NOT_BYTES = {"id", "adapters", "calibration", "compute_device", "plan"}


@cache
def tools(target: str = "onnx") -> Mapping[str, str]:
    """Versions of everything whose change may change a bundle's bytes."""
    names = sorted((*_TOOLS, *_OF_TARGETS.get(target, _OF_ONNX)))
    return MappingProxyType({"vera-edge": vera_edge.__version__} | versions.installed(names))


@dataclass(frozen=True)
class ReleaseInputs:
    """The adapter as read, its base, VeRA's projections, and what determines the export, as JSON.

    trained: the folder that the adapter was read from. notes: sentences for a person to read.
    """

    adapter: Adapter
    checkpoint: Checkpoint
    projections: Projections | None
    base_digest: str
    facts: dict[str, Any]
    trained: TrainedFolder
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> ProjectionSpec | None:
        """What says how A and B are drawn."""
        return None if self.projections is None else self.projections.spec

    @property
    def model(self) -> TrainedModel:
        """The adapter on its base."""
        return TrainedModel(self.checkpoint, (WeightedAdapter(self.adapter, 1.0),), self.projections)


def read(job: ReleaseJob, store: Store) -> ReleaseInputs:
    """What a job is made from. Raises a VeraEdgeError when something of it can't be read or doesn't fit."""
    base = job.recipe.base(job.adapter.base)
    base_path = job.recipe.path(base.path)
    trained = folder_of(job, store, dict(tools()))
    checkpoint, ((adapter, _),) = trained_base.read(base_path, [(trained.path, 1.0)], None, base.spec)
    found = provenance.source_of(adapter, checkpoint, trained.rounding)
    base_digest = store.folder_digest(base_path)
    facts = {
        "calibration": job.recipe.mixture(job.variant.calibration).digest(),
        "base": base_digest,
        "adapter": adapter.digest,
        "projections": None if found.projections is None else found.projections.digest,
        "trained": _trained(checkpoint),
        "variant": job.variant.model_dump(exclude=_NOT_BYTES, exclude_none=True),
        "tools": dict(tools(job.variant.target)),
    }
    if base.spec is not None:
        facts["trained_as"] = str(base.spec)
    if (device := devices.told(devices.chosen(job.variant.compute_device or devices.CPU))) is not None:
        facts["compute_device"] = device
    if job.variant.plan is not None:
        facts["plan"] = store.file_digest(job.recipe.path(job.variant.plan))
    return ReleaseInputs(adapter, checkpoint, found.projections, base_digest, facts, trained, found.notes)


def _trained(checkpoint: Checkpoint) -> dict[str, Any]:
    """What else of the adapter's folder changes a bundle, graphs that adapters share among them."""
    whole = checkpoint.overlay.digests if checkpoint.overlay is not None else {}
    return {"files": checkpoint.files.digest, "tensors": whole}


def check(job: ReleaseJob, digests: Mapping[str, str]) -> None:
    """Raise MismatchError unless base and adapter have these digests ("base" and "adapter")."""
    inputs = read(job, Store(job.store))
    for kind, found in (("base", inputs.base_digest), ("adapter", inputs.adapter.digest)):
        if digests.get(kind) != found:
            raise MismatchError(
                f"the {kind} here isn't the one that {job.name} was made from; give its inputs"
            )
