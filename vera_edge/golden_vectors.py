"""Golden vectors for a finished bundle, asked of the model as trained.

The device part only reads and compares them; this is where they are made, with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from vera_edge import bundle, provenance, tasks, trained_base
from vera_edge.bundle import Manifest
from vera_edge.device import golden, golden_encoder
from vera_edge.device.chat import Text
from vera_edge.device.encoder import CLASSES, Encoder
from vera_edge.device.golden import PROMPTS, Reference
from vera_edge.errors import BundleError, DataError, MismatchError, PlanError
from vera_edge.files import read_json
from vera_edge.progress import Progress, silent
from vera_edge.side_files import VOCABULARIES
from vera_edge.trained_as import TrainedAs


def attach(
    folder: Path,
    references: Mapping[str | None, Reference],
    reference: str,
    limits: Mapping[str, float] | None = None,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 16,
    progress: Progress = silent,
) -> Manifest:
    """Write golden vectors into the bundle `folder` and list them, with `limits`, in its manifest.

    references: by adapter name, None for the base of a branch bundle or for a merged bundle as it is.
    reference: a sentence that says what they are. limits: what validate holds the device to; None keeps what
    is there. Raises MismatchError when the bundle has no adapter of that name.
    """
    manifest = bundle.verify(folder, progress=progress)
    _check_names(manifest, references)
    config = read_json(folder / "genai_config.json", BundleError)
    ends = config.get("model", {}).get("eos_token_id", [])
    made = golden.make(
        references,
        Text(folder),
        reference,
        prompts,
        frozenset(ends if isinstance(ends, list) else [ends]),
        new_tokens,
        progress=progress,
    )
    return _put(manifest, lambda: golden.write(folder, made), limits, progress)


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
    return _put(encoder.manifest, lambda: golden_encoder.write(folder, cases, reference), limits, progress)


def _check_names(manifest: Manifest, references: Iterable[str | None]) -> None:
    known: set[str | None] = {None} | (set(manifest.adapters) if manifest.mode == "branch" else set())
    if strange := [name for name in references if name not in known]:
        raise MismatchError(f"{manifest.folder} has no adapter {strange[0]!r} to make golden vectors for")


def _put(
    manifest: Manifest, write: Callable[[], str], limits: Mapping[str, float] | None, progress: Progress
) -> Manifest:
    """Write the file and list it."""
    bound = manifest.limits if limits is None else limits
    return bundle.add(manifest, golden.FILE, write, progress, golden=golden.FILE, limits=bound)


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
    adapter_paths: Sequence[tuple[Path, float]],
    limits: Mapping[str, float] | None = None,
    prompts: Sequence[str] | None = None,
    projection_dtype: str | None = None,
    progress: Progress = silent,
    trained_as: TrainedAs | None = None,
    tell: Callable[[str], None] = lambda note: None,
) -> Manifest:
    """Open the model as trained from `base` and `adapter_paths` and `attach` what it says to `folder`.

    prompts: or the texts of an encoder; None takes the built-in ones. One adapter of a branch bundle at a
    time, or all that were merged, each with its weight. trained_as: how the base was loaded in training.
    tell: is given sentences for a person to read.
    Raises MismatchError when the bundle was made of another base or another adapter, OutputError when it is
    signed, PlanError on a limit that nothing keeps.
    """
    from vera_edge.reference import open_reference

    bundle.check_limits(limits or {}, "options")
    manifest = bundle.read(folder)
    bundle.check_unsigned(folder, "make golden vectors first")
    own = folder if any((folder / name).is_file() for name in VOCABULARIES) else None
    checkpoint, read = trained_base.read(base, adapter_paths, own, trained_as)  # the bundle's tokenizer
    if checkpoint.digest != manifest.base["digest"]:
        raise MismatchError(
            f"{folder} was made of another base than {base}; name the one it was exported from"
        )
    names = {entry["digest"]: name for name, entry in manifest.adapters.items()}
    for found, _ in read:
        if found.digest not in names:
            raise MismatchError(
                f"{folder} wasn't made of {found.path}; name the adapter it was exported with"
            )
    branch = manifest.mode == "branch"
    if not read or (branch and len(read) > 1) or (not branch and len(read) != len(names)):
        raise PlanError(f"name {'one adapter' if branch else 'every merged adapter'} of {folder}")
    resolved = provenance.resolve_for_command(read[0][0], checkpoint, projection_dtype)
    for note in resolved.notes:
        tell(note)
    what = "the base's exact values in float32 with the adapter unmerged, in torch"
    views: dict[str | None, bool] = {None: False, names[read[0][0].digest]: True} if branch else {None: True}
    if manifest.kind == "encoder":
        classes = Encoder.open(folder).gives == CLASSES
        trained = open_reference(
            checkpoint, read, resolved.projections, tasks.of(checkpoint.config).auto_class
        )
        asked = {name: trained if on else trained.adapter_off() for name, on in views.items()}
        calls = {name: one.classify if classes else one.hidden for name, one in asked.items()}
        return attach_to_encoder(folder, calls, what, limits, prompts or golden_encoder.TEXTS, progress)
    trained = open_reference(checkpoint, read, resolved.projections)
    references = {name: trained if on else trained.adapter_off() for name, on in views.items()}
    return attach(folder, references, what, limits, prompts or PROMPTS, progress=progress)
