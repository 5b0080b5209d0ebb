"""KL divergence against scipy's, and the inequalities that it keeps."""

from __future__ import annotations

import numpy as np
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vera_edge.divergence import expected, kl, kl_of_labels, kl_of_listed, log_softmax

SEEDS = st.integers(0, 2**32 - 1)


def pair(seed: int, classes: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((5, classes)).astype(np.float32) * 4
    return first, first + rng.standard_normal(first.shape).astype(np.float32)


@given(SEEDS)
def test_against_scipy(seed: int) -> None:
    first, second = pair(seed)
    log_p, log_q = log_softmax(first), log_softmax(second)
    np.testing.assert_allclose(log_p, scipy.special.log_softmax(first.astype(np.float64), axis=1), atol=1e-12)
    truth = scipy.stats.entropy(np.exp(log_p), np.exp(log_q), axis=1)
    np.testing.assert_allclose(kl(log_p, log_q), truth, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(kl(log_p, log_q), expected(np.exp(log_p), log_p - log_q))


@given(SEEDS, st.integers(1, 40))
def test_listing_fewer_classes_never_gives_more(seed: int, listed: int) -> None:
    log_p, log_q = (log_softmax(logits) for logits in pair(seed))
    ids = np.argsort(-log_p, axis=1)[:, :listed]
    of_listed = kl_of_listed(*(np.take_along_axis(one, ids, axis=1) for one in (log_p, log_q)))
    assert (of_listed <= kl(log_p, log_q) + 1e-6).all()


@given(SEEDS)
def test_labels_are_coins(seed: int) -> None:
    first, second = pair(seed, 3)
    p, q = scipy.special.expit(first.astype(np.float64)), scipy.special.expit(second.astype(np.float64))
    truth = (scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)).sum(axis=1)
    np.testing.assert_allclose(kl_of_labels(first, second), truth, rtol=1e-6, atol=1e-10)


def test_logits_of_any_size_stay_finite() -> None:
    far = np.array([[1e30, -1e30, 0.0]], np.float32)
    assert np.isfinite(log_softmax(far)).all()
    assert kl(log_softmax(far), log_softmax(far))[0] == 0
