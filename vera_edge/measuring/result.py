"""The drift report: everything that was measured, decided and shown, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vera_edge.errors import DriftExceeded
from vera_edge.measuring import llama_cpp
from vera_edge.measuring.comparison import HISTOGRAM_EDGES, Comparison, Interval

FORMAT = 1


@dataclass(frozen=True)
class Artefact:
    """One side of the comparison: what it is in a few words, where it lies, its bytes on disk."""

    name: str
    path: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class TextFacts:
    """What was measured on; `sha256` is of the text's UTF-8 bytes."""

    source: str
    sha256: str
    tokens: int
    windows: int
    window: int


@dataclass(frozen=True)
class Verdict:
    """`level` is "faithful", "degraded", "lost" or "undecided"; `sentence` says why."""

    level: str
    sentence: str


@dataclass(frozen=True)
class Outcome:
    """One limit and what became of it; `state` is "kept", "broken" or "undecided" (which fails too)."""

    limit: str
    bound: float
    value: float
    low: float | None
    high: float | None
    state: str
    sentence: str


def raise_when_exceeded(outcomes: Sequence[Outcome], path: str) -> None:
    """Raise DriftExceeded when a limit on the artefact in `path` was broken or can't be decided."""
    raise_when_any_exceeded({path: outcomes})


def raise_when_any_exceeded(outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """The same of several artefacts, by their paths: one sentence for all."""
    failed = {
        path: ", ".join(f"{outcome.limit} ({outcome.state})" for outcome in own if outcome.state != "kept")
        for path, own in outcomes.items()
    }
    if said := "; ".join(f"{path}: {names}" for path, names in failed.items() if names):
        raise DriftExceeded(f"drift limits not kept for {said}")


@dataclass(frozen=True)
class WorstText:
    """A token where the models differ most, as text."""

    before: str
    truth: str
    reference_choice: str
    choice: str
    kl: float


@dataclass(frozen=True)
class Generations:
    """Greedy continuations of one prompt; the first `same` tokens agree."""

    prompt: str
    reference: tuple[str, ...]
    candidate: tuple[str, ...]
    same: int


@dataclass(frozen=True)
class LayerDrift:
    """One linear layer of an artefact whose weights can be read.

    weight_error: |Q - W'| / |W'|, W' the exact merged weight and Q the artefact's.
    delta_error: |Q - W'| / |dW|, relative to what the adapter adds (None without an adapter).
    retained: <Q - W, dW> / |dW|^2, the share of the delta that the stored weight still holds.
    output_snr: 10 log10 of signal over error power at the layer's output, in dB, inputs from the text.
    kl: mean KL in nats when this layer alone is taken from the artefact.
    """

    module: str
    bytes: int
    weight_error: float
    delta_error: float | None = None
    retained: float | None = None
    output_snr: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class DriftReport:
    """One artefact against the model as trained."""

    reference: Artefact
    candidate: Artefact
    base: Artefact | None
    text: TextFacts
    fidelity: Comparison
    effect: Comparison | None
    noise: Comparison | None
    retained: Interval | None
    verdict: Verdict
    notes: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    worst: tuple[WorstText, ...] = ()
    generations: tuple[Generations, ...] = ()
    layers: tuple[LayerDrift, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every limit was kept; a limit that can't be decided isn't."""
        return all(outcome.state == "kept" for outcome in self.outcomes)

    def raise_when_exceeded(self) -> None:
        """Raise DriftExceeded when a limit was broken or can't be decided."""
        raise_when_exceeded(self.outcomes, self.candidate.path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; figures under llama.cpp's names are added as "llama.cpp"."""
        value = asdict(self)
        theirs = llama_cpp.statistics(self.fidelity)
        value["llama.cpp"] = {name: {"value": v, "uncertainty": u} for name, (v, u) in theirs.items()}
        return value | {"format": FORMAT, "passed": self.passed, "histogram_edges": list(HISTOGRAM_EDGES)}
