"""Exports a decoder as a folder with one GGUF file, which llama.cpp opens as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting.exporter import Export, ExportRequest
from vera_edge.merging.computed import ComputedTensors, open_computed
from vera_edge.plans import plan as plans
from vera_edge.reference.loading import config_of
from vera_edge.storage import side_files
from vera_edge.storage.files import staged_folder, write_atomic
from vera_edge.storage.json_text import read_json, settings_json
from vera_edge.tasks import task as tasks
from vera_edge_gguf import adapters, blocks, file, imatrix, tensor_types
from vera_edge_gguf.families import Family, family_of
from vera_edge_gguf.hyperparameters import hyperparameters
from vera_edge_gguf.manifest_fields import describe, manifest_fields
from vera_edge_gguf.tensor_names import EMBEDDING, HEAD, Named, by_module, named
from vera_edge_gguf.vocabulary import vocabulary

MODEL = "model.gguf"
_OPTIONS = ("head", adapters.PROJECTIONS, imatrix.OPTION)
_QUANTIZATION_VERSION = 2  # of the layout of blocks in ggml
_ORIGINS = ("_name_or_path", "_model_name_or_path")


def export(request: ExportRequest, target: str) -> Export:
    """Write `request.out`, whole or not at all.

    Raises TargetError when llama.cpp can't have the model, PlanError on an option that isn't known.
    """
    _check(request, target)
    family = family_of(tasks.architecture(request.model.checkpoint.config))
    with staged_folder(request.out, request.force) as stage:
        with tempfile.TemporaryDirectory(prefix=".work-", dir=stage) as scratch:
            copy = _float_model(request, Path(scratch) / "float")
            tensors, notes = _write(request, copy, family, stage)
            if (form := request.options.get(imatrix.OPTION)) is not None:
                found, note = imatrix.measure(copy, by_module(tensors), request.text, request.progress)
                imatrix.write(stage / f"imatrix.{form}", family.architecture, found, request.progress)
                notes = (*notes, note)
            _side_files(copy.path, stage)
        files = {}
        if request.plan.mode == "branch":
            files = adapters.write(request, stage, family, by_module(tensors))
        manifest = bundle.write(stage, manifest_fields(request, MODEL, files), request.progress)
    return Export(
        target,
        request.out,
        request.out / MODEL,
        manifest.size,
        request.plan,
        adapters={name: request.out / path for name, path in files.items()},
        notes=(*notes, *tensor_types.notes(request.plan)),
    )


def _check(request: ExportRequest, target: str) -> None:
    if unknown := sorted(set(request.options) - set(_OPTIONS)):
        raise PlanError(f"the target {target} takes no option {unknown[0]!r}; it takes {', '.join(_OPTIONS)}")
    adapters.check(request)
    imatrix.check(request.options)
    if request.corrections:
        raise TargetError("GGUF has no place for a low-rank term or a bias of a layer's own; leave it out")


def _float_model(request: ExportRequest, folder: Path) -> Checkpoint:
    """The model in float32: merged, or the base that adapters stay beside.

    Its weights are computed when they're read; what an importance matrix is measured on lies in `folder`.
    """
    model = request.model if request.plan.mode == "merged" else replace(request.model, adapters=())
    plan = plans.plan_model(model, "merged", "fp32")
    if imatrix.OPTION not in request.options:
        return open_computed(plan, model, folder)
    merge.write(plan, model, folder, request.progress)
    return Checkpoint.open(folder)


def _write(
    request: ExportRequest, copy: Checkpoint, family: Family, stage: Path
) -> tuple[tuple[Named, ...], tuple[str, ...]]:
    """Write the model's file; its tensors, and notes for a person."""
    config = config_of(copy)
    told = hyperparameters(config, family)
    tensors = named(_sources(copy, config), config, family)
    tied = all(tensor.name != HEAD for tensor in tensors)
    embedding = next(tensor.source for tensor in tensors if tensor.name == EMBEDDING)
    rows, width = copy.tensors[embedding].shape
    words = vocabulary(copy.path, rows)
    ends = tensor_types.ends(tensor_types.base_type(request.plan), width, tied, request.options.get("head"))
    source = _Source(request, copy, family, ends)
    metadata = {
        "general.type": "model",
        **describe(request),
        "general.file_type": tensor_types.file_type(request.plan),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **told.metadata,
        f"{family.architecture}.vocab_size": rows,
        **words.metadata,
    }
    extra = [file.held(name, values) for name, values in told.tensors.items()]
    file.write(
        stage / MODEL,
        family.architecture,
        metadata,
        [*extra, *map(source.tensor, tensors)],
        request.progress,
    )
    return tensors, (*told.notes, *words.notes)


