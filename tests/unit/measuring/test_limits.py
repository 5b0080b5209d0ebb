"""Limits: what is kept, what is broken, what can't be decided and so fails; files that hold them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vera_edge.errors import DriftExceeded, MismatchError, PlanError
from vera_edge.measuring import baseline, html, junit, limits, plots
from vera_edge.measuring.evaluate import measure
from vera_edge.measuring.result import Artefact, DriftReport, TextFacts
from vera_edge.measuring.verdict import judge
from vera_edge.text.windows import SourceText, Windows

VOCAB = 31
Make = Callable[..., DriftReport]


class _Table:
    """Bigram logits."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.vocab_size = table.astype(np.float32), VOCAB

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self.table[tokens])


def make_report(share: float = 0.3, windows: int = 12, adapter: bool = True, seed: int = 0) -> DriftReport:
    """A measured report of an artefact `share` of the way from the model as trained to its base."""
    rng = np.random.default_rng(seed)
    trained = 2 * rng.standard_normal((VOCAB, VOCAB))
    base = trained + rng.standard_normal((VOCAB, VOCAB))
    cut = Windows(
        SourceText("t.txt", "", "ab"), tuple(rng.integers(0, VOCAB, 64) for _ in range(windows)), 64
    )
    between = _Table((1 - share) * trained + share * base)
    found = measure(_Table(trained), between, cut, base=_Table(base) if adapter else None)
    side = Artefact("model", "out/model", "checkpoint, int4", 1000)
    text = TextFacts("t.txt", "ab", cut.scored, windows, 64)
    sides = (replace(side, name="adapter"), side, side if adapter else None)
    return DriftReport(*sides, text, found.fidelity, found.effect, found.noise, found.retained, judge(found))


def _state(report: DriftReport, **bounds: float) -> str:
    held = limits.hold(report, bounds)
    assert len(held.outcomes) == 1
    return held.outcomes[0].state


def test_every_limit_is_kept_or_broken_when_it_lies_clear_of_its_interval() -> None:
    report = make_report()
    for name, metric in limits.METRICS.items():
        if metric.read is None:
            continue  # measured of encoders
        found = metric.read(report)
        assert found is not None
        wide = abs(found.value) + 1.0
        kept, broken = (found.value + wide, found.value - wide)
        if name.startswith("min_"):
            kept, broken = broken, kept
        assert _state(report, **{name: kept}) == "kept", name
        assert _state(report, **{name: broken}) == "broken", name


@pytest.mark.parametrize("name", ["min_overlap", "min_rank_correlation"])
def test_a_limit_on_what_is_not_measured_of_text_models_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="measured of encoders"):
        limits.hold(make_report(), {name: 0.5})


def test_a_bound_inside_the_interval_is_undecided_and_fails() -> None:
    report = make_report()
    held = limits.hold(report, {"max_kl": report.fidelity.kl.mean.value * 1.0001})
    assert held.outcomes[0].state == "undecided" and not held.passed
    assert "the interval lies on both sides" in held.outcomes[0].sentence
    with pytest.raises(DriftExceeded, match=r"max_kl \(undecided\)"):
        held.raise_when_exceeded()


def test_too_few_windows_decide_nothing_however_good_they_look() -> None:
    report = make_report(share=0.0, windows=7)
    held = limits.hold(report, {"max_kl": 1.0})
    assert held.outcomes[0].state == "undecided"
    assert "7 windows of the 8 needed; give more text" in held.outcomes[0].sentence
    assert limits.hold(make_report(share=0.0, windows=8), {"max_kl": 1.0}).passed


def test_by_default_half_of_the_effect_must_be_retained() -> None:
    defaults = limits.gather(None, {"max_kl": None})
    assert defaults == {"min_retained": 0.5}
    assert limits.hold(make_report(share=0.3), defaults).passed
    lost = limits.hold(make_report(share=0.95), defaults)
    assert [outcome.state for outcome in lost.outcomes] == ["broken"]


def test_without_an_adapter_nothing_can_be_retained_and_nothing_is_asked() -> None:
    report = limits.hold(make_report(adapter=False), limits.DEFAULTS)
    assert report.outcomes == () and report.passed
    report.raise_when_exceeded()


