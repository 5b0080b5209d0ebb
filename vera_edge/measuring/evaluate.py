"""Runs reference, artefacts and their yardsticks over the same windows, one window at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from vera_edge.arrays import Float32, Int64
from vera_edge.errors import MismatchError
from vera_edge.measuring.aggregate import Aggregate
from vera_edge.measuring.comparison import Comparison, Interval
from vera_edge.measuring.metrics import compare_all
from vera_edge.progress import Progress, silent
from vera_edge.text import bootstrap
from vera_edge.text.windows import Windows

if TYPE_CHECKING:
    from vera_edge.exporting.exporter import Runner

# The noise floor is a yardstick, not a verdict: a few windows give its size.
NOISE_WINDOWS = 4


@runtime_checkable
class _ReadsWeightsOnce(Protocol):
    """A Runner that gives the logits of many windows in one pass over its weights."""

    def logits_together(
        self,
        views: Sequence[Any],
        windows: Sequence[Int64],
        first: Sequence[int | None] = (),
        progress: Progress = silent,
    ) -> Iterator[tuple[Float32, ...]]: ...


@dataclass(frozen=True)
class Measurement:
    """What one pass over the windows found.

    fidelity: reference against artefact. effect: reference against the base without the adapter.
    noise: reference in float32 against itself computed in bfloat16, over the first few windows.
    retained: 1 - KL(reference || artefact) / KL(reference || base), 1 when nothing is lost; None when there
        is no adapter or it changes nothing.
    """

    fidelity: Comparison
    effect: Comparison | None
    noise: Comparison | None
    retained: Interval | None


def measure(
    reference: Runner,
    candidate: Runner,
    windows: Windows,
    *,
    base: Runner | None = None,
    noise: Runner | None = None,
    progress: Progress = silent,
) -> Measurement:
    """Compare `candidate` with `reference` on every window; see `measure_all`."""
    only = {"artefact": candidate}
    return measure_all(reference, only, windows, base=base, noise=noise, progress=progress)["artefact"]


def measure_all(
    reference: Runner,
    candidates: Mapping[str, Runner],
    windows: Windows,
    *,
    base: Runner | None = None,
    noise: Runner | None = None,
    progress: Progress = silent,
) -> dict[str, Measurement]:
    """Compare candidates with `reference` on every window, by name; `base` and `noise` are the yardsticks.

    Holds one window's logits of each model. The reference and its yardsticks are run once for all; their
    weights are through with when an artefact's are first asked for, where they aren't all in memory. Raises
    MismatchError on different vocabularies, DataError on logits that aren't finite and when there is too
    little text.
    """
    for candidate in candidates.values():
        check_vocabularies(reference, candidate)
    yardsticks = {name: one for name, one in (("base", base), ("noise", noise)) if one is not None}
    gathered = {name: Aggregate() for name in (*candidates, *yardsticks)}
    counts = [None, *(NOISE_WINDOWS if name == "noise" else None for name in yardsticks)]
    ours = _together([reference, *yardsticks.values()], windows.tokens, counts, progress)
    theirs = [_each(candidate, windows.tokens, progress) for candidate in candidates.values()]
    for index, tokens in enumerate(windows.tokens):
        progress("measuring drift", index, len(windows.tokens))
        truth, *others = next(ours)
        # The last position has no true token to be judged by.
        found = [*(next(own) for own in theirs), *others]
        logits = {name: values[:-1] for name, values in zip(gathered, found, strict=False)}
        for name, metrics in compare_all(truth[:-1], logits, tokens[1:]).items():
            gathered[name].add(metrics)
        del truth, others, found, logits  # before the next window's are computed
    progress("measuring drift", len(windows.tokens), len(windows.tokens))
    effect, floor = (gathered[name].finish() if name in gathered else None for name in ("base", "noise"))
    return {
        name: Measurement(
            gathered[name].finish(),
            effect,
            floor,
            _retained(gathered[name], gathered["base"]) if base is not None else None,
        )
        for name in candidates
    }


def _together(
    runners: Sequence[Runner], windows: Sequence[Int64], counts: Sequence[int | None], progress: Progress
) -> Iterator[tuple[Float32, ...]]:
    """Of each window the logits of runners, the last of which may end after a `count` of windows."""
    first = runners[0]
    if isinstance(first, _ReadsWeightsOnce) and all(type(one) is type(first) for one in runners):
        yield from first.logits_together(runners, windows, counts, progress)
        return
    for row, tokens in enumerate(windows):
        asked = zip(runners, counts, strict=True)
        yield tuple(one.logits(tokens) for one, count in asked if count is None or row < count)


def _each(runner: Runner, windows: Sequence[Int64], progress: Progress) -> Iterator[Float32]:
    # A generator would hold what it gave until it's asked again.
    return map(itemgetter(0), _together([runner], windows, [None], progress))


def check_vocabularies(reference: Runner, candidate: Runner) -> None:
    """Raise MismatchError when the two give logits over different numbers of tokens."""
    if reference.vocab_size != candidate.vocab_size:
        raise MismatchError(
            f"the reference has a vocabulary of {reference.vocab_size} tokens and the artefact one of "
            f"{candidate.vocab_size}; they come from different models"
        )


def _retained(artefact: Aggregate, base: Aggregate) -> Interval | None:
    """R with its error by the delta method over windows, and its interval from paired resamples."""
    lost, effect = artefact.window_sums("kl"), base.window_sums("kl")
    if effect.sum() <= 0.0:
        return None
    ratio = lost.sum() / effect.sum()
    drawn = bootstrap.totals(np.stack([lost, effect], axis=1))
    # A resample of windows on which the adapter does nothing has no ratio.
    drawn = drawn[drawn[:, 1] > 0]
    low, high = bootstrap.interval(1.0 - drawn[:, 0] / drawn[:, 1])
    count = len(lost)
    spread = np.sum((lost - ratio * effect) ** 2) * count / max(count - 1, 1)
    return Interval(float(1.0 - ratio), float(np.sqrt(spread) / effect.sum()), low, high)