def _sources(copy: Checkpoint, config: Any) -> Iterator[str]:
    """The tensors of the model, a tied output head left out."""
    for name in copy.tensors:
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            yield name


@dataclass(frozen=True)
class _Source:
    """Where the bytes of every tensor come from: codes that were rounded with care, else the float copy."""

    request: ExportRequest
    copy: Checkpoint
    family: Family
    ends: tensor_types.EndTypes

    def tensor(self, wanted: Named) -> file.Tensor:
        """A tensor to be written; its values are read when its turn comes."""
        shape = self._shape(wanted)
        return file.Tensor(wanted.name, self._stored(wanted, shape), shape, partial(self._data, wanted))

    @property
    def _steps(self) -> Mapping[str, plans.Step]:
        return {step.module: step for step in self.request.plan.steps}

    def _shape(self, wanted: Named) -> tuple[int, ...]:
        """Rows first, as the file has it."""
        shape = self.copy.tensors[wanted.source].shape
        return shape[::-1] if self._transposed(wanted) else shape

    def _transposed(self, wanted: Named) -> bool:
        module = wanted.source.removesuffix(".weight")
        return module in self.copy.linears and self.copy.is_conv1d(module)

    def _stored(self, wanted: Named, shape: tuple[int, ...]) -> str:
        if wanted.name == EMBEDDING:
            return self.ends.embedding
        if wanted.name == HEAD:
            return self.ends.head
        step = self._steps.get(wanted.source.removesuffix(".weight"))
        return "fp32" if step is None or len(shape) != 2 else step.result

    def _data(self, wanted: Named) -> npt.NDArray[Any]:
        codes = self.request.requantized.get(wanted.source.removesuffix(".weight"))
        if codes is not None and wanted.name not in (EMBEDDING, HEAD):
            stored = {name: wanted.rows(array) for name, array in (codes.stored or {}).items()}
            scales = wanted.rows(codes.scales)
            return blocks.packed(
                replace(codes, codes=wanted.rows(codes.codes), scales=scales, stored=stored or None)
            )
        shape, tensors = self._shape(wanted), self.copy.tensors
        if isinstance(tensors, ComputedTensors) and len(shape) == 2 and not wanted.heads:
            rows = tensors.rows(wanted.source)  # of a large table in float32 never more than a piece
            return blocks.rounded_rows(wanted.name, rows, self._stored(wanted, shape), shape)
        values = self.copy.float32(wanted.source)
        if self._transposed(wanted):
            values = np.ascontiguousarray(values.T)
        if self.family.norm_shift and wanted.source.endswith("norm.weight"):
            values = values + np.float32(1)
        return blocks.rounded(wanted.name, wanted.rows(values), self._stored(wanted, values.shape))


def _side_files(source: Path, stage: Path) -> None:
    """The tokenizer's files and config.json, by which vera-edge reads text for the model."""
    config = read_json(source / "config.json", TargetError)
    kept = {key: value for key, value in config.items() if key not in _ORIGINS}
    write_atomic(stage / "config.json", settings_json(kept))
    side_files.copy(source, stage)
