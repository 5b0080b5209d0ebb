"""The knapsack solved, its answer tried out, and solved again with what the trial showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from vera_edge.errors import PlanError
from vera_edge.merge import Prepared
from vera_edge.plan import SAME, Plan
from vera_edge.precision.choice import Choice, FrontPoint, Trial
from vera_edge.precision.codes import ENDS, Picked, Rounded, Unit
from vera_edge.precision.knapsack import Front, front
from vera_edge.precision.request import Request
from vera_edge.precision.trial import Trials
from vera_edge.progress import Progress

# Units together lose more than the sum of each alone; a measured factor takes this one's place.
FIRST_FACTOR = 1.25
# Trials at most: each corrects what the next one is solved with.
ROUNDS = 6
# A trial that leaves less than this of the limit unused is good enough.
_UNUSED_KL, _UNUSED_SIZE = 0.1, 0.01
_SHOWN = 12


def finished(plan: Plan, head: str, request: Request, ready: Prepared) -> Plan:
    """`plan` with what an export needs to know beside the steps."""
    options = {"base_digest": ready.checkpoint.digest, "head": head, "method": request.method}
    if request.mode == "branch":
        options["projections"] = "int8" if {"int4", "int8"} & set(request.formats) else "fp32"
    return replace(plan, weights=SAME, options=options, others=SAME)


@dataclass
class Solver:
    """Solves, tries out, corrects. `fixed`: bytes of the export beside the units; `factor`: see Trial."""

    request: Request
    start: Plan
    rounded: Rounded
    units: tuple[Unit, ...]
    trials: Trials
    progress: Progress
    fixed: float
    factor: float = FIRST_FACTOR
    tried: dict[int, Trial] = field(default_factory=dict)
    points: Front = field(init=False)

    def __post_init__(self) -> None:
        self.points = front([tuple(unit.options.values()) for unit in self.units])

    def solve(self) -> int:
        """The point of the front that is best within the limit, by its own measurement."""
        for number in range(ROUNDS):
            point = self._next(last=number == ROUNDS - 1)
            if point in self.tried:
                break
            self._try(point)
            if self._good_enough(self.tried[point]):
                break
        kept = [point for point, trial in self.tried.items() if self._keeps(trial)]
        if not kept:
            raise PlanError(self._refusal())
        return max(kept) if self.request.max_size is not None else min(kept)

    def _next(self, last: bool) -> int:
        """What to try, by what is known; when the limit can't be kept, what comes nearest to it.

        A prediction that trials have proved wrong gives way to the middle of what they leave open.
        """
        request, points = self.request, self.points
        kept = [point for point, trial in self.tried.items() if self._keeps(trial)]
        broken = [point for point in self.tried if point not in kept]
        if request.max_size is not None:
            found, safest = points.within_size(request.max_size - self.fixed), 0
            low, high = max(kept, default=-1), min(broken, default=len(points))
        else:
            assert request.max_kl is not None
            found, safest = points.within_loss(request.max_kl / self.factor), len(points) - 1
            low, high = max(broken, default=-1), min(kept, default=len(points))
        if last and not kept:
            return safest
        point = safest if found is None else found
        return point if low < point < high or not self.tried else max(0, (low + high) // 2)

    def _try(self, point: int) -> None:
        sizes, losses = self.points.sizes, self.points.losses
        codes = Picked(self.rounded.stores, self._formats(point))
        found = self.trials.measure(self.plan(point), codes, self.progress)
        loss = float(losses[point])
        self.tried[point] = trial = Trial(found.size, loss, loss * self.factor, found.kl)
        # Tensors start on pages, so that what is beside the units differs from plan to plan.
        self.fixed = found.size - float(sizes[point])
        self.factor = trial.factor

    def _keeps(self, trial: Trial) -> bool:
        if self.request.max_size is not None:
            return trial.size <= self.request.max_size
        assert self.request.max_kl is not None
        return trial.kl <= self.request.max_kl

    def _good_enough(self, trial: Trial) -> bool:
        kl, size = self.request.max_kl, self.request.max_size
        if kl is not None:
            return kl * (1 - _UNUSED_KL) <= trial.kl <= kl
        assert size is not None
        return size * (1 - _UNUSED_SIZE) <= trial.size <= size

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

    def choice(self, point: int, seconds: Mapping[str, float], notes: tuple[str, ...]) -> Choice:
        """Everything that is known about a point."""
        points, trial = self.points, self.tried[point]
        shown = {point, *np.linspace(0, len(points) - 1, min(_SHOWN, len(points))).astype(int).tolist()}
        fixed = trial.size - int(points.sizes[point])
        line = tuple(
            FrontPoint(int(points.sizes[at]) + fixed, float(points.losses[at]) * trial.factor, at == point)
            for at in sorted(shown)
        )
        plan = self.plan(point)
        of_size = self.request.max_size is not None
        gap = points.loss_gap(point) if of_size else points.size_gap(point)
        picks, trials = self._picks(point), tuple(self.tried.values())
        bits = self._bits(picks)
        return Choice(plan, trial, trials, self.units, picks, bits, gap, line, seconds, notes)

    def _bits(self, picks: Mapping[str, str]) -> float:
        layers = [unit for unit in self.units if unit.modules]
        steps = next(iter(self.rounded.steps.values()))
        weights = sum(steps[name].shape[0] * steps[name].shape[1] for unit in layers for name in unit.modules)
        return 8 * sum(unit.options[picks[unit.name]].size for unit in layers) / weights
