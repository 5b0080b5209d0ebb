"""Sampling, against transformers' own logits processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vera_edge.device.runtime.sampling import Sampler, Sampling, penalize, probabilities
from vera_edge.errors import PlanError


def drawn_logits(seed: int, vocab: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(vocab).astype(np.float32) * 4


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 250),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)
def test_filters_keep_what_transformers_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    import torch
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = drawn_logits(seed)
    # In float64 on both sides: the sets kept may differ where a sum meets top_p within float32's rounding.
    scores = torch.tensor(logits, dtype=torch.float64)[None] / temperature
    ids = torch.zeros((1, 1), dtype=torch.long)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    scores = TopPLogitsWarper(top_p)(ids, scores) if top_p < 1 else scores
    scores = MinPLogitsWarper(min_p)(ids, scores) if min_p > 0 else scores
    expected = scores.softmax(-1)[0].numpy()
    found = probabilities(logits, Sampling(temperature, top_k, top_p, min_p))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_the_penalty_is_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = drawn_logits(3), np.array([5, 9, 9, 120])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(seen)[None], torch.tensor(logits)[None])
    found = penalize(logits, seen, 1.3)
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(logits, drawn_logits(3))  # the runtime's buffer is left alone


def test_greedy_takes_the_largest_and_the_lowest_id_on_a_tie() -> None:
    assert Sampler(Sampling()).pick(np.array([0, 3, 1, 3], np.float32), np.array([], np.int64)) == 1
    penalized = Sampler(Sampling(repetition_penalty=2.0))
    assert penalized.pick(np.array([0, 3, 1, 2], np.float32), np.array([1])) == 3


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = drawn_logits(1, vocab=6)
    sampling = Sampling(temperature=1.5, seed=4)
    none = np.array([], np.int64)
    one, other = Sampler(sampling), Sampler(sampling)
    first = [one.pick(logits, none) for _ in range(4000)]
    assert first == [other.pick(logits, none) for _ in range(4000)]
    share = np.bincount(first, minlength=6) / 4000
    expected = probabilities(logits, sampling)
    # Five standard deviations of a share of 4000 draws.
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-3).all()


def test_dropped_tokens_are_never_drawn() -> None:
    sampler = Sampler(Sampling(temperature=2, top_k=3, seed=0))
    logits = np.array([9, 1, 8, 2, 7], np.float32)
    assert {sampler.pick(logits, np.array([], np.int64)) for _ in range(500)} == {0, 2, 4}


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    found = probabilities(drawn_logits(2), Sampling(temperature))
    assert np.isfinite(found).all() and abs(found.sum() - 1) < 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