@pytest.mark.parametrize("given", [0.9, 0.5, -9.0])
def test_a_limit_that_was_given_is_undecided_without_an_adapter(tmp_path: Path, given: float) -> None:
    """Also where it is what would have been the default."""
    path = tmp_path / "drift.toml"
    path.write_text(f"[limits]\nmin_retained = {given}\n")
    for bounds in (
        {"min_retained": given},
        limits.gather(None, {"min_retained": given}),
        limits.gather(path, {"min_retained": None}),
    ):
        report = limits.hold(make_report(adapter=False), bounds)
        assert [outcome.state for outcome in report.outcomes] == ["undecided"] and not report.passed
        assert "has no adapter whose effect" in report.outcomes[0].sentence
        with pytest.raises(DriftExceeded, match=r"min_retained \(undecided\)"):
            report.raise_when_exceeded()


def test_an_adapter_without_effect_fails_closed() -> None:
    report = make_report()
    report = replace(report, retained=None, verdict=replace(report.verdict, level="undecided"))
    held = limits.hold(report, limits.DEFAULTS)
    assert held.outcomes[0].state == "undecided" and "changes too little" in held.outcomes[0].sentence


def test_options_go_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "drift.toml"
    path.write_text('[limits]\nmax_kl = 0.02\nmin_retained = 0.9\n"max_kl_p99.9" = 1\n')
    found = limits.gather(path, {"max_kl": 0.01, "min_top1": None})
    assert found == {"min_retained": 0.9, "max_kl": 0.01, "max_kl_p99.9": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[limits]\nmax_k = 1\n", "no limit 'max_k'; known are max_kl"),
        ("[limits]\nmax_kl = true\n", "True where a number belongs"),
        ('[limits]\nmax_kl = "low"\n', "'low' where a number belongs"),
        ("[limits]\nmax_kl = nan\n", "nan where a finite number belongs"),
        ("[limits]\nmax_kl = inf\n", "inf where a finite number belongs"),
        ("[limits]\nmax_kl = -0.1\n", "max_kl is -0.1, which nothing can keep"),
        ("[limits]\nmin_top1 = 99\n", "min_top1 is 99, which nothing can keep"),
        ("max_kl = 1\n", "must hold one table"),
        ("[limits\n", "can't be read as TOML"),
    ],
)
def test_a_limits_file_that_is_wrong_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "drift.toml"
    path.write_text(content)
    with pytest.raises(PlanError, match=message):
        limits.read_limits(path)


def test_a_missing_limits_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is missing"):
        limits.read_limits(tmp_path / "none.toml")


def test_junit_shows_each_limit_as_a_test() -> None:
    report = limits.hold(make_report(), {"max_kl": 1e-9, "min_top1": 0.0})
    suites = ET.fromstring(junit.render(report))
    cases = {case.get("name"): case for case in suites.iter("testcase")}
    assert suites.get("tests") == "3" and suites.get("failures") == "1"
    assert set(cases) == {"measured", "max_kl", "min_top1"}
    failure = cases["max_kl"].find("failure")
    assert failure is not None and failure.get("type") == "broken"
    assert failure.get("message") == report.outcomes[0].sentence
    assert cases["min_top1"].find("failure") is None
    assert junit.render(report) == junit.render(report)


def _earlier(tmp_path: Path, report: DriftReport) -> Path:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(report.to_dict()))
    return path


def test_the_same_artefact_keeps_its_own_baseline(tmp_path: Path) -> None:
    report = make_report()
    held = baseline.hold(report, baseline.read(_earlier(tmp_path, report)))
    assert held.passed and len(held.outcomes) == 5


def test_a_release_that_drifts_further_than_the_last_is_broken(tmp_path: Path) -> None:
    earlier = baseline.read(_earlier(tmp_path, make_report(share=0.2)))
    held = baseline.hold(make_report(share=0.3), earlier)
    states = {outcome.limit: outcome.state for outcome in held.outcomes}
    assert states["baseline_kl"] == "broken" and states["baseline_bytes"] == "kept"
    assert baseline.hold(make_report(share=0.1), earlier).passed


