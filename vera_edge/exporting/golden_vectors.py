"""Golden vectors for a finished bundle, asked of the model as trained.

The device part only reads and compares them; this is where they are made, with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.device.check import golden, golden_encoder, validate_decoder, validate_encoder
from vera_edge.device.check.golden import PROMPTS, GivesLogits
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.encoder import CLASSES, Encoder
from vera_edge.errors import BundleError, DataError, MismatchError, PlanError
from vera_edge.formats import gguf_header
from vera_edge.progress import Progress, silent
from vera_edge.storage.json_text import read_json
from vera_edge.storage.side_files import VOCABULARIES
from vera_edge.tasks import task as tasks
from vera_edge.trained import model as trained_base
from vera_edge.trained import provenance

_NEW_TOKENS = 16


def attach(
    folder: Path,
    references: Mapping[str | None, GivesLogits],
    reference: str,
    limits: Mapping[str, float] | None = None,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = _NEW_TOKENS,
    progress: Progress = silent,
) -> Manifest:
    """Write golden vectors into the bundle `folder` and list them, with `limits`, in its manifest.

    references: by adapter name, None for the base of a branch bundle or for a merged bundle as it is.
    reference: a sentence that says what they are. limits: what validate holds the device to; None keeps what
    is there. Raises MismatchError when the bundle has no adapter of that name.
    """
    manifest = bundle.verify(folder, progress=progress)
    _check_names(manifest, references)
    made = _answers(manifest, references, reference, prompts, new_tokens, progress)
    return _put(manifest, golden.to_bytes(made), limits, progress)


def _answers(
    manifest: Manifest,
    references: Mapping[str | None, GivesLogits],
    reference: str,
    prompts: Sequence[str],
    new_tokens: int,
    progress: Progress,
) -> golden.Golden:
    return golden.make(
        references,
        BundleText(manifest.folder),
        reference,
        prompts,
        _ends(manifest),
        new_tokens,
        progress=progress,
    )


def _ends(manifest: Manifest) -> frozenset[int]:
    """The tokens at which the bundle's own runtime ends a text."""
    if manifest.is_gguf:
        told = gguf_header.read(manifest.path(manifest.model)).metadata
        keys = (f"tokenizer.ggml.{name}_token_id" for name in gguf_header.ENDS)
        return frozenset(told[key] for key in keys if key in told)
    config = read_json(manifest.folder / "genai_config.json", BundleError)
    ends = config.get("model", {}).get("eos_token_id", [])
    return frozenset(ends if isinstance(ends, list) else [ends])


def attach_to_encoder(
    folder: Path,
    references: Mapping[str | None, golden_encoder.Reference],
    reference: str,
    limits: Mapping[str, float] | None = None,
    texts: Sequence[str] = golden_encoder.TEXTS,
    progress: Progress = silent,
) -> Manifest:
    """The same for the bundle of an encoder."""
    encoder = Encoder.open(folder, None if bundle.read(folder).mode == "branch" else "default")
    _check_names(encoder.manifest, references)
    cases = golden_encoder.make(references, encoder, texts, progress)
    return _put(encoder.manifest, golden_encoder.to_bytes(cases, reference), limits, progress)


def _check_names(manifest: Manifest, references: Iterable[str | None]) -> None:
    known: set[str | None] = {None} | (set(manifest.adapters) if manifest.mode == "branch" else set())
    if strange := [name for name in references if name not in known]:
        raise MismatchError(f"{manifest.folder} has no adapter {strange[0]!r} to make golden vectors for")


