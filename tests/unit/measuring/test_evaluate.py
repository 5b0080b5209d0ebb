"""Measuring: fidelity, effect and noise beside each other, and what is retained."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats

from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring import evaluate, verdict
from vera_edge.measuring.evaluate import Measurement, measure
from vera_edge.text.windows import SourceText, Windows

VOCAB = 31
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """A bigram model: logits are a row of a table, moved towards another model's by `share`."""

    table: npt.NDArray[np.float32]
    calls: list[int]

    @property
    def vocab_size(self) -> int:
        return self.table.shape[1]

    def logits(self, tokens: Int64) -> npt.NDArray[np.float32]:
        self.calls.append(len(tokens))
        return self.table[tokens]


def _tables(seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    trained = (2 * rng.standard_normal((VOCAB, VOCAB))).astype(np.float32)
    return trained, (trained + rng.standard_normal((VOCAB, VOCAB))).astype(np.float32)


def _windows(count: int = 12) -> Windows:
    rng = np.random.default_rng(1)
    return Windows(SourceText("test", "", ""), tuple(rng.integers(0, VOCAB, 64) for _ in range(count)), 64)


def _measure(share: float, **yardsticks: object) -> Measurement:
    """`share` 0 is the model as trained, 1 the base: the artefact lies between."""
    trained, base = _tables()
    between = ((1 - share) * trained + share * base).astype(np.float32)
    return measure(Table(trained, []), Table(between, []), _windows(), base=Table(base, []))


@dataclass(frozen=True)
class Watched(Table):
    """Counts how many of its logits, and of all that share `given`, are there when it is asked again."""

    given: list[weakref.ref[npt.NDArray[np.float32]]] = field(default_factory=list)

    def logits(self, tokens: Int64) -> npt.NDArray[np.float32]:
        self.calls.append(sum(found() is not None for found in self.given))
        found = self.table[tokens]
        self.given.append(weakref.ref(found))
        return found


def test_one_window_of_logits_is_held_at_a_time() -> None:
    trained, base = _tables()
    first = Watched(trained, [])
    others = [Watched(table, [], first.given) for table in (base, trained)]
    measure(first, others[0], _windows(), base=others[1])
    assert max(first.calls) == 0 and max(others[0].calls) == 2 and max(others[1].calls) == 1


def test_the_model_itself_retains_everything() -> None:
    found = _measure(0.0)
    assert found.fidelity.kl.maximum == 0 and found.retained is not None and found.retained.value == 1
    assert verdict.judge(found).level == "faithful"


def test_the_base_retains_nothing_however_it_is_called() -> None:
    found = _measure(1.0)
    assert found.effect is not None and found.fidelity.kl.mean == found.effect.kl.mean
    assert found.retained is not None and found.retained.value == 0
    judged = verdict.judge(found)
    assert judged.level == "lost" and "nothing of its effect" in judged.sentence


@pytest.mark.parametrize(("share", "level"), [(0.1, "faithful"), (0.4, "degraded"), (0.9, "lost")])
def test_between_the_two_the_verdict_follows_the_share(share: float, level: str) -> None:
    """KL grows about with the square of the distance: a tenth of the way costs about a hundredth."""
    found = _measure(share)
    assert found.retained is not None and found.effect is not None
    assert found.retained.value == pytest.approx(1 - share**2, abs=0.1)
    by_hand = 1 - found.fidelity.kl.mean.value / found.effect.kl.mean.value
    assert found.retained.value == pytest.approx(by_hand, rel=1e-12)
    assert found.retained.low < found.retained.value < found.retained.high
    assert verdict.judge(found).level == level


def test_the_retained_effects_error_and_interval_are_scipys() -> None:
    """Paired over windows: an interval by scipy's bootstrap, the standard error by leaving one window out."""
    trained, base = _tables()
    between, windows = (0.6 * trained + 0.4 * base).astype(np.float32), _windows(40)
    found = measure(Table(trained, []), Table(between, []), windows, base=Table(base, [])).retained
    lost, effect = (
        np.array([_kl(trained[tokens[:-1]], other[tokens[:-1]]).sum() for tokens in windows.tokens])
        for other in (between, base)
    )

    def share(a: Float64, b: Float64, axis: int = -1) -> Float64:
        kept: Float64 = 1 - a.sum(axis) / b.sum(axis)
        return kept

    assert found is not None and found.value == pytest.approx(share(lost, effect), rel=1e-9)
    truth = scipy.stats.bootstrap(
        (lost, effect),
        share,
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = truth.high - truth.low
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high), abs=0.1 * width)
    without = np.array([share(np.delete(lost, at), np.delete(effect, at)) for at in range(len(lost))])
    jackknife = np.sqrt((len(lost) - 1) * without.var())
    assert found.standard_error == pytest.approx(jackknife, rel=0.05)


