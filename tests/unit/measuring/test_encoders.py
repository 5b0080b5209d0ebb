"""Drift of embeddings and classes against scipy and scikit-learn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring import encoders
from vera_edge.measuring.encoders import calibration_error, compare_classes, compare_embeddings
from vera_edge.measuring.labels_and_values import (
    compare_labels,
    compare_values,
    label_distances,
    value_distances,
)

Float32 = npt.NDArray[np.float32]


def _embeddings(noise: float = 0.3, texts: int = 60) -> tuple[Float32, Float32, Float32]:
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((texts, 24)).astype(np.float32)
    moved = (reference + noise * rng.standard_normal(reference.shape)).astype(np.float32)
    base = (reference + rng.standard_normal(reference.shape)).astype(np.float32)
    return reference, moved, base


def test_cosine_is_sklearns() -> None:
    reference, moved, base = _embeddings()
    found = compare_embeddings(reference, moved)
    truth = np.diag(cosine_similarity(reference.astype(float), moved.astype(float)))
    assert found.cosine.value == pytest.approx(truth.mean(), rel=1e-9)
    assert found.cosine_minimum == pytest.approx(truth.min(), rel=1e-9)
    assert found.cosine.standard_error == pytest.approx(scipy.stats.sem(truth), rel=1e-9)
    effect = np.diag(cosine_similarity(reference.astype(float), base.astype(float)))
    kept = encoders.retained(
        encoders.embedding_distances(reference, moved), encoders.embedding_distances(reference, base)
    )
    assert kept is not None and kept.low < kept.value < kept.high
    assert kept.value == pytest.approx(1 - (1 - truth).mean() / (1 - effect).mean(), rel=1e-9)


def test_rank_correlation_is_scipys_spearman(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_ROWS", 7)  # several blocks, the last one short
    reference, moved, _ = _embeddings()
    moved[3:6] = moved[2]  # ties
    a, b = cosine_similarity(reference.astype(float)), cosine_similarity(moved.astype(float))
    truth = [
        scipy.stats.spearmanr(np.delete(a[i], i), np.round(np.delete(b[i], i), 12)).statistic
        for i in range(len(a))
    ]
    found = compare_embeddings(reference, moved).rank_correlation
    assert found.value == pytest.approx(np.mean(truth), abs=2e-3)


def test_overlap_is_that_of_sklearns_neighbours() -> None:
    reference, moved, _ = _embeddings()
    near = [
        NearestNeighbors(n_neighbors=6, metric="cosine").fit(side).kneighbors(side, return_distance=False)
        for side in (reference, moved)
    ]
    truth = [len(set(a[1:]) & set(b[1:])) / 5 for a, b in zip(*near, strict=True)]
    assert compare_embeddings(reference, moved, nearest=5).overlap.value == pytest.approx(np.mean(truth))
    assert 0 < np.mean(truth) < 1


def test_a_model_does_not_drift_from_itself_at_any_scale() -> None:
    reference, _, base = _embeddings()
    scaled = (3 * reference).astype(np.float32)
    found = compare_embeddings(reference, scaled)
    assert found.cosine.value == pytest.approx(1.0) and found.overlap.value == 1.0
    assert found.rank_correlation.value == pytest.approx(1.0)
    own, effect = (encoders.embedding_distances(reference, side) for side in (scaled, base))
    kept = encoders.retained(own, effect)
    assert kept is not None and kept.value == pytest.approx(1.0)
    assert encoders.retained(own, own * 0) is None


def _classes(noise: float = 2.0) -> tuple[Float32, Float32, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(4)
    reference = (2 * rng.standard_normal((300, 4))).astype(np.float32)
    moved = (reference + noise * rng.standard_normal(reference.shape)).astype(np.float32)
    p = np.exp(reference) / np.exp(reference).sum(1, keepdims=True)
    labels = np.array([rng.choice(4, p=row / row.sum()) for row in p.astype(float)])
    return reference, moved, labels


def test_agreement_and_flips_are_sklearns() -> None:
    reference, moved, labels = _classes()
    found = compare_classes(reference, moved, labels)
    assert found.agreement.value == accuracy_score(reference.argmax(1), moved.argmax(1))
    assert found.accuracy == pytest.approx(accuracy_score(labels, moved.argmax(1)))
    before, after = reference.argmax(1) == labels, moved.argmax(1) == labels
    assert found.flips is not None and found.flips.value == pytest.approx((before != after).mean())
    assert found.right_to_wrong is not None and found.wrong_to_right is not None
    assert found.right_to_wrong.value + found.wrong_to_right.value == pytest.approx(found.flips.value)


def test_calibration_error_is_that_of_sklearns_curve() -> None:
    _, moved, labels = _classes()
    p = np.exp(moved.astype(float))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels
    true, predicted = calibration_curve(right, confidence, n_bins=15)
    counts = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    truth = (np.abs(true - predicted) * counts[counts > 0]).sum() / len(labels)
    assert calibration_error(moved, labels) == pytest.approx(truth, rel=1e-9)


def test_labels_drawn_from_the_model_are_calibrated_and_noise_is_not() -> None:
    reference, moved, labels = _classes()
    found = compare_classes(reference, moved, labels)
    assert found.reference_calibration is not None and found.calibration is not None
    assert found.reference_calibration < 0.08 < found.calibration


def test_class_distances_are_scipys_relative_entropy() -> None:
    reference, moved, _ = _classes()
    p, q = (scipy.special.softmax(side.astype(float), axis=1) for side in (reference, moved))
    truth = scipy.special.rel_entr(p, q).sum(1)
    np.testing.assert_allclose(encoders.class_distances(reference, moved), truth, rtol=1e-9)
    assert compare_classes(reference, moved).kl.value == pytest.approx(truth.mean(), rel=1e-9)


def test_without_labels_there_is_agreement_but_no_accuracy() -> None:
    reference, moved, _ = _classes()
    found = compare_classes(reference, moved)
    assert found.accuracy is None and found.flips is None and 0 < found.agreement.value < 1


def test_embeddings_that_collapse_have_lost_all_order() -> None:
    reference, _, _ = _embeddings()
    collapsed = np.tile(reference[:1], (len(reference), 1))
    assert compare_embeddings(reference, collapsed).rank_correlation.value == 0
    assert compare_embeddings(collapsed, reference).rank_correlation.value == 0
    assert compare_embeddings(collapsed, 3 * collapsed).rank_correlation.value == 1


def test_one_logit_is_no_choice_between_classes() -> None:
    """Its softmax is 1 whatever it is, so that any two models would agree."""
    values = np.random.default_rng(0).standard_normal((20, 1)).astype(np.float32)
    for call in (compare_classes, encoders.class_distances):
        with pytest.raises(DataError, match="compare it as a value"):
            call(values, -50 * values + 3)


def test_values_are_compared_by_their_errors_and_their_order() -> None:
    rng = np.random.default_rng(5)
    reference = (7 + 3 * rng.standard_normal((80, 1))).astype(np.float32)
    moved = (reference + rng.standard_normal(reference.shape)).astype(np.float32)
    found = compare_values(reference, moved)
    errors = np.abs(moved.astype(float) - reference) / np.std(reference.astype(float))
    assert found.relative_error.value == pytest.approx(errors.mean(), rel=1e-9)
    assert found.relative_error.standard_error == pytest.approx(scipy.stats.sem(errors)[0], rel=1e-9)
    assert found.largest_error.value == pytest.approx(errors.max(), rel=1e-9)
    truth = scipy.stats.spearmanr(reference[:, 0], moved[:, 0])
    assert found.rank_correlation.value == pytest.approx(truth.statistic, rel=1e-9)
    bounds = scipy.stats.bootstrap(
        (reference[:, 0], moved[:, 0]), lambda x, y: scipy.stats.spearmanr(x, y).statistic,
        paired=True, vectorized=False, method="percentile", n_resamples=2000, random_state=0,
    ).confidence_interval  # fmt: skip
    assert found.rank_correlation.low == pytest.approx(bounds.low, abs=0.02)
    assert found.rank_correlation.high == pytest.approx(bounds.high, abs=0.02)
    same = compare_values(reference, reference)
    assert same.largest_error.value == 0
    assert (same.rank_correlation.low, same.rank_correlation.value) == (1, 1)
    other = compare_values(reference, -50 * reference + 3)
    assert other.rank_correlation.high == -1 and other.relative_error.low > 10
    np.testing.assert_allclose(value_distances(reference, moved), errors[:, 0], rtol=1e-9)


def test_of_several_values_one_that_is_lost_is_seen() -> None:
    rng = np.random.default_rng(6)
    reference = rng.standard_normal((40, 3)).astype(np.float32)
    moved = reference.copy()
    moved[:, 1] = 0
    found = compare_values(reference, moved)
    assert found.rank_correlation.value == found.rank_correlation.high == 0


def test_labels_are_compared_each_by_itself() -> None:
    rng = np.random.default_rng(7)
    reference = (2 * rng.standard_normal((60, 4))).astype(np.float32)
    moved = (reference + rng.standard_normal(reference.shape)).astype(np.float32)
    found = compare_labels(reference, moved)
    p, q = (scipy.special.expit(side.astype(float)) for side in (reference, moved))
    truth = (scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)).sum(1)
    np.testing.assert_allclose(label_distances(reference, moved), truth, rtol=1e-6)
    assert found.kl.value == pytest.approx(truth.mean(), rel=1e-6)
    same = (p > 0.5) == (q > 0.5)
    assert found.label_agreement.value == pytest.approx(same.mean())
    assert found.agreement.value == pytest.approx(same.all(1).mean()) and 0 < found.agreement.value < 1
    # What a softmax over the labels can't see: all of them moved together.
    assert compare_labels(reference, reference + 5).kl.low > 0.5


def test_bad_answers_are_refused() -> None:
    values = np.ones((5, 2), np.float32)
    for compare in (compare_values, compare_labels):
        with pytest.raises(MismatchError, match="logits of shape"):
            compare(values, values[:, :1])
        with pytest.raises(DataError, match="too few"):
            compare(values[:2], values[:2])
        with pytest.raises(DataError, match="artefact gives logits that aren't finite"):
            compare(values, values * np.float32(np.nan))


def test_bad_vectors_are_refused() -> None:
    reference, moved, _ = _embeddings()
    with pytest.raises(MismatchError, match="embeddings of shape"):
        compare_embeddings(reference, moved[:, :-1])
    with pytest.raises(DataError, match="too few"):
        compare_embeddings(reference[:2], moved[:2])
    moved[1] = 0
    with pytest.raises(DataError, match="artefact gives embeddings that aren't finite or are zero"):
        compare_embeddings(reference, moved)
    with pytest.raises(DataError, match="too few"):
        compare_classes(reference[:2], reference[:2])
