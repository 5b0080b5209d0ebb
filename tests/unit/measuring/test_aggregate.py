"""Aggregates against plain numpy over all tokens at once, and llama.cpp's published formulas."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats

from vera_edge.errors import DataError
from vera_edge.measuring import aggregate, llama_cpp
from vera_edge.measuring.aggregate import Aggregate
from vera_edge.measuring.comparison import HISTOGRAM_EDGES, Comparison
from vera_edge.measuring.metrics import TokenMetrics, compare
from vera_edge.text import bootstrap

VOCAB = 53


def _windows(count: int = 12, length: int = 40, noise: float = 0.7) -> list[TokenMetrics]:
    rng = np.random.default_rng(5)
    found = []
    for index in range(count):
        n = length - (index == count - 1) * 7  # the last window is shorter
        reference = (3 * rng.standard_normal((n, VOCAB))).astype(np.float32)
        candidate = (reference + noise * rng.standard_normal((n, VOCAB))).astype(np.float32)
        found.append(compare(reference, candidate, rng.integers(0, VOCAB, n)))
    return found


def _finish(windows: list[TokenMetrics]) -> Comparison:
    gathered = Aggregate()
    for window in windows:
        gathered.add(window)
    return gathered.finish()


def _all(windows: list[TokenMetrics], name: str) -> npt.NDArray[np.float64]:
    return np.concatenate([getattr(window, name) for window in windows]).astype(np.float64)


def test_means_errors_quantiles_and_extremes_are_those_of_all_tokens_together() -> None:
    windows = _windows()
    found, kl = _finish(windows), _all(windows, "kl")
    assert found.tokens == len(kl) and found.windows == 12
    assert found.kl.mean.value == pytest.approx(kl.mean(), rel=1e-12)
    assert found.kl.mean.standard_error == pytest.approx(scipy.stats.sem(kl), rel=1e-9)
    assert (found.kl.minimum, found.kl.maximum) == (kl.min(), kl.max())
    for name, fraction in {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}.items():
        assert found.kl.quantiles[name] == pytest.approx(np.quantile(kl, fraction), rel=1e-12)
    assert found.reverse_kl.mean.value == pytest.approx(_all(windows, "reverse_kl").mean(), rel=1e-12)
    assert found.same_top1.value == _all(windows, "same_top1").mean()
    assert found.logit_rms.value == pytest.approx(math.sqrt(_all(windows, "squared_error").mean()))
    assert found.logit_largest_error == _all(windows, "largest_error").max()


def test_flips_count_both_directions() -> None:
    windows = _windows(noise=3.0)
    before, after = _all(windows, "reference_right"), _all(windows, "right")
    found = _finish(windows)
    assert found.right_to_wrong.value == pytest.approx(((before == 1) & (after == 0)).mean())
    assert found.wrong_to_right.value == pytest.approx(((before == 0) & (after == 1)).mean())
    assert found.flips.value == pytest.approx((before != after).mean())
    assert found.flips.standard_error == pytest.approx(scipy.stats.sem((before != after).astype(float)))
    assert found.flips.value > 0
    assert found.reference_accuracy == pytest.approx(before.mean())
    assert found.accuracy == pytest.approx(after.mean())


def test_llama_cpps_names_and_formulas() -> None:
    """Each line as llama.cpp's perplexity tool computes it, redone from the tokens."""
    windows = _windows()
    nll, base, dp, kl = (_all(windows, name) for name in ("nll", "reference_nll", "delta_p", "kl"))
    n = len(nll)
    printed = llama_cpp.statistics(_finish(windows))

    def error(x: npt.NDArray[np.float64]) -> float:
        return math.sqrt((np.mean(x * x) - np.mean(x) ** 2) / (n - 1))

    covariance = (np.mean(nll * base) - nll.mean() * base.mean()) / (n - 1)
    ppl, ppl_base = math.exp(nll.mean()), math.exp(base.mean())
    log_error = math.sqrt(error(nll) ** 2 + error(base) ** 2 - 2 * covariance)
    ratio = ppl / ppl_base
    difference_error = math.sqrt(
        (ppl * error(nll)) ** 2 + (ppl_base * error(base)) ** 2 - 2 * ppl * ppl_base * covariance
    )
    rms = math.sqrt(np.mean(dp**2))
    same = _all(windows, "same_top1").mean()
    expected = {
        "Mean PPL(Q)": (ppl, ppl * error(nll)),
        "Mean PPL(base)": (ppl_base, ppl_base * error(base)),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100 * covariance / (error(nll) * error(base)), None),
        "Mean ln(PPL(Q)/PPL(base))": (nll.mean() - base.mean(), log_error),
        "Mean PPL(Q)/PPL(base)": (ratio, ratio * log_error),
        "Mean PPL(Q)-PPL(base)": (ppl - ppl_base, difference_error),
        "Mean KLD": (kl.mean(), error(kl)),
        "Maximum KLD": (kl.max(), None),
        "99.9% KLD": (np.quantile(kl, 0.999), None),
        "99.0% KLD": (np.quantile(kl, 0.99), None),
        "95.0% KLD": (np.quantile(kl, 0.95), None),
        "90.0% KLD": (np.quantile(kl, 0.90), None),
        "Median KLD": (np.median(kl), None),
        "10.0% KLD": (np.quantile(kl, 0.10), None),
        "5.0% KLD": (np.quantile(kl, 0.05), None),
        "1.0% KLD": (np.quantile(kl, 0.01), None),
        "0.1% KLD": (np.quantile(kl, 0.001), None),
        "Minimum KLD": (kl.min(), None),
        "Mean Δp": (100 * dp.mean(), 100 * error(dp)),
        "Maximum Δp": (100 * dp.max(), None),
        "99.9% Δp": (100 * np.quantile(dp, 0.999), None),
        "99.0% Δp": (100 * np.quantile(dp, 0.99), None),
        "95.0% Δp": (100 * np.quantile(dp, 0.95), None),
        "90.0% Δp": (100 * np.quantile(dp, 0.90), None),
        "75.0% Δp": (100 * np.quantile(dp, 0.75), None),
        "Median Δp": (100 * np.median(dp), None),
        "25.0% Δp": (100 * np.quantile(dp, 0.25), None),
        "10.0% Δp": (100 * np.quantile(dp, 0.10), None),
        "5.0% Δp": (100 * np.quantile(dp, 0.05), None),
        "1.0% Δp": (100 * np.quantile(dp, 0.01), None),
        "0.1% Δp": (100 * np.quantile(dp, 0.001), None),
        "Minimum Δp": (100 * dp.min(), None),
        "RMS Δp": (100 * rms, 100 * 0.5 / rms * error(dp**2)),
        "Same top p": (100 * same, 100 * math.sqrt(same * (1 - same) / (n - 1))),
    }
    assert list(printed) == list(expected)
    for name, (value, uncertainty) in expected.items():
        assert printed[name][0] == pytest.approx(value, rel=1e-8), name
        if uncertainty is None:
            assert printed[name][1] is None
        else:
            assert printed[name][1] == pytest.approx(uncertainty, rel=1e-7), name


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """200 data sets of 40 windows whose true mean is 1: 95 % intervals must hold it 88 to 99 % of times."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        level = rng.gamma(2.0, 0.5, size=(40, 1))  # windows differ, tokens of a window are alike
        sums = np.concatenate([level * 50, np.full((40, 1), 50.0)], axis=1)
        drawn = bootstrap.totals(sums, 500)
        low, high = bootstrap.interval(drawn[:, 0] / drawn[:, 1])
        covered += low <= 1.0 <= high
    assert 176 <= covered <= 198


def test_bootstrap_agrees_with_scipys() -> None:
    windows = _windows(count=30, length=20)
    found = _finish(windows).kl.mean
    sums = np.array([window.kl.sum() for window in windows])
    counts = np.array([float(len(window)) for window in windows])
    truth = scipy.stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        n_resamples=4000, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    width = truth.high - truth.low
    assert found.low == pytest.approx(truth.low, abs=0.1 * width)
    assert found.high == pytest.approx(truth.high, abs=0.1 * width)
    assert found.low < found.value < found.high


def test_quantile_intervals_hold_the_quantile_and_are_the_same_every_time() -> None:
    first, second = _finish(_windows()), _finish(_windows())
    for name in ("median", "p90", "p99"):
        low, high = first.kl.intervals[name]
        assert low <= first.kl.quantiles[name] * 1.05 and high >= first.kl.quantiles[name] * 0.95
        assert low < high
    assert first == second


def test_memory_stays_bounded_and_quantiles_stay_close(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = _windows(count=60, length=100)
    exact = _finish(windows)
    monkeypatch.setattr(aggregate, "SAMPLE", 1000)
    gathered = Aggregate()
    for window in windows:
        gathered.add(window)
    assert len(gathered._sample.arrays()[0]) == 1000
    sampled = gathered.finish()
    assert sampled.kl.mean == exact.kl.mean and sampled.kl.maximum == exact.kl.maximum
    # A sample of 1000 finds the median within about 4 standard errors of rank: 0.5 +- 0.063.
    kl = _all(windows, "kl")
    assert np.quantile(kl, 0.437) < sampled.kl.quantiles["median"] < np.quantile(kl, 0.563)


def test_histogram_positions_and_worst_tokens() -> None:
    windows = _windows()
    found, kl = _finish(windows), _all(windows, "kl")
    edges = (-np.inf, *HISTOGRAM_EDGES, np.inf)
    np.testing.assert_array_equal(found.kl_histogram, np.histogram(kl, edges)[0])
    assert len(found.kl_by_position) == 40
    assert found.kl_by_position[3] == pytest.approx(np.mean([window.kl[3] for window in windows]))
    assert found.kl_by_position[39] == pytest.approx(np.mean([window.kl[39] for window in windows[:-1]]))
    assert [token.kl for token in found.worst] == sorted(kl, reverse=True)[: aggregate.WORST]
    worst = found.worst[0]
    assert windows[worst.window].kl[worst.position] == worst.kl


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        Aggregate().finish()
