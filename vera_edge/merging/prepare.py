"""A merge: `prepare` reads and plans, `perform` writes, `to_folder` does both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vera_edge.adapters.projection import Projections
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import PlanError
from vera_edge.formats import FORMATS
from vera_edge.merging import costs
from vera_edge.merging.costs import MergeCost
from vera_edge.merging.executor import Merge, check_plan, write_each
from vera_edge.merging.memory import ONE_PROCESS, Resources
from vera_edge.merging.report import MergeReport
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import SAME, Plan
from vera_edge.progress import Progress, silent
from vera_edge.requantize import Codes
from vera_edge.storage.files import check_output
from vera_edge.trained.trained_model import TrainedModel, base_alone, open_model


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model and the plan for merging it."""

    model: TrainedModel
    plan: Plan

    def merge(
        self, out: Path, requantized: Mapping[str, Codes] | None = None, notes: Sequence[str] = ()
    ) -> Merge:
        """The work of writing it to `out`, for `write_each`."""
        return Merge(self.plan, self.model, out, (*self.model.notes, *notes), requantized or {})


def prepare(
    base: Path | Checkpoint,
    adapters: Sequence[tuple[Path, float]],
    to: str = SAME,
    options: Mapping[str, Any] | None = None,
    projection_rounding: str | None = None,
    plan: Plan | None = None,
    trained_as: TrainedAs | None = None,
    tokenizer: Path | None = None,
) -> Prepared:
    """Read base and adapters (folders, each with its weight) and plan their merge; reads no weight.

    to: a weight format's name or "same". options: of that format. projection_rounding: see `open_model`.
    plan: made for these inputs, instead of making one; then `to` and `options` aren't looked at.
    trained_as: how the base in a folder was loaded in training. tokenizer: a folder whose tokenizer is taken,
    instead of the adapters' or the base's.
    Raises a VeraEdgeError in one sentence when an input or the request is at fault.
    """
    if not adapters:
        raise PlanError("give at least one adapter to merge")
    if to != SAME and to not in FORMATS:
        raise PlanError(f"no weight format is called {to!r}; choose {SAME} or one of {', '.join(FORMATS)}")
    model = open_model(base, adapters, projection_rounding, trained_as, tokenizer)
    if plan is not None:
        check_plan(plan, model)
        return Prepared(model, plan)
    return Prepared(model, plans.plan_model(model, "merged", to, options))


def prepare_base(base: Path | Checkpoint, to: str, options: Mapping[str, Any] | None = None) -> Prepared:
    """Read a base and plan to write it in the format `to`, without an adapter; reads no weight."""
    model = base_alone(base)
    return Prepared(model, plans.make(model.checkpoint, (), "merged", to, options))


def prepare_each(
    base: Path,
    adapters: Sequence[Path],
    weight: float = 1.0,
    to: str = SAME,
    options: Mapping[str, Any] | None = None,
    projection_rounding: str | None = None,
    trained_as: TrainedAs | None = None,
    tokenizer: Path | None = None,
) -> dict[str, Prepared]:
    """`prepare` for each of many adapters alone, by the name of its folder; they needn't have anything in
    common but the base.

    Raises as that does, and PlanError when two folders have one name.
    """
    checkpoint, ready = Checkpoint.open(base, trained_as), dict[str, Prepared]()
    shared: dict[str, Projections] = {}  # adapters of one seed hold one pair
    for path in adapters:
        name = path.resolve().name
        if name in ready:
            raise PlanError(f"two of the adapters are in folders called {name}, which names what is written")
        one = prepare(checkpoint, [(path, weight)], to, options, projection_rounding, tokenizer=tokenizer)
        if (own := one.model.projections) is not None:
            model = replace(one.model, projections=shared.setdefault(own.digest, own))
            one = replace(one, model=model)
        ready[name] = one
    return ready


def estimate(ready: Prepared) -> MergeCost:
    """What `perform` would read, write and take, rounding to nearest."""
    return costs.estimate(ready.plan, ready.model)


def perform(
    ready: Prepared,
    out: Path,
    progress: Progress = silent,
    force: bool = False,
    requantized: Mapping[str, Codes] | None = None,
    notes: Sequence[str] = (),
    resources: Resources = ONE_PROCESS,
) -> MergeReport:
    """Write what was prepared to `out`, whole or not at all; see `write_each`."""
    one = ready.merge(out, requantized, notes)
    return write_each([one], progress, force, resources=resources)[0]


def to_folder(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    to: str = SAME,
    options: Mapping[str, Any] | None = None,
    projection_rounding: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    resources: Resources = ONE_PROCESS,
    trained_as: TrainedAs | None = None,
    tokenizer: Path | None = None,
) -> MergeReport:
    """`prepare` and `perform`: merge adapters into a base and write the model to `out`."""
    check_output(out, force, (base, *(path for path, _ in adapters)))
    ready = prepare(base, adapters, to, options, projection_rounding, None, trained_as, tokenizer)
    return perform(ready, out, progress, force, resources=resources)
