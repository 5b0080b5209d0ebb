"""Drift of models that give several rows of logits for a text: one for each token, or for an answer's ends.

Each row is a distribution, over classes or over the text's tokens. A text counts once, by the mean of its
rows, for rows of one text aren't independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vera_edge.arrays import Float32, Float64
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring.encoders import ClassDrift
from vera_edge.measuring.labels_and_values import MIN_TEXTS, mean_over_texts
from vera_edge.measuring.metrics import TokenMetrics, compare


def compare_rows(reference: Sequence[Float32], candidate: Sequence[Float32]) -> ClassDrift:
    """Compare rows of logits (rows, classes) of the same texts; how many of either differs by text.

    Raises MismatchError when shapes differ, DataError when logits aren't finite or there are too few texts.
    """
    if len(reference) < MIN_TEXTS:
        raise DataError(f"{len(reference)} texts are too few to compare classes; give at least {MIN_TEXTS}")
    found = _compared(reference, candidate)
    agreement = np.array([one.same_top1.mean() for one in found])
    kl = np.array([one.kl.mean() for one in found])
    nothing = (None,) * 7
    return ClassDrift(len(found), mean_over_texts(kl), mean_over_texts(agreement), *nothing)


def row_distances(reference: Sequence[Float32], candidate: Sequence[Float32]) -> Float64:
    """Mean KL divergence, nats, of each text's rows (n,). Raises as `compare_rows`."""
    return np.array([one.kl.mean() for one in _compared(reference, candidate)])


def _compared(reference: Sequence[Float32], candidate: Sequence[Float32]) -> list[TokenMetrics]:
    found = []
    for ours, theirs in zip(reference, candidate, strict=True):
        if ours.shape != theirs.shape:
            raise MismatchError(
                f"the artefact gives logits of shape {list(theirs.shape)}, the reference {list(ours.shape)}"
            )
        if ours.shape[-1] < 2:
            raise DataError("one class leaves nothing to compare; give a model that has two or more")
        found.append(compare(ours, theirs, ours.argmax(axis=1).astype(np.int64)))
    return found
