"""The drift report of a model that gives embeddings or classes: what was measured, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vera_edge.measuring.comparison import Interval
from vera_edge.measuring.encoders import ClassDrift, EmbeddingDrift
from vera_edge.measuring.labels_and_values import LabelDrift, ValueDrift
from vera_edge.measuring.result import FORMAT, Artefact, Outcome, TextFacts, Verdict, raise_when_exceeded
from vera_edge.measuring.verdict import FAIL_RETAINED, WARN_RETAINED

Measured = EmbeddingDrift | ClassDrift | LabelDrift | ValueDrift
# By what is measured: limit -> the figure that it bounds. `min_retained` goes with each.
LIMITS: Mapping[type[Measured], Mapping[str, str]] = {
    EmbeddingDrift: {
        "min_cosine": "cosine",
        "min_rank_correlation": "rank_correlation",
        "min_overlap": "overlap",
    },
    ClassDrift: {"max_kl": "kl", "min_top1": "agreement"},
    LabelDrift: {"max_kl": "kl", "min_top1": "agreement"},
    ValueDrift: {
        "max_relative_error": "relative_error",
        "max_largest_error": "largest_error",
        "min_rank_correlation": "rank_correlation",
    },
}


@dataclass(frozen=True)
class EncoderReport:
    """One artefact against the model as trained; one of `embeddings`, `classes`, `labels`, `values` is set.

    effect: the same figures of the base without the adapter, None without one. retained: the share of what
    the adapter changes (1 - cosine, KL of classes or labels, relative error of values) that the artefact
    keeps.
    """

    reference: Artefact
    candidate: Artefact
    base: Artefact | None
    text: TextFacts
    embeddings: EmbeddingDrift | None
    classes: ClassDrift | None
    labels: LabelDrift | None
    values: ValueDrift | None
    effect: Measured | None
    retained: Interval | None
    verdict: Verdict
    notes: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> Measured:
        """The figures of the artefact."""
        found = self.embeddings or self.classes or self.labels or self.values
        assert found is not None
        return found

    @property
    def figures(self) -> dict[str, Interval | None]:
        """What a limit may be set on, by the limit's name."""
        measured = self.measured
        found: dict[str, Interval | None] = {
            limit: getattr(measured, name) for limit, name in LIMITS[type(measured)].items()
        }
        return found | {"min_retained": self.retained}

    @property
    def passed(self) -> bool:
        """Whether every limit was kept; a limit that can't be decided isn't."""
        return all(outcome.state == "kept" for outcome in self.outcomes)

    def raise_when_exceeded(self) -> None:
        """Raise DriftExceeded when a limit was broken or can't be decided."""
        raise_when_exceeded(self.outcomes, self.candidate.path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"format": FORMAT, "kind": "encoder", "passed": self.passed}


def judge(lost: float, effect: float | None, retained: Interval | None) -> Verdict:
    """The verdict, from what the artefact changes and what dropping the adapter does (`effect`)."""
    if effect is None:
        return Verdict(
            "faithful" if lost < 0.01 else "degraded",
            f"The artefact moves its answers by {lost:.2g}; no adapter is involved.",
        )
    if retained is None or effect < 1e-7:
        return Verdict(
            "undecided", f"The adapter changes these texts by only {effect:.2g}, too little to tell."
        )
    figures = f"{retained.value:.1%} of its effect is retained ({lost:.2g} against an effect of {effect:.2g})"
    if retained.value < FAIL_RETAINED:
        return Verdict("lost", f"The adapter is lost: {figures}.")
    if retained.value < WARN_RETAINED:
        return Verdict("degraded", f"The adapter is degraded: {figures}.")
    return Verdict("faithful", f"The adapter is kept: {figures}.")