def _put(manifest: Manifest, data: bytes, limits: Mapping[str, float] | None, progress: Progress) -> Manifest:
    """Write the file and list it."""
    bound = manifest.limits if limits is None else limits
    return bundle.add(manifest, golden.FILE, data, progress, golden=golden.FILE, limits=bound)


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; empty lines are skipped. Raises DataError when there is none."""
    try:
        lines = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except OSError as cause:
        raise DataError(f"{path} can't be read: {cause.strerror}") from None
    except UnicodeDecodeError as cause:
        raise DataError(f"{path} can't be read as UTF-8 text (byte {cause.start})") from None
    if not lines:
        raise DataError(f"{path} holds no prompt; write one a line")
    return lines


def ask(
    folder: Path,
    base: Path,
    adapter_paths: Sequence[tuple[Path, float | None]],
    limits: Mapping[str, float] | None = None,
    prompts: Sequence[str] | None = None,
    projection_rounding: str | None = None,
    progress: Progress = silent,
    trained_as: TrainedAs | None = None,
    tell: Callable[[str], None] = lambda note: None,
    max_memory: int | None = None,
) -> Manifest:
    """Open the model as trained from `base` and `adapter_paths` and write what it says to `folder`.

    adapter_paths: of a branch bundle one or more of its adapters, of a merged one all that were merged. Each
    has the weight that the bundle has it at; None takes that one. prompts: or the texts of an encoder; None
    takes the built-in ones. trained_as: how the base was loaded in training. tell: is given sentences for a
    person to read. max_memory: bytes, see `room.fits`. Raises MismatchError when the bundle was made of
    another base, of another adapter or weight, or with other projections, OutputError when it is signed,
    PlanError on a limit that nothing can be held to.
    """
    bundle.check_limits(limits or {}, "options")
    manifest = bundle.read(folder)
    bundle.check_unsigned(folder, "make golden vectors first")
    own = folder if any((folder / name).is_file() for name in VOCABULARIES) else None
    weighted = [(path, 1.0) for path, _ in adapter_paths]
    checkpoint, trained = trained_base.read(base, weighted, own, trained_as)  # the bundle's tokenizer
    if checkpoint.digest != manifest.base["digest"]:
        raise MismatchError(
            f"{folder} was made of another base than {base}; name the one it was exported from"
        )
    read = [(adapter, asked) for (adapter, _), (_, asked) in zip(trained, adapter_paths, strict=True)]
    named = _named(manifest, read)
    found = [provenance.source_of(adapter, checkpoint, projection_rounding) for adapter, _ in read]
    for note in dict.fromkeys(note for one in found for note in one.notes):
        tell(note)
    _check_projections(manifest, [one.projections for one in found])
    encoder = Encoder.open(folder) if manifest.kind == "encoder" else None
    _check_measured(limits or {}, encoder)
    drawn = next((one.projections for one in found if one.projections is not None), None)
    asked = _asked(manifest, checkpoint, named, drawn, encoder, max_memory)
    weights = ", ".join(f"{weight:g}" for _, _, weight in named if weight != 1)
    what = "the base's exact values in float32 with the adapter unmerged, in torch"
    what += f", at weight {weights}" if weights else ""
    if encoder is not None:
        texts = prompts or golden_encoder.TEXTS
        cases = tuple(
            case for calls in asked for case in golden_encoder.make(calls, encoder, texts, progress)
        )
        return _put(encoder.manifest, golden_encoder.to_bytes(cases, what), limits, progress)
    manifest = bundle.verify(folder, progress=progress)
    parts = [_answers(manifest, one, what, prompts or PROMPTS, _NEW_TOKENS, progress) for one in asked]
    made = golden.Golden(what, tuple(case for part in parts for case in part.cases))
    return _put(manifest, golden.to_bytes(made), limits, progress)


def _named(
    manifest: Manifest, read: Sequence[tuple[Adapter, float | None]]
) -> list[tuple[str, Adapter, float]]:
    """Each adapter with its name and weight in the bundle. Raises MismatchError where one isn't in it so."""
    left, found = dict(manifest.adapters), []
    for adapter, asked in read:
        same = {
            name: float(entry.get("weight", 1.0))
            for name, entry in left.items()
            if entry["digest"] == adapter.digest
        }
        if not same:
            raise MismatchError(
                f"{manifest.folder} wasn't made of {adapter.path}; name the adapter it was exported with"
            )
        name = next((name for name, weight in same.items() if asked in (None, weight)), None)
        if name is None:
            weights = " and ".join(f"{weight:g}" for weight in same.values())
            raise MismatchError(
                f"{manifest.folder} has {adapter.path} at weight {weights}, not {asked}; ask at that"
            )
        found.append((name, adapter, same[name]))
        del left[name]
    branch = manifest.mode == "branch"
    if not found or (left and not branch):
        raise PlanError(
            f"name {'one adapter or more' if branch else 'every merged adapter'} of {manifest.folder}"
        )
    return found


def _check_projections(manifest: Manifest, projections: Sequence[Projections | None]) -> None:
    made_with = manifest.projection or (manifest.plan or {}).get("projection")
    digests = {one.digest for one in projections if one is not None}
    if len(digests) > 1 or (digests and isinstance(made_with, dict) and {made_with.get("digest")} != digests):
        raise MismatchError(
            f"{manifest.folder} was made with other projections than these; give --projection-rounding as "
            "when it was exported"
        )


def _check_measured(limits: Mapping[str, float], encoder: Encoder | None) -> None:
    """Raise PlanError for a limit on what isn't measured of this kind of model."""
    held = validate_decoder.HELD if encoder is None else validate_encoder.HELD[encoder.answers]
    if unknown := sorted(set(limits) - held.here - held.elsewhere):
        raise PlanError(
            f"options: {unknown[0]} isn't measured of this kind of model; set {', '.join(sorted(held.here))}"
        )


def _asked(
    manifest: Manifest,
    checkpoint: Checkpoint,
    named: Sequence[tuple[str, Adapter, float]],
    projections: Projections | None,
    encoder: Encoder | None,
    max_memory: int | None,
) -> Iterator[dict[str | None, Any]]:
    """What to ask, by name in the bundle: one model at a time, of a branch bundle the base with the first."""
    from vera_edge.reference import room
    from vera_edge.reference.model import open_reference

    light = not room.fits(checkpoint, max_memory)
    branch = manifest.mode == "branch"
    task = tasks.of(checkpoint.config).auto_class
    for number, group in enumerate([[one] for one in named] if branch else [named]):
        pairs = [(adapter, weight) for _, adapter, weight in group]
        trained = open_reference(checkpoint, pairs, projections, task, light)
        views: dict[str | None, Any] = {None: trained.adapter_off()} if branch and not number else {}
        views[group[0][0] if branch else None] = trained
        if encoder is not None:
            views = {
                name: one.classify if encoder.gives == CLASSES else one.hidden for name, one in views.items()
            }
        yield views
