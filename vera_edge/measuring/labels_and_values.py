"""Drift of classifiers that don't choose one class: of several labels, of a reranker or a regression.

    relative_error    mean |artefact - reference| over texts and values, in units of the reference's standard
                      deviation over the texts
    largest_error     the largest of those
    rank_correlation  Spearman's, of a value over the texts; of several values the least
    kl                sum over labels of the divergence of each one's probability, nats
    agreement         share of texts of which every label is decided alike, at a probability of a half
    label_agreement   share of all labels

What the logits are is told by `device.check.answers.kind`. Intervals hold 95 %, by resampling texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32, Float64
from vera_edge.device.check import answers
from vera_edge.divergence import kl_of_labels
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring.comparison import Interval
from vera_edge.text import bootstrap

MIN_TEXTS = 3
_DIGITS = 12  # of a correlation: the sums of a resample are no better


@dataclass(frozen=True)
class ValueDrift:
    """How an artefact's values differ from the reference's over a set of texts."""

    texts: int
    relative_error: Interval
    largest_error: Interval
    rank_correlation: Interval


@dataclass(frozen=True)
class LabelDrift:
    """How an artefact's labels differ from the reference's over a set of texts."""

    texts: int
    kl: Interval
    agreement: Interval
    label_agreement: Interval


def compare_values(reference: Float32, candidate: Float32) -> ValueDrift:
    """Compare values (n, width) of the same n texts.

    Raises MismatchError when shapes differ, DataError on too few texts or values that aren't finite.
    """
    errors = _errors(reference, candidate)
    ranks = [_rank_correlation(reference[:, at], candidate[:, at]) for at in range(reference.shape[1])]
    largest = float(errors.max())
    return ValueDrift(
        texts=len(reference),
        relative_error=mean_over_texts(value_distances(reference, candidate)),
        largest_error=Interval(largest, 0.0, largest, largest),
        rank_correlation=min(ranks, key=lambda one: one.value),
    )


def compare_labels(reference: Float32, candidate: Float32) -> LabelDrift:
    """Compare the logits of labels (n, labels) of the same n texts. Raises as `compare_values`."""
    same = _same_labels(reference, candidate)
    return LabelDrift(
        texts=len(reference),
        kl=mean_over_texts(label_distances(reference, candidate)),
        agreement=mean_over_texts(np.asarray(same.all(axis=1), np.float64)),
        label_agreement=mean_over_texts(np.asarray(same.mean(axis=1), np.float64)),
    )


def value_distances(reference: Float32, candidate: Float32) -> Float64:
    """Mean relative error of each text (n,). Raises as `compare_values`."""
    distances: Float64 = _errors(reference, candidate).mean(axis=1)
    return distances


def label_distances(reference: Float32, candidate: Float32) -> Float64:
    """KL divergence, nats, of each text's labels (n,). Raises as `compare_values`."""
    _check(reference, candidate)
    return kl_of_labels(reference, candidate)


def mean_over_texts(values: Float64) -> Interval:
    """Mean of per-text values (n,) with its standard error and bootstrap interval."""
    low, high = bootstrap.interval(bootstrap.totals(values[:, None])[:, 0] / len(values))
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(float(values.mean()), error, low, high)


def _errors(reference: Float32, candidate: Float32) -> Float64:
    _check(reference, candidate)
    return answers.relative_errors(reference, candidate)


def _same_labels(reference: Float32, candidate: Float32) -> npt.NDArray[np.bool_]:
    _check(reference, candidate)
    return answers.same_labels(reference, candidate)


def _check(reference: Float32, candidate: Float32) -> None:
    if reference.ndim != 2 or reference.shape != candidate.shape:
        raise MismatchError(
            f"the artefact gives logits of shape {list(candidate.shape)}, the reference "
            f"{list(reference.shape)}; they come from different models"
        )
    if len(reference) < MIN_TEXTS:
        raise DataError(f"{len(reference)} texts are too few to compare answers; give at least {MIN_TEXTS}")
    for name, side in (("reference", reference), ("artefact", candidate)):
        if not np.isfinite(side).all():
            raise DataError(f"the {name} gives logits that aren't finite; the model is broken")


def _rank_correlation(reference: Float32, candidate: Float32) -> Interval:
    """Spearman's of (n,) and (n,), its interval by resampling pairs of ranks."""
    value = answers.rank_correlation(reference, candidate)
    x, y = (answers.average_ranks(side) - (len(side) - 1) / 2 for side in (reference, candidate))
    if not x.any() or not y.any():  # one side has no order: nothing varies with the sample
        return Interval(value, 0.0, value, value)
    sums = bootstrap.totals(np.stack([x, y, x * x, y * y, x * y], axis=1)) / len(x)
    variances = (sums[:, 2] - sums[:, 0] ** 2) * (sums[:, 3] - sums[:, 1] ** 2)
    resampled = (sums[:, 4] - sums[:, 0] * sums[:, 1]) / np.sqrt(np.maximum(variances, 1e-300))
    resampled = np.clip(np.round(resampled, _DIGITS), -1.0, 1.0)
    low, high = bootstrap.interval(resampled)
    return Interval(round(value, _DIGITS), float(resampled.std()), low, high)
