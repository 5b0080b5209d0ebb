"""`vera-edge drift` for models that give embeddings or classes: open, measure over texts, judge.

A text is a paragraph of the data, with the tokens that the tokenizer puts around it, cut at the model's
longest input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from vera_edge.device import answers
from vera_edge.drift import encoders, labels_and_values, models
from vera_edge.drift.encoder_report import EncoderReport, Measured, judge
from vera_edge.drift.labels_and_values import MIN_TEXTS, LabelDrift, ValueDrift
from vera_edge.drift.models import Candidate, Trained
from vera_edge.drift.result import TextFacts
from vera_edge.drift.windows import Text
from vera_edge.errors import DataError, MismatchError
from vera_edge.files import read_json
from vera_edge.progress import Progress

if TYPE_CHECKING:
    from vera_edge.drift.exported_encoder import ExportedEncoder
    from vera_edge.reference import Reference

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Encode = Callable[["Reference | ExportedEncoder", Int64], Float32]

Compare = Callable[[Float32, Float32], Measured]
Distances = Callable[[Float32, Float32], npt.NDArray[np.float64]]

_TEXTS = 500
_LONGEST = 256
_EMBEDDINGS: tuple[Compare, Distances] = (encoders.compare_embeddings, encoders.embedding_distances)
_ANSWERS: Mapping[str, tuple[Compare, Distances]] = {
    answers.CLASS: (encoders.compare_classes, encoders.class_distances),
    answers.LABELS: (labels_and_values.compare_labels, labels_and_values.label_distances),
    answers.VALUES: (labels_and_values.compare_values, labels_and_values.value_distances),
}


def assess_encoder(
    trained: Trained,
    candidate: Candidate,
    text: Text,
    tokenizer: Tokenizer,
    tools: dict[str, str],
    progress: Progress,
) -> EncoderReport:
    """Measure an artefact that gives embeddings or classes.

    Raises DataError when there are too few texts, MismatchError when the two models do different things.
    """
    assert trained.checkpoint is not None
    task = models.auto_class_of(trained.checkpoint)
    if candidate.auto_class != task:
        raise MismatchError(
            f"{candidate.artefact.path} isn't a model of the kind of {trained.artefact.path}; "
            "give a merged or exported folder of it"
        )
    bounds = [_LONGEST, trained.context, candidate.context]
    texts = cut_texts(text, tokenizer, min(bound for bound in bounds if bound))
    embeds = task == "AutoModel"
    encode = _embed if embeds else _classify
    reference = _outputs(trained.runner, texts, encode, "the reference", progress)
    found = _outputs(candidate.runner, texts, encode, "the artefact", progress)
    base = _outputs(trained.base, texts, encode, "the base", progress) if trained.base is not None else None
    compare, distances = _EMBEDDINGS if embeds else _ANSWERS[_kind(trained, candidate, reference.shape[-1])]
    measured = compare(reference, found)
    lost = distances(reference, found)
    effect = distances(reference, base) if base is not None else None
    kept = encoders.retained(lost, effect) if effect is not None else None
    tokens = sum(len(ids) for ids in texts)
    return EncoderReport(
        reference=trained.artefact,
        candidate=candidate.artefact,
        base=trained.base_artefact,
        text=TextFacts(text.source, text.sha256, tokens, len(texts), max(len(ids) for ids in texts)),
        embeddings=measured if isinstance(measured, encoders.EmbeddingDrift) else None,
        classes=measured if isinstance(measured, encoders.ClassDrift) else None,
        labels=measured if isinstance(measured, LabelDrift) else None,
        values=measured if isinstance(measured, ValueDrift) else None,
        effect=compare(reference, base) if base is not None else None,
        retained=kept,
        verdict=judge(float(lost.mean()), float(effect.mean()) if effect is not None else None, kept),
        notes=(*trained.notes, *candidate.notes),
        tools=tools,
    )


def _kind(trained: Trained, candidate: Candidate, width: int) -> str:
    """What the logits of both are, of `answers`; raises MismatchError when they aren't of one kind."""
    assert trained.checkpoint is not None
    asked = trained.checkpoint.config.get("problem_type")
    told = (
        read_json(candidate.folder / "config.json", MismatchError)
        if candidate.checkpoint is None
        else candidate.checkpoint.config
    ).get("problem_type")
    kinds = [answers.kind(problem, width) for problem in (asked, told)]
    if kinds[0] != kinds[1]:
        raise MismatchError(
            f"{candidate.artefact.path} has the problem_type {told!r} and {trained.artefact.path} {asked!r}: "
            f"one gives {kinds[1]}, the other {kinds[0]}; give artefacts of one model"
        )
    return kinds[0]


def cut_texts(text: Text, tokenizer: Tokenizer, longest: int) -> list[Int64]:
    """Token ids of at most 500 paragraphs spread over `text`. Raises DataError when there are too few."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text.content) if part.strip()]
    if len(paragraphs) < MIN_TEXTS:
        raise DataError(
            f"{text.source} holds {len(paragraphs)} paragraphs, too few to compare; part texts by empty lines"
        )
    count = min(_TEXTS, len(paragraphs))
    chosen = [paragraphs[index * len(paragraphs) // count] for index in range(count)]
    tokenizer.enable_truncation(longest)
    return [np.asarray(found.ids, np.int64) for found in tokenizer.encode_batch(chosen)]


def _embed(runner: Reference | ExportedEncoder, tokens: Int64) -> Float32:
    return runner.embed(tokens)


def _classify(runner: Reference | ExportedEncoder, tokens: Int64) -> Float32:
    return runner.classify(tokens)


def _outputs(runner: object, texts: list[Int64], encode: Encode, who: str, progress: Progress) -> Float32:
    from vera_edge.drift.exported_encoder import ExportedEncoder
    from vera_edge.reference import Reference

    assert isinstance(runner, Reference | ExportedEncoder)
    found = []
    for index, tokens in enumerate(texts):
        progress(f"running {who}", index, len(texts))
        found.append(encode(runner, tokens))
    progress(f"running {who}", len(texts), len(texts))
    return np.stack(found)
