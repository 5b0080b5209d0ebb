"""Writes the quantized base that a training run had in memory, from the float folder it was loaded from.

The bytes are those that `from_pretrained(BASE, quantization_config=BitsAndBytesConfig(...), dtype=...)` and
`save_pretrained` would write, made by numpy, one layer at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.arrays import Bytes
from vera_edge.base.checkpoint import MERGE_RECORD, Checkpoint
from vera_edge.base.trained_as import LoadedFolder, TrainedAs, quantized_as
from vera_edge.base.trained_as.spec import FOUR_BIT
from vera_edge.errors import AdapterError, CheckpointError, OutputError, PlanError
from vera_edge.formats.dense import DTYPES as DENSE
from vera_edge.merging.units import Copy
from vera_edge.progress import Progress, silent
from vera_edge.storage import side_files
from vera_edge.storage.files import check_output, staged_folder, write_atomic
from vera_edge.storage.shards import Shards, ShardWriter
from vera_edge.storage.tensors import RawTensor
from vera_edge.trained import alignment, provenance
from vera_edge.trained import record as training_record
from vera_edge.trained.peft_rounding import rounds_to_compute_dtype

WHAT = "quantizing"  # in progress, whose unit is a byte
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class Asked:
    """What is asked for, field by field as in `TrainedAs`; None where nothing was said."""

    format: str | None = None
    dtype: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    storage: str | None = None
    skip: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """What was said."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}


@dataclass(frozen=True)
class Quantized:
    """A base that was quantized.

    trained_as: how, in the words of `--trained-as`; call: in Python's; both None for integers, which no
    script quantizes to on loading. layers: how many were quantized. kept: linear layers left in floats.
    digest: `Checkpoint.digest`. size: bytes of the folder. stored: what the layers are stored as, in words.
    """

    folder: Path
    trained_as: str | None
    call: str | None
    dtype: str
    layers: int
    kept: tuple[str, ...]
    digest: str
    size: int
    notes: tuple[str, ...]
    stored: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {**vars(self), "folder": str(self.folder), "kept": list(self.kept), "notes": list(self.notes)}


