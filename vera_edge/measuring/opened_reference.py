"""Opens the model as trained, in its several shapes: an adapter and its base, a base alone, a branch export.

torch is imported only when something has to run in it; a float branch export is measured with numpy and ONNX
Runtime alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.bundle import contents as bundle
from vera_edge.errors import MismatchError, PlanError
from vera_edge.measuring.artefact import artefact, folder_bytes, weights_of
from vera_edge.measuring.exactness import unlike_trained
from vera_edge.measuring.reading import (
    check_measurable,
    context_of,
    exported_tokenizer,
    pooling_of,
    tokenizer_of,
)
from vera_edge.measuring.result import Artefact
from vera_edge.tasks import task as tasks
from vera_edge.trained import model as trained_base
from vera_edge.trained import provenance
from vera_edge.trained.trained_model import check_projections, check_together

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from vera_edge.device.runtime.pooling import Pooling
    from vera_edge.exporting.exporter import Runner
    from vera_edge.tasks.task import Task


@dataclass(frozen=True)
class OpenedReference:
    """The reference and its yardsticks; `base` is it without its adapter, `noise` it computed in bfloat16.

    `tokenizer` is None where its folders hold none; `folder` is where it was looked for. `checkpoint`,
    `adapters` and `projections` are there when it was opened from them, not from an export.
    """

    runner: Runner
    base: Runner | None
    noise: Runner | None
    artefact: Artefact
    base_artefact: Artefact | None
    folder: Path
    context: int | None
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    adapters: tuple[tuple[Adapter, float], ...] = ()
    projections: Projections | None = None
    digests: tuple[str, ...] = ()  # of the adapters that run
    tokenizer: Tokenizer | None = None
    pooling: Pooling | None = None

    @property
    def task(self) -> Task:
        """What the model does; a branch export that stands for it gives text."""
        return tasks.TEXT_GENERATION if self.checkpoint is None else tasks.of(self.checkpoint.config)


def open_trained(
    path: Path,
    base: Path | None = None,
    adapter_paths: Sequence[tuple[Path, float]] = (),
    projection_rounding: str | None = None,
    trained_as: TrainedAs | None = None,
    tokenizer: Path | None = None,
    max_memory: int | None = None,
) -> OpenedReference:
    """The model as trained from an adapter folder, a base folder (with `adapter_paths`), or a branch export.

    trained_as: how the base was loaded in training. tokenizer: a folder whose tokenizer reads the text,
    instead of the adapters' or the base's. max_memory: bytes, see `room.fits` and `exported_parts.fits`. An
    export has its base, adapter and projections in it, and takes no others. Raises a VeraEdgeError of the
    part that is at fault.
    """
    if (path / bundle.MANIFEST).is_file():
        given = {
            "base": base,
            "adapter": adapter_paths or None,
            "projection-rounding": projection_rounding,
            "trained-as": trained_as,
        }
        if named := [name for name, value in given.items() if value is not None]:
            raise PlanError(
                f"the reference {path} is an export, which has its own base, adapter and projections in it; "
                f"leave --{named[0]} out, or give the adapter or base folder as the reference"
            )
        return _trained_export(path, max_memory)
    if (path / adapters.CONFIG_NAME).is_file():
        adapter_paths = [(path, 1.0), *adapter_paths]
    elif base is not None:
        raise PlanError(f"the reference {path} is no adapter, but a base itself; leave --base out")
    if projection_rounding is not None and not adapter_paths:
        raise PlanError("--projection-rounding is for an adapter, and the reference has none; leave it out")
    base = base_folder(path, base)
    checkpoint, read = trained_base.read(base, adapter_paths, tokenizer, trained_as)
    return _trained_checkpoint(checkpoint, read, projection_rounding, max_memory)


def base_folder(path: Path, base: Path | None) -> Path:
    """The reference's base: `path` itself, or for an adapter `base`, or what its config names here."""
    if not (path / adapters.CONFIG_NAME).is_file():
        return path
    if base is not None:
        return base
    name = adapters.read(path).base_name
    if name is None or not Path(name).is_dir():
        raise MismatchError(
            f"{path} was trained on {name or 'a base it does not name'}, which isn't a folder here; "
            "give --base"
        )
    return Path(name)


