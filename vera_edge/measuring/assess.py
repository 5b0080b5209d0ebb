"""The whole of `vera-edge drift` as one call: open, measure, judge, gather what a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from vera_edge import versions
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring import limits, opened_candidate, opened_reference
from vera_edge.measuring.continuations import continue_both, runs_by_layer
from vera_edge.measuring.encoder_assess import assess_encoders
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.evaluate import Measurement, check_vocabularies, measure_all
from vera_edge.measuring.opened_candidate import OpenedCandidate
from vera_edge.measuring.opened_reference import OpenedReference
from vera_edge.measuring.result import DriftReport, LayerDrift, TextFacts, WorstText
from vera_edge.measuring.verdict import judge
from vera_edge.progress import Progress, silent
from vera_edge.tasks import task as tasks
from vera_edge.text import windows
from vera_edge.text.windows import SourceText, Windows

_CONTEXT_SHOWN = 24
_TOOLS = ("vera-edge", "numpy", "onnxruntime", "tokenizers", "torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class DriftRequest:
    """What to compare with what, and on what.

    reference: an adapter folder (its base from `base` or its config), a base folder (with `adapters`, each
        with its weight), or a branch export. candidate: a merged or exported folder.
    data: a text file or "built-in". exact: run a bitsandbytes checkpoint on exact values, not in its kernels.
    tokenizer: a folder whose tokenizer reads the text for the reference, where an export was given another.
    samples: how many prompts both models continue. by_layer: measure layer by layer too.
    text_only: refuse a model that gives embeddings or classes, before it is measured. limits: names of those
         that the report will be held to; what isn't measured of the model is refused before it is measured.
    trained_as: how the reference's base was loaded in training.
    max_memory: bytes; a model that takes more than half of them in float32 is run layer by layer, an export
        that does in ONNX Runtime in parts.
    """

    reference: Path
    candidate: Path
    data: str = windows.BUILT_IN
    base: Path | None = None
    adapters: tuple[tuple[Path, float], ...] = ()
    projection_rounding: str | None = None
    tokenizer: Path | None = None
    tokens: int = windows.TOKENS
    window: int = windows.WINDOW
    exact: bool = False
    samples: int = 0
    by_layer: bool = False
    text_only: bool = False
    trained_as: TrainedAs | None = None
    limits: tuple[str, ...] = ()
    max_memory: int | None = None


@dataclass(frozen=True)
class _Opened:
    """All sides, the text, and the tokenizer that reads it for them."""

    trained: OpenedReference
    candidates: tuple[OpenedCandidate, ...]
    text: SourceText
    tokenizer: Tokenizer


def assess(request: DriftRequest, progress: Progress = silent) -> DriftReport:
    """Measure a text model's `request.candidate` against it as trained. Limits are `drift.limits`' business.

    Raises a VeraEdgeError in one sentence when an input is at fault.
    """
    return _assess_text(request, _open(request, (request.candidate,), progress), progress)[0]


def assess_any(request: DriftRequest, progress: Progress = silent) -> DriftReport | EncoderReport:
    """`assess`, and for models that give embeddings or classes what is measured of those."""
    return assess_together(request, (request.candidate,), progress)[0]


def assess_together(
    request: DriftRequest, artefacts: Sequence[Path], progress: Progress = silent
) -> Sequence[DriftReport | EncoderReport]:
    """`assess_any` of each artefact in the place of `request.candidate`; the reference is run once for all.

    All are open at once.
    """
    opened = _open(request, artefacts, progress)
    if _gives_text(opened.trained):
        return _assess_text(request, opened, progress)
    if request.by_layer or request.text_only:
        raise DataError(
            f"{request.reference} gives no text: layers, HTML report, plots and baselines are for models "
            "that do; use --json or --junit"
        )
    return assess_encoders(
        opened.trained, opened.candidates, opened.text, opened.tokenizer, versions.installed(_TOOLS), progress
    )


def _gives_text(trained: OpenedReference) -> bool:
    return trained.task.gives == tasks.TEXT


def _open(request: DriftRequest, artefacts: Sequence[Path], progress: Progress) -> _Opened:
    text, count = windows.read_text(request.data), 1 + len(artefacts)
    progress("opening the models", 0, count)
    given = (request.base, request.adapters, request.projection_rounding)
    trained = opened_reference.open_trained(
        request.reference, *given, request.trained_as, request.tokenizer, request.max_memory
    )
    candidates: list[OpenedCandidate] = []
    for artefact in artefacts:
        progress("opening the models", 1 + len(candidates), count)
        candidates.append(_open_candidate(request, artefact, trained))
    progress("opening the models", count, count)
    sides: list[OpenedReference | OpenedCandidate] = [trained, *candidates]
    having = [(side.folder, side.tokenizer) for side in sides if side.tokenizer is not None]
    windows.check_alike(text, having)
    # The reference's, or an artefact's where the reference's folder has none.
    tokenizer = having[0][1] if having else windows.open_tokenizer(trained.folder)
    return _Opened(trained, tuple(candidates), text, tokenizer)


def _open_candidate(request: DriftRequest, artefact: Path, trained: OpenedReference) -> OpenedCandidate:
    later = runs_by_layer(trained.runner)
    found = opened_candidate.open_candidate(
        artefact, request.exact, trained.digests, request.max_memory, later
    )
    if _gives_text(trained) and found.gives != tasks.TEXT:
        raise MismatchError(f"{artefact} gives no text, and {request.reference} does")
    check_vocabularies(trained.runner, found.runner)
    return found


def _assess_text(request: DriftRequest, opened: _Opened, progress: Progress) -> list[DriftReport]:
    trained, candidates = opened.trained, opened.candidates
    limits.check_text(request.limits)
    if request.by_layer:
        # torch is only there when the models' layers are.
        from vera_edge.measuring import layers

        for candidate in candidates:
            layers.check(trained, candidate)
    vocabulary = trained.runner.vocab_size
    cut = windows.make(opened.text, opened.tokenizer, vocabulary, request.tokens, request.window)
    _check_context(cut, trained, *candidates)
    names = [f"artefact {one.artefact.path}" if len(candidates) > 1 else "artefact" for one in candidates]
    runners = {name: one.runner for name, one in zip(names, candidates, strict=True)}
    found = measure_all(
        trained.runner, runners, cut, base=trained.base, noise=trained.noise, progress=progress
    )
    return [
        _report(request, opened, candidate, cut, found[name], progress)
        for name, candidate in zip(names, candidates, strict=True)
    ]


def _report(
    request: DriftRequest,
    opened: _Opened,
    candidate: OpenedCandidate,
    cut: Windows,
    found: Measurement,
    progress: Progress,
) -> DriftReport:
    """What was measured of one artefact, and what is measured of it alone."""
    trained, text, tokenizer = opened.trained, opened.text, opened.tokenizer
    by_layer: tuple[LayerDrift, ...] = ()
    if request.by_layer:
        from vera_edge.measuring import layers

        by_layer = layers.by_layer(trained, candidate, cut, progress)
    vocabulary = trained.runner.vocab_size
    samples = continue_both(trained.runner, candidate.runner, cut, tokenizer, request.samples, progress)
    return DriftReport(
        reference=trained.artefact,
        candidate=candidate.artefact,
        base=trained.base_artefact,
        text=TextFacts(text.source, text.sha256, cut.scored, len(cut.tokens), cut.window),
        fidelity=found.fidelity,
        effect=found.effect,
        noise=found.noise,
        retained=found.retained,
        verdict=judge(found),
        notes=(
            *trained.notes,
            *candidate.notes,
            *windows.beyond(tokenizer, vocabulary),
            *_text_notes(found, vocabulary),
        ),
        worst=_worst(found, cut, tokenizer),
        generations=samples,
        layers=by_layer,
        tools=versions.installed(_TOOLS),
    )


def _check_context(cut: Windows, *sides: OpenedReference | OpenedCandidate) -> None:
    for context in (side.context for side in sides):
        if context is not None and cut.window > context:
            raise DataError(
                f"a window of {cut.window} tokens is longer than the model's context of {context}"
            )


def _text_notes(found: Measurement, vocabulary: int) -> list[str]:
    perplexity = found.fidelity.reference_perplexity.value
    if perplexity < vocabulary:
        return []
    return [
        f"the reference's perplexity on this text is {perplexity:.0f}, worse than guessing among "
        f"{vocabulary} tokens: the tokenizer or the text may not be the model's"
    ]


def _worst(found: Measurement, cut: Windows, tokenizer: Tokenizer) -> tuple[WorstText, ...]:
    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    shown = []
    for token in found.fidelity.worst:
        ids = cut.tokens[token.window].tolist()
        start = max(0, token.position + 1 - _CONTEXT_SHOWN)
        shown.append(
            WorstText(
                before=text(ids[start : token.position + 1]),
                truth=text([ids[token.position + 1]]),
                reference_choice=text([token.reference_choice]),
                choice=text([token.choice]),
                kl=token.kl,
            )
        )
    return tuple(shown)