def _kl(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> Float64:
    p, q = (scipy.special.softmax(logits.astype(np.float64), axis=1) for logits in (reference, other))
    found: Float64 = scipy.special.rel_entr(p, q).sum(axis=1)
    return found


def test_an_adapter_without_effect_decides_nothing() -> None:
    trained, _ = _tables()
    found = measure(Table(trained, []), Table(trained, []), _windows(), base=Table(trained, []))
    assert found.retained is None and verdict.judge(found).level == "undecided"


def test_an_effect_within_the_noise_decides_nothing() -> None:
    trained, base = _tables()
    near = (trained + 0.01 * (base - trained)).astype(np.float32)
    noisy = (trained + 0.02 * (base - trained)).astype(np.float32)
    found = measure(
        Table(trained, []), Table(trained, []), _windows(), base=Table(near, []), noise=Table(noisy, [])
    )
    judged = verdict.judge(found)
    assert judged.level == "undecided" and "too little to tell" in judged.sentence


@pytest.mark.parametrize(
    ("scale", "level"), [(0.0, "faithful"), (0.02, "faithful"), (0.3, "degraded"), (1.0, "lost")]
)
def test_without_an_adapter_the_size_of_kl_decides(scale: float, level: str) -> None:
    trained, base = _tables()
    moved = (trained + scale * (base - trained)).astype(np.float32)
    found = measure(Table(trained, []), Table(moved, []), _windows())
    assert found.effect is None and found.retained is None
    judged = verdict.judge(found)
    assert judged.level == level and "no adapter is involved" in judged.sentence


def test_the_noise_floor_is_measured_on_a_few_windows_only() -> None:
    trained, base = _tables()
    noise = Table(base, [])
    found = measure(Table(trained, []), Table(trained, []), _windows(), noise=noise)
    assert len(noise.calls) == evaluate.NOISE_WINDOWS
    assert found.noise is not None and found.noise.windows == evaluate.NOISE_WINDOWS
    assert found.fidelity.windows == 12


def test_the_last_position_is_not_scored() -> None:
    trained, _ = _tables()
    assert measure(Table(trained, []), Table(trained, []), _windows()).fidelity.tokens == 12 * 63


def test_progress_is_told() -> None:
    trained, _ = _tables()
    told: list[tuple[str, int, int]] = []

    def record(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    measure(Table(trained, []), Table(trained, []), _windows(3), progress=record)
    assert told == [("measuring drift", done, 3) for done in range(4)]


def test_another_vocabulary_is_refused_before_anything_runs() -> None:
    trained, _ = _tables()
    reference = Table(trained, [])
    with pytest.raises(MismatchError, match="31 tokens and the artefact one of 30"):
        measure(reference, Table(trained[:, :30], []), _windows())
    assert not reference.calls


def test_a_model_that_gives_nan_is_refused() -> None:
    trained, base = _tables()
    broken = base.copy()
    broken[:, 3] = np.nan
    with pytest.raises(DataError, match="artefact's logits hold NaN"):
        measure(Table(trained, []), Table(broken, []), _windows())
