"""What a classifier's logits stand for, against torch and scipy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats

from vera_edge.device.check import answers
from vera_edge.divergence import kl_of_labels

Float32 = npt.NDArray[np.float32]


def logits(width: int, texts: int = 40, seed: int = 0) -> tuple[Float32, Float32]:
    draw = np.random.default_rng(seed)
    reference = (3 * draw.standard_normal((texts, width))).astype(np.float32)
    return reference, (reference + draw.standard_normal(reference.shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("problem", "width", "expected"),
    [
        (None, 3, answers.CLASS),
        ("single_label_classification", 2, answers.CLASS),
        (None, 1, answers.VALUES),
        ("single_label_classification", 1, answers.VALUES),
        ("regression", 1, answers.VALUES),
        ("regression", 4, answers.VALUES),
        ("multi_label_classification", 5, answers.LABELS),
        ("multi_label_classification", 1, answers.LABELS),
        (["odd"], 2, answers.CLASS),
    ],
)
def test_logits_are_what_the_problem_and_their_number_say(problem: object, width: int, expected: str) -> None:
    assert answers.kind(problem, width) == expected


def test_labels_diverge_as_torchs_bernoullis_do() -> None:
    import torch
    from torch.distributions import Bernoulli, kl_divergence

    reference, candidate = logits(5)
    p, q = (Bernoulli(logits=torch.from_numpy(side).double()) for side in (reference, candidate))
    truth = kl_divergence(p, q).sum(1).numpy()
    np.testing.assert_allclose(kl_of_labels(reference, candidate), truth, rtol=1e-9)
    decided = scipy.special.expit(reference) > 0.5
    same = decided == (scipy.special.expit(candidate) > 0.5)
    np.testing.assert_array_equal(answers.same_labels(reference, candidate), same)
    far = np.full((1, 2), 800, np.float32)
    assert np.isfinite(kl_of_labels(far, -far)).all()


def test_errors_are_in_units_of_the_references_deviation() -> None:
    reference, candidate = logits(3)
    reference *= np.array([1, 100, 0.01], np.float32)
    moved = candidate * np.array([1, 100, 0.01], np.float32)
    truth = np.abs(moved.astype(float) - reference) / np.std(reference.astype(float), axis=0)
    np.testing.assert_allclose(answers.relative_errors(reference, moved), truth, rtol=1e-9)


def test_values_that_are_all_the_same_are_measured_by_their_size() -> None:
    flat = np.full((6, 1), -4, np.float32)
    np.testing.assert_allclose(answers.relative_errors(flat, flat + 1), 0.25)
    assert answers.relative_errors(flat * 0, flat).max() == 4


def test_rank_correlation_is_scipys_and_tells_a_lost_order_from_none() -> None:
    draw = np.random.default_rng(1)
    x, y = np.round(draw.standard_normal((2, 50)), 1)  # with ties
    truth = scipy.stats.spearmanr(x, y).statistic
    assert answers.rank_correlation(x, y) == pytest.approx(truth, rel=1e-9)
    flat = np.ones(50)
    assert answers.rank_correlation(x, flat) == answers.rank_correlation(flat, x) == 0
    assert answers.rank_correlation(flat, 2 * flat) == 1
    assert answers.rank_correlation(flat[:1], flat[:1]) == 0
