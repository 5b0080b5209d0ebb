"""Per-token figures against scipy, scikit-learn and torch on the same logits."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from sklearn.metrics.pairwise import cosine_similarity

from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring import metrics
from vera_edge.measuring.metrics import compare, compare_all


def _logits(seed: int, n: int = 37, vocab: int = 101, noise: float = 0.5):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    reference = (4 * rng.standard_normal((n, vocab))).astype(np.float32)
    candidate = (reference + noise * rng.standard_normal((n, vocab))).astype(np.float32)
    return reference, candidate, rng.integers(0, vocab, n)


def test_kl_both_ways_is_scipys_relative_entropy() -> None:
    reference, candidate, targets = _logits(0)
    found = compare(reference, candidate, targets)
    p = scipy.special.softmax(reference.astype(np.float64), axis=1)
    q = scipy.special.softmax(candidate.astype(np.float64), axis=1)
    np.testing.assert_allclose(found.kl, scipy.special.rel_entr(p, q).sum(1), rtol=1e-10)
    np.testing.assert_allclose(found.reverse_kl, scipy.special.rel_entr(q, p).sum(1), rtol=1e-10)


def test_memory_is_a_few_blocks_however_long_a_window_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate, targets = _logits(0, n=160, vocab=1 << 15)
    monkeypatch.setattr(metrics, "available_cores", lambda: 2)  # each core has a block of its own
    peaks = []
    for rows in (40, 160):
        tracemalloc.start()
        compare_all(reference[:rows], {"one": candidate[:rows], "other": candidate[:rows]}, targets[:rows])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # and not four times as much


@pytest.mark.parametrize("vocab", [101, 1 << 17, (1 << 18) + 3])
def test_rows_are_compared_alike_however_many_there_are_and_on_however_many_cores(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, candidate, targets = _logits(3, n=9, vocab=vocab)
    whole = compare(reference, candidate, targets)
    monkeypatch.setattr(metrics, "available_cores", lambda: 1)
    alone = compare(reference, candidate, targets)
    for name, values in vars(whole).items():
        assert np.array_equal(values, getattr(alone, name)), name
        one = [getattr(compare(reference[[row]], candidate[[row]], targets[[row]]), name) for row in range(9)]
        np.testing.assert_allclose(np.concatenate(one), values, rtol=1e-9, atol=1e-12, err_msg=name)


def test_kl_is_torchs_kl_div() -> None:
    reference, candidate, targets = _logits(1)
    r, c = (torch.log_softmax(torch.from_numpy(x).double(), 1) for x in (reference, candidate))
    truth = torch.nn.functional.kl_div(c, r, reduction="none", log_target=True).sum(1)
    np.testing.assert_allclose(compare(reference, candidate, targets).kl, truth.numpy(), rtol=1e-10)


def test_losses_are_torchs_cross_entropy_and_sklearns_log_loss() -> None:
    reference, candidate, targets = _logits(2)
    found = compare(reference, candidate, targets)
    for values, logits in ((found.reference_nll, reference), (found.nll, candidate)):
        torch_loss = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
        )
        np.testing.assert_allclose(values, torch_loss.numpy(), rtol=1e-12)
        p = scipy.special.softmax(logits.astype(np.float64), axis=1)
        assert values.mean() == pytest.approx(log_loss(targets, p, labels=np.arange(101)), rel=1e-9)


def test_delta_p_is_the_change_of_the_true_tokens_probability() -> None:
    reference, candidate, targets = _logits(3)
    rows = np.arange(len(targets))
    p = scipy.special.softmax(reference.astype(np.float64), axis=1)[rows, targets]
    q = scipy.special.softmax(candidate.astype(np.float64), axis=1)[rows, targets]
    np.testing.assert_allclose(compare(reference, candidate, targets).delta_p, q - p, atol=1e-14)


def test_agreement_and_flips_are_sklearns_accuracies() -> None:
    reference, candidate, targets = _logits(4, n=400, vocab=11, noise=3.0)
    found = compare(reference, candidate, targets)
    top_r, top_c = reference.argmax(1), candidate.argmax(1)
    assert found.same_top1.mean() == accuracy_score(top_r, top_c)
    assert found.right.mean() == accuracy_score(targets, top_c)
    assert found.reference_right.mean() == accuracy_score(targets, top_r)


def test_top5_is_the_overlap_of_sorted_lists() -> None:
    reference, candidate, targets = _logits(5, noise=2.0)
    expected = [
        len(set(np.argsort(r)[-5:]) & set(np.argsort(c)[-5:])) / 5
        for r, c in zip(reference, candidate, strict=True)
    ]
    np.testing.assert_allclose(compare(reference, candidate, targets).top5, expected)
    assert min(expected) < 1  # the case isn't empty


def test_cosine_and_errors_ignore_a_constant() -> None:
    reference, candidate, targets = _logits(6)
    r, c = (
        x.astype(np.float64) - x.astype(np.float64).mean(1, keepdims=True) for x in (reference, candidate)
    )
    found = compare(reference, (candidate + np.float32(8.0)).astype(np.float32), targets)
    np.testing.assert_allclose(found.cosine, np.diag(cosine_similarity(r, c)), rtol=1e-6)
    np.testing.assert_allclose(found.squared_error, ((c - r) ** 2).mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.largest_error, np.abs(c - r).max(1), rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 200.0), n=st.integers(1, 40))
def test_laws(seed: int, scale: float, n: int) -> None:
    """A model doesn't drift from itself; KL is never negative; exchanging models exchanges directions."""
    rng = np.random.default_rng(seed)
    a, b = (scale * rng.standard_normal((2, n, 29))).astype(np.float32)
    targets = rng.integers(0, 29, n)
    same = compare(a, a, targets)
    assert not same.kl.any() and not same.delta_p.any() and not same.squared_error.any()
    assert same.same_top1.all() and (same.top5 == 1).all()
    there, back = compare(a, b, targets), compare(b, a, targets)
    assert (there.kl >= 0).all() and np.isfinite(there.kl).all()
    np.testing.assert_allclose(there.kl, back.reverse_kl, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(there.delta_p, -back.delta_p, atol=1e-15)


def test_several_candidates_give_what_each_gives_alone() -> None:
    reference, candidate, targets = _logits(7)
    both = compare_all(reference, {"one": candidate, "two": reference}, targets)
    np.testing.assert_array_equal(both["one"].kl, compare(reference, candidate, targets).kl)
    assert not both["two"].kl.any()


def test_a_tiny_vocabulary_has_fewer_than_five_best() -> None:
    reference, candidate, targets = _logits(8, vocab=3)
    assert (compare(reference, candidate, targets).top5 == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    reference, candidate, targets = _logits(9)
    candidate[3, 5] = bad
    with pytest.raises(DataError, match="candidate's logits hold NaN or infinities"):
        compare(reference, candidate, targets)


def test_another_vocabulary_is_refused() -> None:
    reference, candidate, targets = _logits(10)
    with pytest.raises(MismatchError, match="one vocabulary"):
        compare(reference, candidate[:, :-1], targets)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    reference, candidate, targets = _logits(11)
    targets[0] = 101
    with pytest.raises(MismatchError, match="tokenizer belongs to another model"):
        compare(reference, candidate, targets)
