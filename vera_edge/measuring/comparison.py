"""What the comparison of two models over a text found, as plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

QUANTILES: Mapping[str, float] = {
    "p0.1": 0.001, "p1": 0.01, "p5": 0.05, "p10": 0.10, "p25": 0.25, "median": 0.5,
    "p75": 0.75, "p90": 0.90, "p95": 0.95, "p99": 0.99, "p99.9": 0.999,
}  # fmt: skip
# Edges of the KL histogram in nats: four bins a decade, from what float32 logits can resolve upwards.
HISTOGRAM_EDGES: tuple[float, ...] = tuple(10.0 ** (exponent / 4) for exponent in range(-40, 9))


@dataclass(frozen=True)
class Interval:
    """A figure, its standard error over tokens, and its 95 % bootstrap interval over windows."""

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Distribution:
    """A per-token figure: its mean, extremes, and quantiles with the intervals of some of them."""

    mean: Interval
    minimum: float
    maximum: float
    quantiles: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class WorstToken:
    """Where the two models differ most: after `position` of `window`, KL in nats, and each one's choice."""

    window: int
    position: int
    kl: float
    reference_choice: int
    choice: int


@dataclass(frozen=True)
class Comparison:
    """How a candidate differs from the reference over all scored tokens. KL and losses in nats."""

    tokens: int
    windows: int
    kl: Distribution
    reverse_kl: Distribution
    same_top1: Interval
    top5: Interval
    right_to_wrong: Interval
    wrong_to_right: Interval
    flips: Interval
    reference_accuracy: float
    accuracy: float
    delta_p: Distribution
    delta_p_rms: Interval
    reference_perplexity: Interval
    perplexity: Interval
    perplexity_ratio: Interval
    log_perplexity_ratio: Interval
    perplexity_difference: Interval
    log_perplexity_correlation: float
    logit_cosine: Interval
    logit_rms: Interval
    logit_largest_error: float
    kl_histogram: tuple[int, ...]  # counts below, between and above HISTOGRAM_EDGES
    kl_by_position: tuple[float, ...]
    worst: tuple[WorstToken, ...]