def to_folder(
    base: Path,
    out: Path,
    asked: Asked,
    like: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Quantized:
    """Quantize the float model in the folder `base` as `asked` and write it to `out`, whole or not at all.

    like: an adapter trained on it, which must fit; what its folder tells fills in what wasn't asked.
    Raises PlanError when nothing says what to quantize to, CheckpointError when the base can't be quantized,
    MismatchError when the adapter doesn't fit it, OutputError when `out` can't be written.
    """
    check_output(out, force, (base, *([] if like is None else [like])))
    adapter = None if like is None else adapters.read(like)
    spec, notes = decide(asked, adapter)
    checkpoint = _opened(base, spec)
    if like is not None:
        notes += _fit_notes(like, checkpoint)
    with staged_folder(out, force) as stage:
        digest = _write(checkpoint, stage, progress)
        size = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    linears = checkpoint.linears.values()
    kept = tuple(linear.module for linear in linears if linear.format in DENSE)
    if heads := [one.module for one in linears if one.module.endswith(_HEADS) and one.format not in DENSE]:
        notes += (f"{heads[0]} is quantized too: with a list to skip, transformers leaves out nothing else",)
    return Quantized(
        folder=out,
        trained_as=str(spec),
        call=spec.call,
        dtype=str(checkpoint.config.get("torch_dtype") or checkpoint.config["dtype"]),
        layers=len(checkpoint.linears) - len(kept),
        kept=kept,
        digest=digest,
        size=size,
        notes=notes,
        stored=str(spec),
    )


def decide(asked: Asked, adapter: Adapter | None = None) -> tuple[TrainedAs, tuple[str, ...]]:
    """How to quantize: as asked, else as the adapter's folder tells, else by bitsandbytes' defaults.

    Also sentences that say what came from where. Raises PlanError when nothing says what to quantize to.
    """
    fields, notes = asked.fields, list[str]()
    told = {} if adapter is None else training_record.told(adapter) or {}
    if fields.get("format", told.get("format")) == told.get("format"):
        taken = {name: value for name, value in told.items() if name not in fields}
        fields |= taken
        if taken:
            words = ", ".join(f"{name} {value}" for name, value in taken.items())
            notes.append(f"{training_record.CARD} in the adapter's folder tells: {words}")
    if "format" not in fields:
        raise PlanError(
            "nothing says what the base was quantized to: give --to nf4, fp4 (what load_in_4bit=True alone "
            "is) or int8 (load_in_8bit=True)"
        )
    if adapter is not None and not {"compute_dtype", "storage"} & set(fields):
        for name, value in _rounded_to(adapter, fields["format"]).items():
            fields[name] = value
            notes.append(
                f"the adapter's saved projections are rounded to {value}, as PEFT rounds them to a 4-bit "
                f"base's {name.replace('_', ' ')}, so that is what it was"
            )
    return TrainedAs(**fields), tuple(notes)


def _rounded_to(adapter: Adapter, kind: str) -> dict[str, str]:
    """The field of a 4-bit base that saved projections betray by their rounding; empty when they don't."""
    by_compute = rounds_to_compute_dtype(adapter.peft_version)
    if adapter.saved is None or kind not in FOUR_BIT or by_compute is None:
        return {}
    found = provenance.resolve(adapter)
    if not found.verified or found.spec.rounding not in ("bfloat16", "float16"):
        return {}
    return {"compute_dtype" if by_compute else "storage": found.spec.rounding}


def _fit_notes(like: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """That an adapter fits, and what else there is to say; raises MismatchError when it doesn't."""
    adapter = alignment.read(like, checkpoint)
    if not adapter.is_vera:
        source = provenance.source_of(adapter, checkpoint)
        return (f"{like} fits; it is {source.how}", *source.notes)
    try:
        found = provenance.resolve_for_command(adapter, checkpoint)
    except AdapterError as cause:  # its projections can't be told, which is nothing to the base
        return (*provenance.check_fit(adapter, checkpoint), str(cause))
    return (f"{like} fits; its projections: {found.how}", *found.notes)


def _opened(base: Path, spec: TrainedAs) -> Checkpoint:
    before = Checkpoint.open(base)
    if before.quantized:
        stored = quantized_as(before.config, before.linears)
        raise CheckpointError(
            f"{base} is quantized already, as {stored}; use it as it is, or give the float model it came from"
        )
    return Checkpoint.open(base, spec)


def _write(checkpoint: Checkpoint, stage: Path, progress: Progress) -> str:
    """Write the model's files; returns its digest."""
    tensors = checkpoint.tensors
    assert isinstance(tensors, LoadedFolder)
    shards = Shards(stage, tensors.layout)
    _check_space(stage, shards.total)
    with ShardWriter(shards) as writer:
        written = _Written(shards, progress)
        for name in sorted(tensors):  # the parts of a layer stand together by name
            writer.claim(name)
            Copy(checkpoint, (name,)).run(tensors, written)
    config = json.dumps(checkpoint.config, sort_keys=True, indent=2, ensure_ascii=False)
    write_atomic(stage / "config.json", f"{config}\n".encode())
    side_files.copy(checkpoint.path, stage)
    if (checkpoint.path / MERGE_RECORD).is_file():  # which adapters are in it already
        side_files.copy(checkpoint.path, stage, [MERGE_RECORD])
    return checkpoint.digest_of(written.digests)


def _check_space(stage: Path, total: int) -> None:
    free = shutil.disk_usage(stage).free
    if free < total:
        raise OutputError(
            f"the quantized model takes {total:,} bytes and the disk of {stage.parent} has {free:,} left; "
            "free some and run again"
        )


@dataclass
class _Written:
    """Puts tensors in their place in the shards; `digests` is the SHA-256 of each."""

    shards: Shards
    progress: Progress
    digests: dict[str, str] = field(default_factory=dict)
    done: int = 0

    def put(self, name: str, tensor: RawTensor) -> None:
        """A whole tensor."""
        self.stream(name, [tensor.data])

    def stream(self, name: str, pieces: Iterable[Bytes]) -> None:
        """A tensor piece by piece."""
        state, offset = hashlib.sha256(), 0
        for piece in pieces:
            self.shards.put_bytes(name, offset, piece)
            state.update(piece.data)
            offset += piece.size
            self.done += piece.size
            self.progress(WHAT, self.done, self.shards.total)
        self.digests[name] = state.hexdigest()
