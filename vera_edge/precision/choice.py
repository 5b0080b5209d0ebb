"""What automatic precision found: the plan, the measurements behind it, and what else could have been had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vera_edge.plans.plan import Plan
from vera_edge.precision.units import MeasuredUnit


@dataclass(frozen=True)
class FrontPoint:
    """A choice on the Pareto front. size: bytes of the export, computed from the measured one.

    kl: predicted, the sum of the units' KLs times the correction factor. latency, token_seconds: see
    ChosenPlan.
    """

    size: int
    kl: float
    chosen: bool
    latency: float | None
    token_seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "size": self.size,
            "predicted_kl": self.kl,
            "chosen": self.chosen,
            "latency": self.latency,
            "token_seconds": self.token_seconds,
        }


@dataclass(frozen=True)
class Trial:
    """A plan that was exported and measured. sum_kl: of its units, each alone.

    predicted_kl: of all units together in torch, known before the export was made. kl: the export's own.
    """

    size: int
    sum_kl: float
    predicted_kl: float
    kl: float

    @property
    def factor(self) -> float:
        """Measured KL over the sum of the units' KLs; 1 where nothing is lost."""
        return self.kl / self.sum_kl if self.sum_kl > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "size": self.size,
            "sum_kl": self.sum_kl,
            "predicted_kl": self.predicted_kl,
            "measured_kl": self.kl,
            "correction_factor": self.factor,
        }


@dataclass(frozen=True)
class ChosenPlan:
    """A plan that keeps the limit that was asked for.

    trial: its own measurement; trials: all that were exported on the way. gap: by what share of its loss (of
    its size, for a limit of KL) it can be above the best plan, by the sums, at most. picks: the format of
    each unit by name. bits: per weight of the linear layers that could be chosen for. seconds: how long each
    kind of work took. notes: how things were measured, for a person to read. latency: time of the layers'
    products over that of the quickest choice; None unless it was limited. token_seconds: seconds of one
    token's products on the device that was named, or on this machine; None where no time was asked for.
    """

    plan: Plan
    trial: Trial
    trials: tuple[Trial, ...]
    units: tuple[MeasuredUnit, ...]
    picks: Mapping[str, str]
    bits: float
    gap: float
    front: tuple[FrontPoint, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    latency: float | None
    token_seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return {
            "plan": self.plan.to_dict(),
            **self.trial.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "bits_per_weight": self.bits,
            "optimality_gap": self.gap,
            "latency": self.latency,
            "token_seconds": self.token_seconds,
            "front": [point.to_dict() for point in self.front],
            "units": [
                {
                    "name": unit.name,
                    "modules": list(unit.modules),
                    "chosen": self.picks[unit.name],
                    "options": {
                        name: {"size": option.size, "kl": option.loss, "nanoseconds": option.time or None}
                        for name, option in unit.options.items()
                    },
                }
                for unit in self.units
            ],
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
        }
