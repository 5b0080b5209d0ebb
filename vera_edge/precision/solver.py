"""The knapsack solved, its answer tried out, and solved again with what the trial showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.errors import PlanError
from vera_edge.exporting.exporter import CALIBRATION
from vera_edge.merging import Prepared
from vera_edge.plans.plan import SAME, Plan
from vera_edge.precision.changes import Change, Replaying
from vera_edge.precision.choice import ChosenPlan, FrontPoint, Trial
from vera_edge.precision.codes import INTEGER, UnitCodes
from vera_edge.precision.knapsack import Front, front
from vera_edge.precision.request import PlanRequest, split
from vera_edge.precision.trial import Trials
from vera_edge.precision.units import ENDS, MeasuredUnit, Values, as_it_is, ends_change
from vera_edge.progress import Progress
from vera_edge.requantize.effort import DEFAULT
from vera_edge.rounding.weight_rounding import Rounding

# Units together lose more than the sum of each alone; a measured factor takes this one's place.
FIRST_FACTOR = 1.25
# Exports at most, each corrects what the next plan is solved with; and runs in torch before each of them.
EXPORTS, RUNS = 4, 6
# A trial that leaves less than this of the limit unused is good enough.
_UNUSED_KL, _UNUSED_SIZE = 0.1, 0.01
# The share of a limit of KL to aim at, since the next measurement differs a little from what is expected.
_AIM = 0.96
_SHOWN = 12


def finished(plan: Plan, head: str, request: PlanRequest, ready: Prepared) -> Plan:
    """`plan` with what an export needs to know beside the steps."""
    options: dict[str, Any] = {
        "base_digest": ready.model.checkpoint.digest,
        "head": head,
        "method": request.method,
    }
    options |= {name: value for name, value in plan.options.items() if name == CALIBRATION}
    if request.effort != DEFAULT:
        options["effort"] = request.effort
    if request.mode == "branch" and ready.model.projections is not None:
        integers = any(split(name)[0] in INTEGER for name in request.formats)
        options["projections"] = "int8" if integers else "fp32"
    return replace(plan, weights=SAME, options=options, others=SAME)


@dataclass
class Solver:
    """Solves, tries out, corrects. `fixed`: bytes of the export beside the units.

    model, replay: the model as trained over the text that plans are measured on. values: see `Sensitivities`.
    factor: KL of all units together over the sum of each alone. gain: KL of an
    export over that of layers rounded alone, in torch.
    """

    request: PlanRequest
    start: Plan
    rounded: UnitCodes
    units: tuple[MeasuredUnit, ...]
    model: Any
    replay: Replaying
    trials: Trials
    progress: Progress
    fixed: float
    values: Values = as_it_is
    factor: float = FIRST_FACTOR
    gain: float = 1.0
    joint: dict[int, float] = field(default_factory=dict)
    tried: dict[int, Trial] = field(default_factory=dict)
    folders: dict[int, Path] = field(default_factory=dict)
    points: Front = field(init=False)

    def __post_init__(self) -> None:
        timed = self.request.max_latency is not None
        options = [tuple(unit.options.values()) for unit in self.units]
        if timed:
            options = [tuple(replace(option, size=option.time) for option in unit) for unit in options]
        self.points = front(options)

    def solve(self) -> int:
        """The point of the front that is best within the limit, by its own measurement."""
        for number in range(EXPORTS):
            point = self._settle(last=number == EXPORTS - 1)
            if point in self.tried:
                break
            self._try(point)
            if self._good_enough(self.tried[point]):
                break
        kept = [point for point, trial in self.tried.items() if self._keeps(trial)]
        if not kept:
            raise PlanError(self._refusal())
        return min(kept) if self.request.max_kl is not None else max(kept)

    def _settle(self, last: bool) -> int:
        """The plan to export: the best that is known once running it in torch tells nothing new."""
        if self.request.max_size is not None:
            return self._next_by_size(self.request.max_size, last)
        if self.request.max_latency is not None:
            least = int(self.points.sizes[0])
            return self.points.within_size(self.request.max_latency * least) or 0
        assert self.request.max_kl is not None
        limit = self.request.max_kl
        for _ in range(RUNS):
            point = self._next_by_loss(limit, last)
            if point in self.joint:
                break
            if limit * (1 - _UNUSED_KL) <= self._expected(point) <= limit:
                break
        return point

    def _next_by_size(self, limit: int, last: bool) -> int:
        kept = [point for point, trial in self.tried.items() if self._keeps(trial)]
        found = self.points.within_size(limit - self.fixed)
        if found is None or (last and not kept):
            return 0
        low = max(kept, default=-1)
        high = min((point for point in self.tried if point not in kept), default=len(self.points))
        return found if low < found < high else max(0, (low + high) // 2)

    def _next_by_loss(self, limit: float, last: bool) -> int:
        """The smallest plan that should keep the limit; where none should, the one that loses least."""
        safest = len(self.points) - 1
        known = {point: self._expected(point) for point in self.joint}
        kept = [point for point, kl in known.items() if kl <= limit]
        found = self.points.within_loss(limit * _AIM / (self.factor * self.gain))
        if last and not any(self._keeps(trial) for trial in self.tried.values()):
            return safest
        low = max((point for point in known if point not in kept), default=-1)
        high = min(kept, default=safest + 1)
        point = safest if found is None else found
        return point if low < point < high else min(safest, (low + high + 1) // 2)

    def _expected(self, point: int) -> float:
        """The KL that an export of the point has, or would have by what a run in torch gives."""
        if point in self.tried:
            return self.tried[point].kl
        if point not in self.joint:
            self.joint[point] = found = self._run(point)
            if (loss := float(self.points.losses[point])) > 0 and found > 0:
                self.factor = found / loss
        return self.joint[point] * self.gain

    def _run(self, point: int) -> float:
        """The KL of all units of a plan together, in torch."""
        picks = self._picks(point)
        layers: dict[int, list[MeasuredUnit]] = {}
        for unit in self.units:
            if unit.modules:
                layers.setdefault(self.replay.depth_of(unit.modules[0]), []).append(unit)

        def change_of(depth: int) -> Change:
            self.progress("running a plan", depth, len(layers))
            changes = [
                self.rounded.change(unit.modules, picks[unit.name], self.model)
                for unit in layers.get(depth, ())
            ]
            weights = {name: weight for change in changes for name, weight in change.weights.items()}
            return Change(weights, {name: b for change in changes for name, b in change.rounded.items()})

        def outside(parts: Sequence[str]) -> Change:
            return ends_change(self.model, picks[ENDS], self.values, parts, self.rounded.head)

        return self.replay.joint(change_of, outside)

    def _try(self, point: int) -> None:
        predicted, request = self._expected(point), self.request
        rounding = Rounding(
            text=request.calibration,
            tokens=request.calibration_tokens,
            max_memory=request.max_memory,
            device=request.device,
        )
        found = self.trials.measure(self.plan(point), rounding, len(self.tried), self.replay, self.progress)
        self.tried[point] = Trial(found.size, float(self.points.losses[point]), predicted, found.kl)
        self.folders[point] = found.folder
        # Tensors start on pages, so that what is beside the units differs from plan to plan.
        self.fixed = float(found.size - self._bytes(point))
        if self.joint[point] > 0:
            self.gain = found.kl / self.joint[point]

    def _keeps(self, trial: Trial) -> bool:
        kl, size = self.request.max_kl, self.request.max_size
        return (kl is None or trial.kl <= kl) and (size is None or trial.size <= size)

    def _good_enough(self, trial: Trial) -> bool:
        kl, size = self.request.max_kl, self.request.max_size
        used = (kl is None or trial.kl >= kl * (1 - _UNUSED_KL)) and (
            size is None or trial.size >= size * (1 - _UNUSED_SIZE)
        )
        return used and self._keeps(trial)

    def _refusal(self) -> str:
        if self.request.max_size is not None:
            least = min(trial.size for trial in self.tried.values())
            return (
                f"no plan fits into {self.request.max_size / 1e6:,.3f} MB: the smallest that was exported "
                f"takes {least / 1e6:,.3f} MB; raise --max-size or allow smaller formats (--formats)"
            )
        best = min(trial.kl for trial in self.tried.values())
        return (
            f"no plan keeps a KL of {self.request.max_kl:g}: the best that was exported measures {best:.3g}; "
            "raise --max-kl or allow more precise formats (--formats)"
        )

    def _picks(self, point: int) -> dict[str, str]:
        places = self.points.picks(point)
        return {unit.name: list(unit.options)[place] for unit, place in zip(self.units, places, strict=True)}

    def _formats(self, point: int) -> dict[str, str]:
        picks = self._picks(point)
        return {module: picks[unit.name] for unit in self.units for module in unit.modules}

    def plan(self, point: int) -> Plan:
        """The plan of a point, with what an export needs to know beside the steps."""
        formats = self._formats(point)
        steps = tuple(
            self.rounded.steps[formats[step.module]][step.module] if step.module in formats else step
            for step in self.start.steps
        )
        return finished(
            replace(self.start, steps=steps), self._picks(point)[ENDS], self.request, self.rounded.ready
        )

    def choice(self, point: int, seconds: Mapping[str, float], notes: tuple[str, ...]) -> ChosenPlan:
        """Everything that is known about a point."""
        points, trial = self.points, self.tried[point]
        shown = {point, *np.linspace(0, len(points) - 1, min(_SHOWN, len(points))).astype(int).tolist()}
        beside = trial.size - self._bytes(point)
        line = tuple(
            FrontPoint(
                self._bytes(at) + beside,
                float(points.losses[at]) * trial.factor,
                at == point,
                self._latency(at),
                self._token_seconds(at),
            )
            for at in sorted(shown)
        )
        gap = points.loss_gap(point) if self.request.max_kl is None else points.size_gap(point)
        picks, trials = self._picks(point), tuple(self.tried.values())
        facts = (self.plan(point), trial, trials, self.units, picks, self._bits(picks), gap, line)
        return ChosenPlan(*facts, seconds, notes, self._latency(point), self._token_seconds(point))

    def _latency(self, point: int) -> float | None:
        """Time of the layers' products over that of the quickest choice; None when it wasn't asked for."""
        if self.request.max_latency is None:
            return None
        return int(self.points.sizes[point]) / int(self.points.sizes[0])

    def _token_seconds(self, point: int) -> float | None:
        """Seconds of one token's products; None when no times were asked for."""
        picks = self._picks(point)
        total = sum(unit.options[picks[unit.name]].time for unit in self.units)
        return total / 1e9 or None

    def _bytes(self, point: int) -> int:
        """Bytes of all units."""
        picks = self._picks(point)
        return sum(unit.options[picks[unit.name]].size for unit in self.units)

    def _bits(self, picks: Mapping[str, str]) -> float:
        layers = [unit for unit in self.units if unit.modules]
        steps = next(iter(self.rounded.steps.values()))
        weights = sum(steps[name].shape[0] * steps[name].shape[1] for unit in layers for name in unit.modules)
        return 8 * sum(unit.options[picks[unit.name]].size for unit in layers) / weights
