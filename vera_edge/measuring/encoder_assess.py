"""`vera-edge drift` for models that give embeddings, classes or spans: open, measure over texts, judge.

Embeddings are pooled as the model's folder says. A classifier of tokens is measured on each token, what finds
answers on where they start and end. A text is a paragraph of the data, with the tokens that the tokenizer
puts around it, cut at the model's longest input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vera_edge.arrays import Float32, Float64, Int64
from vera_edge.device.check import answers
from vera_edge.device.runtime.pooling import Pooling
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring import encoders, labels_and_values, token_classes
from vera_edge.measuring.encoder_report import EncoderReport, judge
from vera_edge.measuring.labels_and_values import MIN_TEXTS, LabelDrift, ValueDrift
from vera_edge.measuring.opened_candidate import OpenedCandidate
from vera_edge.measuring.opened_reference import OpenedReference
from vera_edge.measuring.result import TextFacts
from vera_edge.progress import Progress
from vera_edge.storage.json_text import read_json
from vera_edge.tasks import task as tasks
from vera_edge.text.windows import SourceText, beyond, check_ids
from vera_edge.trained.text_settings import vocabulary_size

Encode = Callable[[list[Int64]], Iterator[Float32]]

_TEXTS = 500
_LONGEST = 256


def assess_encoders(
    trained: OpenedReference,
    candidates: Sequence[OpenedCandidate],
    text: SourceText,
    tokenizer: Tokenizer,
    tools: dict[str, str],
    progress: Progress,
) -> list[EncoderReport]:
    """Measure artefacts that give embeddings, classes or spans; the reference is run once.

    Raises DataError when there are too few texts, MismatchError when two models do different things.
    """
    for candidate in candidates:
        if candidate.gives != trained.task.gives:
            raise MismatchError(
                f"{candidate.artefact.path} isn't a model of the kind of {trained.artefact.path}; "
                "give a merged or exported folder of it"
            )
    known: dict[int, _Truth] = {}  # by the longest text
    reports = []
    for candidate in candidates:
        bounds = [_LONGEST, trained.context, candidate.context]
        longest = min(bound for bound in bounds if bound)
        if longest not in known:
            known[longest] = _Truth.of(trained, text, tokenizer, longest, progress)
        reports.append(_report(trained, candidate, text, tokenizer, known[longest], tools, progress))
    return reports


@dataclass(frozen=True)
class _Truth:
    """The texts, and what the model as trained gives for them, and without its adapter."""

    texts: list[Int64]
    reference: list[Float32]
    base: list[Float32] | None

    @classmethod
    def of(
        cls,
        trained: OpenedReference,
        text: SourceText,
        tokenizer: Tokenizer,
        longest: int,
        progress: Progress,
    ) -> _Truth:
        texts = cut_texts(text, tokenizer, longest)
        rows = _rows(trained)
        for ids in texts if rows else ():
            check_ids(ids, tokenizer, rows, f"{text.source} text")

        def outputs(runner: object, who: str) -> list[Float32]:
            return _outputs(_encoder(runner, trained.task.gives, trained.pooling), texts, who, progress)

        reference = outputs(trained.runner, "the reference")
        return cls(texts, reference, None if trained.base is None else outputs(trained.base, "the base"))


def _rows(trained: OpenedReference) -> int:
    """Of the table of embeddings; 0 where that isn't known."""
    assert trained.checkpoint is not None
    return vocabulary_size(trained.checkpoint.config) or 0


def _report(
    trained: OpenedReference,
    candidate: OpenedCandidate,
    text: SourceText,
    tokenizer: Tokenizer,
    truth: _Truth,
    tools: dict[str, str],
    progress: Progress,
) -> EncoderReport:
    texts, reference, base, gives = truth.texts, truth.reference, truth.base, trained.task.gives
    found = _outputs(_encoder(candidate.runner, gives, candidate.pooling), texts, "the artefact", progress)
    kind = _kind(trained, candidate, reference[0].shape[-1]) if gives == tasks.CLASSES else gives
    compare, distances = _MEASURES[kind]
    measured = compare(reference, found)
    lost = distances(reference, found)
    effect = distances(reference, base) if base is not None else None
    kept = encoders.retained(lost, effect) if effect is not None else None
    tokens, rows = sum(len(ids) for ids in texts), _rows(trained)
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
        notes=(*trained.notes, *candidate.notes, *(beyond(tokenizer, rows) if rows else ())),
        tools=tools,
    )


def _kind(trained: OpenedReference, candidate: OpenedCandidate, width: int) -> str:
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


def cut_texts(text: SourceText, tokenizer: Tokenizer, longest: int) -> list[Int64]:
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


def _encoder(runner: object, gives: str, pooling: Pooling | None) -> Encode:
    """What gives texts' embeddings (d,), class logits (classes,), or rows of logits of tokens or spans."""
    from vera_edge.measuring.exported_encoder import ExportedEncoder
    from vera_edge.reference.model import TorchReference

    if isinstance(runner, ExportedEncoder):
        return partial(map, runner.outputs)
    assert isinstance(runner, TorchReference)
    model = runner
    if gives == tasks.SPANS:
        return model.spans_of
    if gives != tasks.EMBEDDINGS:
        return model.classify_of
    how = pooling or Pooling()

    def embed(texts: list[Int64]) -> Iterator[Float32]:
        for states in model.hidden_of(texts):
            yield how.embeddings(states[None], np.ones((1, len(states)), np.int64))[0]

    return embed


def _outputs(encode: Encode, texts: list[Int64], who: str, progress: Progress) -> list[Float32]:
    found: list[Float32] = []
    for values in encode(texts):
        progress(f"running {who}", len(found), len(texts))
        found.append(values)
    progress(f"running {who}", len(texts), len(texts))
    return found


def _stacked(measure: Callable[[Float32, Float32], Any]) -> Callable[[list[Float32], list[Float32]], Any]:
    return lambda reference, found: measure(np.stack(reference), np.stack(found))


_MEASURES: Mapping[str, tuple[Callable[..., Any], Callable[..., Float64]]] = {
    tasks.EMBEDDINGS: (_stacked(encoders.compare_embeddings), _stacked(encoders.embedding_distances)),
    answers.CLASS: (_stacked(encoders.compare_classes), _stacked(encoders.class_distances)),
    answers.LABELS: (_stacked(labels_and_values.compare_labels), _stacked(labels_and_values.label_distances)),
    answers.VALUES: (_stacked(labels_and_values.compare_values), _stacked(labels_and_values.value_distances)),
    tasks.TOKEN_CLASSES: (token_classes.compare_rows, token_classes.row_distances),
    tasks.SPANS: (token_classes.compare_rows, token_classes.row_distances),
}
