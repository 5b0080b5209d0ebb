"""KL divergence in nats, of the reference's distribution from the other's: the one place that knows how.

`precision.replay` has the one other form, in torch and float32, for the thousands of divergences near zero
that a search takes; its tests hold it against torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float64

_LEAST = (
    1e-9  # listed log-probabilities are rounded, so what is left over may come out a little below nothing
)


def log_softmax(logits: npt.NDArray[Any]) -> Float64:
    """Log-probabilities in float64 of logits (n, classes), stable for any finite input."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


def kl(log_p: Float64, log_q: Float64) -> Float64:
    """sum p (ln p - ln q) of log-probabilities (n, classes) -> (n,)."""
    return expected(np.exp(log_p), log_p - log_q)


def expected(p: Float64, log_ratio: Float64) -> Float64:
    """The same where p and ln p - ln q are at hand already."""
    # Gibbs' inequality: below zero there is only rounding.
    return np.maximum(np.einsum("ij,ij->i", p, log_ratio), 0.0)


def kl_of_listed(log_p: Float64, log_q: Float64) -> Float64:
    """The same over k listed classes and the rest taken as one: (n, k) -> (n,).

    By the data-processing inequality (Cover and Thomas, Elements of Information Theory, 2.8) it is never
    above the divergence over all classes.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p = np.maximum(1 - p.sum(axis=1), _LEAST)
    rest_q = np.maximum(1 - q.sum(axis=1), _LEAST)
    total: Float64 = (p * (log_p - log_q)).sum(axis=1) + rest_p * (np.log(rest_p) - np.log(rest_q))
    return np.maximum(total, 0.0)


def kl_of_labels(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> Float64:
    """Of logits (n, labels) of independent labels, each with a sigmoid: the sum over labels, (n,)."""
    ours, theirs = reference.astype(np.float64), candidate.astype(np.float64)
    total = np.zeros(len(ours))
    for sign in (1.0, -1.0):  # that a label holds, and that it doesn't
        log_p, log_q = (-np.logaddexp(0.0, -sign * logits) for logits in (ours, theirs))
        total += (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    divergence: Float64 = np.maximum(total, 0.0)
    return divergence
