"""What a classifier's logits stand for, and how far two models' logits for the same texts are apart.

One class out of several, as a softmax gives it; labels that may hold together, each a sigmoid of its own; or
values as they are, of a regression or a reranker: one logit has no other class to be held against, and its
softmax is 1 whatever it is.

    class, labels   KL divergence in nats of the reference's distribution from the other's; of labels, the sum
                    over them, each a coin of its own
    values          the difference in units of the reference's standard deviation over the texts, so that the
                    scale of a head doesn't matter; and Spearman's rank correlation over the texts
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Array, Float64

CLASS, LABELS, VALUES = "one class", "several labels", "values"
_DIGITS = 12  # beyond them, equal figures differ by how they were added up


def kind(problem_type: object, width: int) -> str:
    """What `width` logits are, CLASS, LABELS or VALUES, by the problem_type of a model's config (or None)."""
    if problem_type == "multi_label_classification":
        return LABELS
    return VALUES if problem_type == "regression" or width == 1 else CLASS


def same_labels(reference: Array, candidate: Array) -> npt.NDArray[np.bool_]:
    """Which labels (n, labels) hold under both or neither, at a probability of a half."""
    return (reference > 0) == (candidate > 0)


def spread(reference: Array) -> Float64:
    """What differences of values (n, width) are measured in, (width,).

    The standard deviation over the texts; where they all have the same value, that value's magnitude.
    """
    wide = reference.astype(np.float64)
    deviation = wide.std(axis=0)
    flat = deviation <= 10.0**-_DIGITS * np.abs(wide).max(axis=0)
    magnitude = np.where(flat, np.abs(wide).max(axis=0), deviation)
    found: Float64 = np.where(magnitude > 0, magnitude, 1.0)
    return found


def relative_errors(reference: Array, candidate: Array) -> Float64:
    """|candidate - reference| (n, width) in units of the reference's `spread`."""
    difference = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    found: Float64 = difference / spread(reference)
    return found


def rank_correlation(reference: Array, candidate: Array) -> float:
    """Spearman's, of n figures each: (n,).

    Where only one side's are all the same it is 0, for its order is lost; where both are, there is none to
    lose: 1. And 0 of a single figure, which has no order that could be told.
    """
    if len(reference) < 2:
        return 0.0
    ranks = [average_ranks(side) for side in (reference, candidate)]
    flat = [bool(np.ptp(side) == 0) for side in ranks]
    if any(flat):
        return float(all(flat))
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def average_ranks(values: Array) -> Float64:
    """Ranks (n,) from 0, equal values sharing the mean of theirs."""
    wide = values.astype(np.float64)
    scale = float(np.abs(wide).max(initial=0.0)) or 1.0
    _, inverse, counts = np.unique(np.round(wide / scale, _DIGITS), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Float64 = (ends - (counts + 1) / 2.0)[inverse]
    return ranks