def test_a_release_that_grew_is_broken(tmp_path: Path) -> None:
    report = make_report()
    grown = replace(report, candidate=replace(report.candidate, bytes=1200))
    held = baseline.hold(grown, baseline.read(_earlier(tmp_path, report)))
    assert [o.limit for o in held.outcomes if o.state == "broken"] == ["baseline_bytes"]


def test_a_baseline_of_other_text_is_refused(tmp_path: Path) -> None:
    earlier = baseline.read(_earlier(tmp_path, make_report(windows=10)))
    with pytest.raises(MismatchError, match="measure both on the same text"):
        baseline.hold(make_report(windows=12), earlier)


@pytest.mark.parametrize("content", ["{}", '{"format": 1}', '{"format": 1, "fidelity": []}', "[]", "x"])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"baseline\.json"):
        baseline.read(path)


# What no JSON of a report holds is refused before its fields are looked at.
NO_REPORT = "isn't a report that `vera-edge drift --json` printed|isn't valid JSON|holds over .* JSON values"


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("candidate", "name", None),
        ("candidate", "name", 3),
        ("candidate", "bytes", "many"),
        ("candidate", "bytes", True),
        ("text", "source", None),
        ("text", "sha256", None),
        ("fidelity", "flips", {"value": "0.1"}),
        ("fidelity", "flips", {"value": float("nan")}),
        ("fidelity", "kl", {"mean": {"value": 1.0}, "quantiles": []}),
        ("fidelity", "kl", {"mean": {"value": 1e308}, "quantiles": {"p99": 1.0}}),
        ("fidelity", "kl", {"mean": {"value": -1.0}, "quantiles": {"p99": 1.0}}),
        ("fidelity", "flips", {"value": 10**400}),
        ("fidelity", "same_top1", {"value": -(10**400)}),
        ("candidate", "bytes", 10**4000),
        ("candidate", "bytes", [1] * 10**6),
        ("candidate", "name", "x" * 10**6),
        ("candidate", "name", "a\x1b[2J"),
        ("candidate", "name", "\ud800"),
        ("text", "sha256", []),
        ("text", "source", {}),
        ("text", "tokens", "128"),
        ("text", "window", 1.5),
    ],
)
def test_what_is_read_of_a_report_is_there_before_anything_is_measured(
    tmp_path: Path, where: str, key: str, value: object
) -> None:
    """Left out where the value is None; it would be missed only after hours of measuring."""
    report = make_report().to_dict()
    if value is None:
        del report[where][key]
    else:
        report[where][key] = value
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(report))
    with pytest.raises(PlanError, match=NO_REPORT):
        baseline.read(path)


@pytest.mark.parametrize("value", [[1] * 10**6, "1" * 10**6, 10**4000, {}, None, True])
def test_a_report_whose_format_is_anything_is_refused_in_a_short_sentence(
    tmp_path: Path, value: object
) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(make_report().to_dict() | {"format": value, "text": "sha256 tokens window"}))
    with pytest.raises(PlanError, match=NO_REPORT) as error:
        baseline.read(path)
    assert len(str(error.value)) < len(str(path)) + 100


def test_a_report_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a file with a hole
    with pytest.raises(PlanError, match="is larger than any report"):
        baseline.read(path)


def test_whatever_a_report_may_hold_can_be_drawn(tmp_path: Path) -> None:
    """The smallest and largest figures, and names that are markup, formulas or no UTF-8."""
    others, values = [], ((5e-324, 1), (0.0, 0), (1e6, 2**63), (1e-29, 10))
    for number, (kl, size) in enumerate(values):
        report = make_report().to_dict()
        report["candidate"] |= {"bytes": size, "name": f"$\\frac{{ <script> {number}"}
        report["fidelity"]["kl"]["mean"]["value"] = kl
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(report))
        others.append(baseline.read(path))
    named = replace(make_report(), candidate=Artefact("$\\frac{\udcff", "a", "b", 5))
    page = html.render(named, others).decode()
    assert "<script> 1" not in page and "\\udcff" in page
    assert plots.render(make_report(), others)["size_against_drift.png"]


def test_a_baseline_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text('{"format": 99}')
    with pytest.raises(PlanError, match="format 99, not 1; measure it again"):
        baseline.read(path)