def _trained_checkpoint(
    checkpoint: Checkpoint,
    read: tuple[tuple[Adapter, float], ...],
    projection_rounding: str | None,
    max_memory: int | None,
) -> OpenedReference:
    check_together(read)
    found = [provenance.source_of(adapter, checkpoint, projection_rounding) for adapter, _ in read]
    projections = check_projections(read, [one.projections for one in found])
    check_measurable(checkpoint)
    from vera_edge.reference import model as reference
    from vera_edge.reference import room

    light = not room.fits(checkpoint, max_memory)
    task = tasks.of(checkpoint.config).auto_class
    model = reference.open_reference(checkpoint, read, projections, task, light)
    notes = [note for one in found for note in (*one.notes, _how(one))]
    notes += [room.note(checkpoint)] * model.layer_by_layer
    base_bytes = folder_bytes(checkpoint.path)
    kind = f"{weights_of(checkpoint)} base, exact in float32" + ", adapter unmerged in PEFT" * bool(read)
    paths = [adapter.path for adapter, _ in read] or [checkpoint.path]
    own = base_bytes + sum(folder_bytes(adapter.path) for adapter, _ in read)
    name = " + ".join(path.resolve().name for path in paths)
    base_kind = f"{weights_of(checkpoint)} base without the adapter"
    return OpenedReference(
        runner=model,
        base=model.adapter_off() if read else None,
        noise=model.bfloat16(),
        artefact=Artefact(name, str(paths[0]), kind, own),
        base_artefact=artefact(checkpoint.path, base_kind) if read else None,
        folder=checkpoint.path,
        context=context_of(checkpoint),
        notes=tuple(dict.fromkeys(notes)),
        checkpoint=checkpoint,
        adapters=read,
        projections=projections,
        digests=tuple(adapter.digest for adapter, _ in read),
        tokenizer=tokenizer_of(checkpoint),
        pooling=pooling_of(checkpoint),
    )


def _how(source: provenance.AdapterSource) -> str:
    return f"projections: {source.how}" if source.projections is not None else source.how


def _trained_export(path: Path, max_memory: int | None) -> OpenedReference:
    from vera_edge.device.runtime.session import Session
    from vera_edge.measuring import exported_parts

    manifest = bundle.read(path)
    if manifest.kind == "encoder":
        raise MismatchError(f"{path} gives no text, and can't be the reference; give the adapter folder")
    if fault := unlike_trained(manifest):
        raise MismatchError(
            f"{path} isn't the model as trained: {fault}; give the adapter folder, or a branch export with "
            "fp32 weights, or with those of an NF4 or FP4 base as they are"
        )
    runner: Runner
    base: Runner
    notes: tuple[str, ...] = ()
    if exported_parts.fits(manifest, max_memory):
        session = Session.open(path, four_bit="kept")
        runner, base, context = session, _Swapped(session, None, session.adapter), session.decoder.context
    else:
        parts = exported_parts.PartedExport.open(path, max_memory=max_memory)
        runner, base, context = parts, parts.without_adapter(), parts.facts.context
        notes = (parts.note,)
    kind = f"branch export, {manifest.weights} weights, adapter on"
    return OpenedReference(
        runner=runner,
        base=base,
        noise=None,
        artefact=artefact(path, kind),
        base_artefact=artefact(path, f"branch export, {manifest.weights} weights, adapter off"),
        folder=path,
        context=context,
        notes=notes,
        digests=(manifest.adapters[manifest.default_adapter or ""]["digest"],),
        tokenizer=exported_tokenizer(path),
    )


@dataclass(frozen=True)
class _Swapped:
    """A branch export's session with another adapter for the length of a call, so that it is opened once."""

    session: Any
    adapter: Any
    default: Any

    @property
    def vocab_size(self) -> int:
        return int(self.session.vocab_size)

    def logits(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.session.swap(self.adapter)
        try:
            found: npt.NDArray[np.float32] = self.session.logits(tokens)
            return found
        finally:
            self.session.swap(self.default)
