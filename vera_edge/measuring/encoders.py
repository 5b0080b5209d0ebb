"""Drift of models that give vectors or classes instead of text. numpy only.

For embeddings what counts is retrieval: whether texts stay as near to each other as they were. For
classifiers it is the answer, how it flips, and whether the confidence still means what it says; those that
give labels that hold together, or values, are in labels_and_values.py.

    cosine            of a text's two embeddings, reference and artefact
    rank_correlation  Spearman's, of one text's similarities to all others under both models
    overlap           share of a text's k nearest under the reference that are so under the artefact
    agreement         the same class wins
    calibration       expected calibration error: mean |accuracy - confidence| over 15 equal bins of the
                      winning probability, weighted by their texts (Guo et al., arXiv:1706.04599)

Intervals hold 95 %, by resampling texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vera_edge.arrays import Float32, Float64, Int64
from vera_edge.device.check.answers import rank_correlation
from vera_edge.divergence import log_softmax
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring.comparison import Interval
from vera_edge.measuring.labels_and_values import MIN_TEXTS, mean_over_texts
from vera_edge.measuring.metrics import TokenMetrics, compare
from vera_edge.text import bootstrap

NEAREST = 10
_BINS = 15
_ROWS = 256


@dataclass(frozen=True)
class EmbeddingDrift:
    """How an artefact's embeddings differ from the reference's over a set of texts."""

    texts: int
    nearest: int
    cosine: Interval
    cosine_minimum: float
    cosine_p1: float
    rank_correlation: Interval
    overlap: Interval


@dataclass(frozen=True)
class ClassDrift:
    """How an artefact's classes differ from the reference's; what needs labels is None without them."""

    texts: int
    kl: Interval
    agreement: Interval
    right_to_wrong: Interval | None
    wrong_to_right: Interval | None
    flips: Interval | None
    reference_accuracy: float | None
    accuracy: float | None
    reference_calibration: float | None
    calibration: float | None


def compare_embeddings(reference: Float32, candidate: Float32, nearest: int = NEAREST) -> EmbeddingDrift:
    """Compare embeddings (n, d) of the same n texts. Similarity is the cosine.

    Memory is a block of 256 x n similarities. Raises MismatchError when shapes differ, DataError on too few
    texts, on vectors that aren't finite or are zero.
    """
    units = [_unit(name, side, reference.shape) for name, side in _sides(reference, candidate)]
    cosine = np.einsum("ij,ij->i", *units)
    nearest = min(nearest, len(reference) - 1)
    ranks, overlap = _retrieval(units[0], units[1], nearest)
    return EmbeddingDrift(
        texts=len(reference),
        nearest=nearest,
        cosine=mean_over_texts(cosine),
        cosine_minimum=float(cosine.min()),
        cosine_p1=float(np.quantile(cosine, 0.01)),
        rank_correlation=mean_over_texts(ranks),
        overlap=mean_over_texts(overlap),
    )


def embedding_distances(reference: Float32, candidate: Float32) -> Float64:
    """1 - cosine of each text's two embeddings, (n,). Raises as `compare_embeddings`."""
    units = [_unit(name, side, reference.shape) for name, side in _sides(reference, candidate)]
    # Clipped: two equal unit vectors' product may pass 1 by a rounding.
    return np.maximum(1.0 - np.einsum("ij,ij->i", *units), 0.0)


def class_distances(reference: Float32, candidate: Float32) -> Float64:
    """KL divergence, nats, of each text's two class distributions (n,). Raises as `compare_classes`."""
    return _compared(reference, candidate, reference.argmax(axis=1).astype(np.int64)).kl


def _compared(reference: Float32, candidate: Float32, truth: Int64) -> TokenMetrics:
    if reference.ndim == 2 and reference.shape[1] < 2:
        raise DataError("one logit is no choice between classes; compare it as a value (compare_values)")
    return compare(reference, candidate, truth)


def _sides(reference: Float32, candidate: Float32) -> tuple[tuple[str, Float32], tuple[str, Float32]]:
    return ("reference", reference), ("artefact", candidate)


