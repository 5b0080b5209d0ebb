"""Opens the artefact that is held against the model as trained: an exported folder, or a Hugging Face folder.

torch is imported only when something has to run in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vera_edge.adapters import reading as adapters
from vera_edge.arrays import Float32, Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.errors import CheckpointError, DataError
from vera_edge.formats import checks
from vera_edge.measuring.artefact import artefact, weights_of
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

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from vera_edge.device.runtime.pooling import Pooling
    from vera_edge.exporting.exporter import Runner


@dataclass(frozen=True)
class OpenedCandidate:
    """The artefact; `checkpoint` is set when its weights can be read layer by layer.

    `gives`: see `tasks.Task`.
    """

    runner: Runner
    artefact: Artefact
    folder: Path
    context: int | None
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    gives: str = tasks.TEXT
    tokenizer: Tokenizer | None = None
    pooling: Pooling | None = None


def open_candidate(
    path: Path,
    exact: bool = False,
    trained: Sequence[str] = (),
    max_memory: int | None = None,
    later: bool = False,
) -> OpenedCandidate:
    """The artefact in `path`: an exported folder, or a Hugging Face folder of any weight format.

    trained: digests of the reference's adapters; of a branch export's own, the one among them runs.

    A bitsandbytes checkpoint runs as its users run it, in bitsandbytes' kernels; with `exact`, on the exact
    values of its weights in float32. max_memory: bytes, for a model in float32 (see `room.fits`), and for an
    export of a decoder, which is run in parts where it doesn't fit (`exported_parts.fits`). later: one that
    fits is closed again until it is first run.
    """
    if (path / bundle.MANIFEST).is_file():
        return _candidate_export(path, trained, later, max_memory)
    if (path / adapters.CONFIG_NAME).is_file():
        raise DataError(f"{path} is an adapter, not an artefact; give a merged or exported folder to measure")
    checkpoint, _ = trained_base.read(path)
    check_measurable(checkpoint)
    from vera_edge.reference import model as reference
    from vera_edge.reference import room

    weights, notes, task = weights_of(checkpoint), [], tasks.of(checkpoint.config)
    quantized = checks.method(checkpoint.config) is not None
    if quantized and not exact and (odd := _split_blocks(checkpoint)):
        exact = True
        notes.append(
            f"measured on exact values in float32: bitsandbytes' CPU kernels can't run {odd}, whose rows "
            "aren't whole blocks"
        )
    if quantized and not exact:
        try:
            runner = reference.load_as_stored(checkpoint, task.auto_class)
        except CheckpointError as cause:
            raise CheckpointError(f"{cause}; --exact runs it on exact values in float32") from None
        kernels = "bitsandbytes" if checks.method(checkpoint.config) == "bitsandbytes" else "transformers'"
        kind = f"checkpoint, {weights}, {kernels} kernels"
    else:
        light = not room.fits(checkpoint, max_memory)
        runner = reference.open_reference(checkpoint, auto_class=task.auto_class, layer_by_layer=light)
        notes += [room.note(checkpoint)] * runner.layer_by_layer
        kind = f"checkpoint, {weights}, computed in float32"
    facts = (artefact(path, kind), path, context_of(checkpoint), tuple(notes), checkpoint, task.gives)
    return OpenedCandidate(runner, *facts, tokenizer=tokenizer_of(checkpoint), pooling=pooling_of(checkpoint))


def _candidate_export(
    path: Path, trained: Sequence[str], later: bool, max_memory: int | None
) -> OpenedCandidate:
    manifest = bundle.read(path)
    own = {name: entry["digest"] for name, entry in manifest.adapters.items()}
    notes: tuple[str, ...] = ()
    if own and not set(trained) <= set(own.values()):
        notes = (f"{path} wasn't made with the reference's adapter, but with {', '.join(own)}",)
    # The default one first, where several names stand for the same adapter.
    names = sorted(own, key=lambda name: name != manifest.default_adapter)
    found = [name for name in names if own[name] in trained] if manifest.mode == "branch" else []
    adapter = found[0] if found else "default"
    if manifest.is_gguf:
        return _candidate_gguf(path, adapter, notes)
    kind = f"{manifest.mode} export, {manifest.weights} weights, ONNX Runtime"
    if manifest.kind == "encoder":
        from vera_edge.measuring.exported_encoder import ExportedEncoder

        encoder = ExportedEncoder(path, adapter)
        facts = (artefact(path, kind), path, encoder.context, notes)
        return OpenedCandidate(encoder, *facts, gives=encoder.gives, tokenizer=exported_tokenizer(path))
    from vera_edge.device.runtime.session import Session
    from vera_edge.measuring import exported_parts

    if not exported_parts.fits(manifest, max_memory):
        parts = exported_parts.PartedExport.open(path, adapter, max_memory)
        facts = (artefact(path, kind), path, parts.facts.context, (*notes, parts.note))
        return OpenedCandidate(parts, *facts, tokenizer=exported_tokenizer(path))
    session = Session.open(path, adapter, four_bit="kept")
    facts = (artefact(path, kind), path, session.decoder.context, notes)
    runner: Runner = session
    if later:
        runner = _OpenedLater(path, adapter, session.vocab_size)
        del session
    return OpenedCandidate(runner, *facts, tokenizer=exported_tokenizer(path))


@dataclass
class _OpenedLater:
    """An export that was checked, and is opened again when it first runs: until then it takes no memory."""

    path: Path
    adapter: str
    vocab_size: int

    @cached_property
    def _session(self) -> Runner:
        from vera_edge.device.runtime.session import Session

        return Session.open(self.path, self.adapter, deep=False, four_bit="kept")

    def logits(self, tokens: Int64) -> Float32:
        return self._session.logits(tokens)


def _candidate_gguf(path: Path, adapter: str, notes: tuple[str, ...]) -> OpenedCandidate:
    from vera_edge.device.llama.bundle import LlamaBundle

    opened = LlamaBundle.open(path, adapter)
    kind = f"{opened.manifest.mode} export, {opened.manifest.weights} weights, llama.cpp"
    facts = (artefact(path, kind), path, opened.runner.context, notes)
    return OpenedCandidate(opened.runner, *facts, tokenizer=exported_tokenizer(path))


def _split_blocks(checkpoint: Checkpoint) -> str | None:
    """A 4-bit layer whose blocks run over the ends of rows: bitsandbytes 0.50 misreads those on a CPU."""
    for module, linear in checkpoint.linears.items():
        block = linear.params.get("blocksize")
        if linear.format in ("nf4", "fp4") and isinstance(block, int) and linear.in_features % block:
            return module
    return None
