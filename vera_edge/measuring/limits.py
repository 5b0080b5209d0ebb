"""Limits on drift: read them, hold a report to them, compare it with an earlier one. It fails closed.

A limit is kept only when the whole 95 % interval lies on its good side, broken when the whole interval lies
on the other, and undecided in between, with too few windows for an interval, or where it is about an adapter
and there is none: that fails too, and says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vera_edge.bundle import contents as bundle
from vera_edge.errors import PlanError
from vera_edge.measuring.comparison import Comparison, Interval
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport, Outcome
from vera_edge.measuring.verdict import FAIL_RETAINED
from vera_edge.text.bootstrap import MIN_WINDOWS

Report = TypeVar("Report", bound=DriftReport | EncoderReport)


@dataclass(frozen=True)
class _Metric:
    """What a limit bounds: how it is called in a sentence, and where its figure is."""

    words: str
    read: Callable[[DriftReport], Interval | None] | None  # None: measured of encoders only


def _of(read: Callable[[Comparison], Interval]) -> Callable[[DriftReport], Interval | None]:
    return lambda report: read(report.fidelity)


def _quantile(name: str) -> Callable[[DriftReport], Interval | None]:
    def read(report: DriftReport) -> Interval | None:
        low, high = report.fidelity.kl.intervals[name]
        return Interval(report.fidelity.kl.quantiles[name], 0.0, low, high)

    return read


# Every limit's name, as options and drift.toml spell it: "max_" bounds from above, "min_" from below.
METRICS: Mapping[str, _Metric] = {
    "max_kl": _Metric("mean KL", _of(lambda c: c.kl.mean)),
    "max_kl_median": _Metric("median KL", _quantile("median")),
    "max_kl_p90": _Metric("KL's 90 % quantile", _quantile("p90")),
    "max_kl_p99": _Metric("KL's 99 % quantile", _quantile("p99")),
    "max_kl_p99.9": _Metric("KL's 99.9 % quantile", _quantile("p99.9")),
    "max_reverse_kl": _Metric("mean reverse KL", _of(lambda c: c.reverse_kl.mean)),
    "min_top1": _Metric("top-1 agreement", _of(lambda c: c.same_top1)),
    "min_top5": _Metric("top-5 agreement", _of(lambda c: c.top5)),
    "max_flips": _Metric("share of flips", _of(lambda c: c.flips)),
    "max_right_to_wrong": _Metric("share of answers turned wrong", _of(lambda c: c.right_to_wrong)),
    "max_perplexity_ratio": _Metric("perplexity ratio", _of(lambda c: c.perplexity_ratio)),
    "max_delta_p_rms": _Metric("RMS of delta p", _of(lambda c: c.delta_p_rms)),
    "max_logit_rms": _Metric("RMS of the logits' error", _of(lambda c: c.logit_rms)),
    "min_cosine": _Metric("logit cosine", _of(lambda c: c.logit_cosine)),
    "min_overlap": _Metric("top-k overlap of retrieval", None),
    "min_rank_correlation": _Metric("rank correlation", None),
    "max_relative_error": _Metric("mean error in standard deviations of the reference", None),
    "max_largest_error": _Metric("largest error in standard deviations of the reference", None),
    "min_retained": _Metric("retained effect", lambda report: report.retained),
}


class Usual(float):
    """A bound that nobody gave: held where it can be, and left out where there is nothing to hold it to."""


# Held unless told otherwise, wherever there is an adapter: less than half of it kept is a failed release.
DEFAULTS: Mapping[str, float] = {"min_retained": Usual(FAIL_RETAINED)}


def read_limits(path: Path) -> dict[str, float]:
    """The `[limits]` table of a TOML file. Raises PlanError when it isn't one, or names an unknown limit."""
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path} is missing; give a TOML file with a [limits] table") from None
    except (OSError, ValueError, RecursionError) as cause:
        raise PlanError(f"{path} can't be read as TOML: {cause}") from None
    if set(value) != {"limits"} or not isinstance(value["limits"], dict):
        raise PlanError(f"{path} must hold one table, [limits], and nothing else")
    return check_limits(value["limits"], str(path))


def check_limits(limits: Mapping[str, Any], where: str) -> dict[str, float]:
    """`limits`, every name known and every bound one that can be kept; raises PlanError naming `where`."""
    for name, bound in limits.items():
        if name not in METRICS:
            raise PlanError(f"{where}: there is no limit {name!r}; known are {', '.join(METRICS)}")
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise PlanError(f"{where}: {name} is {bound!r} where a number belongs")
    bundle.check_limits(limits, where)
    return {name: float(bound) for name, bound in limits.items()}


def gather(path: Path | None, options: Mapping[str, float | None]) -> dict[str, float]:
    """The defaults, over them the file's limits, over them those of `options` that are given."""
    given = {name: bound for name, bound in options.items() if bound is not None}
    return {**DEFAULTS, **(read_limits(path) if path else {}), **check_limits(given, "options")}


def check_text(names: Iterable[str]) -> None:
    """Raise PlanError for a limit on what isn't measured of models that give text."""
    for name in names:
        if METRICS[name].read is None:
            raise PlanError(f"{name} can't be held: it is measured of encoders, and this model gives text")


def hold(report: Report, limits: Mapping[str, float]) -> Report:
    """`report` with an Outcome for each of `limits`: a default one without an adapter has none.

    One that was given and can't be decided is "undecided", which fails. Raises PlanError for a limit on what
    this kind of report doesn't measure.
    """
    asked = {
        name: bound
        for name, bound in limits.items()
        if report.effect is not None or not isinstance(bound, Usual)
    }
    outcomes = tuple(_outcome(report, name, bound) for name, bound in asked.items())
    return replace(report, outcomes=report.outcomes + outcomes)


def _outcome(report: DriftReport | EncoderReport, name: str, bound: float) -> Outcome:
    metric = METRICS[name]
    found = _figure(report, name, metric)
    upper = name.startswith("max_")
    if found is None or (name == "min_retained" and report.verdict.level == "undecided"):
        value = found.value if found else 0.0
        words = "the adapter changes too little on this text to tell what is retained; measure on other text"
        if report.effect is None:
            words = "the reference has no adapter whose effect could be retained; leave the limit out"
        return Outcome(
            name, bound, value, None, None, "undecided", f"{metric.words} can't be decided: {words}"
        )
    side = "at most" if upper else "at least"
    figures = (
        f"{metric.words} is {found.value:.4g} [{found.low:.4g}, {found.high:.4g}], limit {side} {bound:g}"
    )
    windows = report.text.windows
    if windows < MIN_WINDOWS:
        state = "undecided"
        words = f"too little data to decide: {windows} windows of the {MIN_WINDOWS} needed; give more text"
    elif (found.high <= bound) if upper else (found.low >= bound):
        state, words = "kept", "kept"
    elif (found.low > bound) if upper else (found.high < bound):
        state, words = "broken", "broken"
    else:
        state, words = (
            "undecided",
            "too little data to decide: the interval lies on both sides; give more text",
        )
    return Outcome(name, bound, found.value, found.low, found.high, state, f"{figures}: {words}")


def _figure(report: DriftReport | EncoderReport, name: str, metric: _Metric) -> Interval | None:
    if isinstance(report, EncoderReport):
        if name not in report.figures:
            raise PlanError(
                f"{name} can't be held: of this model only {', '.join(report.figures)} are measured"
            )
        return report.figures[name]
    check_text([name])
    assert metric.read is not None
    return metric.read(report)