def _unit(name: str, values: Float32, shape: tuple[int, ...]) -> Float64:
    if values.ndim != 2 or values.shape != shape:
        raise MismatchError(
            f"the {name} gives embeddings of shape {list(values.shape)}, the reference {list(shape)}"
        )
    if len(values) < MIN_TEXTS:
        raise DataError(f"{len(values)} texts are too few to compare embeddings; give at least {MIN_TEXTS}")
    wide = values.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not (norms > 0).all():
        raise DataError(f"the {name} gives embeddings that aren't finite or are zero; the model is broken")
    unit: Float64 = wide / norms
    return unit


def _retrieval(reference: Float64, candidate: Float64, nearest: int) -> tuple[Float64, Float64]:
    """Per text: Spearman's correlation of its similarities to all others, and the top-k overlap."""
    count = len(reference)
    ranks, overlap = np.empty(count), np.empty(count)
    for start in range(0, count, _ROWS):
        rows = np.arange(start, min(start + _ROWS, count))
        others = np.ones((len(rows), count), bool)
        others[np.arange(len(rows)), rows] = False
        a, b = (
            (side[rows] @ side.T)[others].reshape(len(rows), count - 1) for side in (reference, candidate)
        )
        for index, row in enumerate(rows):
            ranks[row] = rank_correlation(a[index], b[index])
            best = (set(np.argsort(-side[index], kind="stable")[:nearest].tolist()) for side in (a, b))
            overlap[row] = len(set.intersection(*best)) / nearest
    return ranks, overlap


def compare_classes(reference: Float32, candidate: Float32, labels: Int64 | None = None) -> ClassDrift:
    """Compare class logits (n, classes) of the same n texts; `labels` (n,) are the true classes.

    Raises MismatchError when shapes differ, DataError when logits aren't finite, there are too few texts, or
    only one class.
    """
    if len(reference) < MIN_TEXTS:
        raise DataError(f"{len(reference)} texts are too few to compare classes; give at least {MIN_TEXTS}")
    truth = reference.argmax(axis=1).astype(np.int64) if labels is None else labels
    found = _compared(reference, candidate, truth)
    agreement = mean_over_texts(found.same_top1.astype(np.float64))
    if labels is None:
        nothing = (None,) * 7
        return ClassDrift(len(reference), mean_over_texts(found.kl), agreement, *nothing)
    lost = found.reference_right & ~found.right
    won = found.right & ~found.reference_right
    return ClassDrift(
        texts=len(reference),
        kl=mean_over_texts(found.kl),
        agreement=agreement,
        right_to_wrong=mean_over_texts(lost.astype(np.float64)),
        wrong_to_right=mean_over_texts(won.astype(np.float64)),
        flips=mean_over_texts((lost | won).astype(np.float64)),
        reference_accuracy=float(found.reference_right.mean()),
        accuracy=float(found.right.mean()),
        reference_calibration=calibration_error(reference, labels),
        calibration=calibration_error(candidate, labels),
    )


def calibration_error(logits: Float32, labels: Int64) -> float:
    """Expected calibration error of class logits (n, classes) against true classes (n,)."""
    confidence = np.exp(log_softmax(logits).max(axis=1))
    right = (logits.argmax(axis=1) == labels).astype(np.float64)
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, right - confidence, _BINS)
    return float(np.abs(gaps).sum() / len(labels))


def retained(lost: Float64, effect: Float64) -> Interval | None:
    """1 - sum(lost) / sum(effect): the share of the adapter's effect that is kept, None when it has none.

    lost, effect: (n,) distances from the reference to the artefact, and to the base without the adapter.
    """
    total = float(effect.sum())
    if total <= 1e-12 * len(effect):
        return None
    ratio = float(lost.sum()) / total
    drawn = bootstrap.totals(np.stack([lost, effect], axis=1))
    low, high = bootstrap.interval(1.0 - drawn[:, 0] / np.maximum(drawn[:, 1], 1e-300))
    spread = float(np.sqrt(((lost - ratio * effect) ** 2).sum())) / total
    return Interval(1.0 - ratio, spread, low, high)
