"""Export targets: how one is found, asked, and given what it needs.

Exporters live outside this package and are found by entry point (group `vera_edge.exporters`), those in this
repository through the same door as anybody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import PlanError, TargetError, VeraEdgeError
from vera_edge.exporting import device_form, device_profile, plan_options
from vera_edge.exporting.costs import ExportCost, check_room
from vera_edge.exporting.device_form import Form
from vera_edge.exporting.exporter import (
    CALIBRATION,
    EXPORT,
    RESULT,
    Export,
    Exporter,
    ExportRequest,
    RoundedWeights,
    RoundsWeights,
    WithFormats,
    WithUsualWeights,
)
from vera_edge.plans import plan as plans
from vera_edge.plans import step_options
from vera_edge.plans.plan import FLOAT, Plan
from vera_edge.progress import Progress, silent
from vera_edge.requantize import Grid
from vera_edge.storage.files import check_output
from vera_edge.storage.resumable import held as held_of
from vera_edge.storage.resumable import tidy
from vera_edge.tasks import task as tasks
from vera_edge.text.windows import BUILT_IN
from vera_edge.trained.text_settings import with_fast_tokenizer
from vera_edge.trained.trained_model import TrainedModel, open_model

GROUP = "vera_edge.exporters"
ONNX = "onnx"
OLD_NAMES = {"genai": ONNX}  # names of earlier versions, which go on working for a release
WEIGHTS = ("same", "fp32", "fp16", "int8", "int4", "int2", "nf4", "fp4")  # what linears can be asked to be


def planned_weights(exporter: Exporter, asked: str) -> str:
    """What a plan calls the weights that were asked for; raises PlanError when the target has none such."""
    known = exporter.weights if isinstance(exporter, WithFormats) else {name: name for name in WEIGHTS}
    if asked not in known:
        raise PlanError(
            f"the target {exporter.name} stores no {asked} weights; choose from {', '.join(known)}"
        )
    return known[asked]


def weights_of(name: str) -> tuple[str, ...]:
    """What linears can be asked to be in the target `name`; WEIGHTS where it isn't installed.

    Raises TargetError where a target's extra isn't installed.
    """
    name = OLD_NAMES.get(name, name)
    if name == ONNX or name not in names():
        return WEIGHTS  # onnx's, known without importing it
    exporter = find(name)
    return tuple(exporter.weights) if isinstance(exporter, WithFormats) else WEIGHTS


def names() -> tuple[str, ...]:
    """The installed targets."""
    return tuple(sorted(entry_points(group=GROUP).names))


def find(name: str) -> Exporter:
    """The target called `name`; raises TargetError when there is none, or its extra isn't installed."""
    name = OLD_NAMES.get(name, name)
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        raise TargetError(f"no export target is called {name!r}; installed: {', '.join(names()) or 'none'}")
    try:
        exporter = found[0].load()
    except ImportError as cause:
        raise TargetError(
            f"export target {name} needs the package {cause.name}; "
            "install the extra: pip install 'vera-edge[build]'"
        ) from cause
    if not isinstance(exporter, Exporter):
        raise TargetError(f"{found[0].value} isn't an Exporter; reinstall the package that registers it")
    return exporter


def export(
    base: Path,
    adapter_paths: Sequence[tuple[Path, float]],
    out: Path,
    target: str = "onnx",
    mode: str | None = None,
    weights: str | None = "fp32",
    options: Mapping[str, str] | None = None,
    projection_rounding: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    rounding: RoundsWeights | None = None,
    plan: Plan | None = None,
    trained_as: TrainedAs | None = None,
    tokenizer: Path | None = None,
    device: str | None = None,
) -> Export:
    """Read base and adapters, plan, and export to `out`.

    base, adapter_paths, out: folders; each adapter with its weight.
    options: the target's own; `block` (16, 32, 64, 128 or 256) and `symmetric` ("true", "false"), which say
    how int8, int4 and int2 weights are quantized, and `activations` ("float", "dynamic", "static"), what an
    encoder's int8 linears read, go into the plan.
    mode: "merged" (unless given), or "branch": the base keeps its weights, the adapter runs beside it and can
    be swapped.
    weights: the stored format of the linears. projection_rounding: see `open_model`.
    rounding: how weights are rounded to 4 and 8 bits, and the text to calibrate on; None: to nearest, by the
    exporter, and the built-in text.
    weights None: what the target usually stores (`WithUsualWeights`), with a note that says so.
    plan: made for these inputs, instead of making one; then `mode` and `weights` aren't looked at.
    trained_as: how the base was loaded in training. tokenizer: a folder whose tokenizer is taken, instead of
    the adapters' or the base's. device: a profile (`device_profile.find`) for which `weights`, the head, and
    a mode that isn't given are chosen.
    Raises a VeraEdgeError in one sentence when an input is at fault; then nothing is left behind.
    """
    tidy(out, EXPORT, f"*/{RESULT}")
    check_output(out, force, (base, *(path for path, _ in adapter_paths)))
    asked = ExportArguments(
        target, mode, weights, options or {}, projection_rounding, plan, trained_as, tokenizer, device
    )
    exporter, request, notes = _prepare(base, adapter_paths, out, asked)
    estimate = getattr(exporter, "estimate", None)
    if estimate is not None:
        check_room(estimate(request, timed=False), out, held_of(out, EXPORT))
    rounds = (
        rounding.codes(request.model, request.plan, out, progress, head=head_grid(exporter, request))
        if rounding
        else nullcontext(RoundedWeights({}, (), request.model))
    )
    with rounds as rounded:
        request = replace(
            request,
            model=rounded.model,
            plan=told(_rounded_on(request.plan, rounded.device), rounded.calibration),
            force=force,
            progress=progress,
            requantized=rounded.codes,
            text=rounding.text if rounding else BUILT_IN,
            corrections=rounded.corrections,
        )
        exported = exporter.export(request)
    return replace(exported, notes=(*notes, *rounded.notes, *exported.notes))


def _rounded_on(plan: Plan, device: str | None) -> Plan:
    """The plan as the manifest has it: with the device that its weights' bytes come from."""
    return plan if device is None else replace(plan, options={**plan.options, "compute_device": device})


def head_grid(exporter: Exporter, request: ExportRequest) -> Grid | None:
    """What an exporter stores the output head on that it would rather have rounded for it."""
    grid: Callable[[ExportRequest], Grid | None] | None = getattr(exporter, "head_grid", None)
    return None if grid is None else grid(request)


def told(plan: Plan, calibration: Sequence[Mapping[str, Any]]) -> Plan:
    """`plan`, saying what text its weights were rounded for."""
    if not calibration:
        return plan
    return replace(plan, options={**plan.options, CALIBRATION: [dict(text) for text in calibration]})


@dataclass(frozen=True)
class ExportArguments:
    """What is asked of an export, as `export` takes it. mode: None for merged, or what `device` comes to."""

    target: str = "onnx"
    mode: str | None = None
    weights: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    projection_rounding: str | None = None
    plan: Plan | None = None
    trained_as: TrainedAs | None = None
    tokenizer: Path | None = None
    device: str | None = None


@dataclass(frozen=True)
class PlannedExport:
    """What an export would do: its plan, layer by layer, and what it would write and take, by estimate.

    notes: sentences for a person to read.
    """

    plan: Plan
    cost: ExportCost
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"plan": self.plan.to_dict(), "cost": self.cost.to_dict(), "notes": list(self.notes)}


def plan_export(
    base: Path, adapter_paths: Sequence[tuple[Path, float]], out: Path, asked: ExportArguments
) -> PlannedExport:
    """Say what `export` would do, and write nothing; computes one layer to tell.

    Raises as `export` does, and TargetError for a target that doesn't tell.
    """
    exporter, request, notes = _prepare(base, adapter_paths, out, asked)
    estimate = getattr(exporter, "estimate", None)
    if estimate is None:
        raise TargetError(f"the target {exporter.name} doesn't tell beforehand what an export takes")
    return PlannedExport(request.plan, estimate(request), tuple(notes))


def _prepare(
    base: Path, adapter_paths: Sequence[tuple[Path, float]], out: Path, asked: ExportArguments
) -> tuple[Exporter, ExportRequest, list[str]]:
    """The target, what is asked of it before anything is rounded, and notes."""
    target, plan = asked.target, asked.plan
    exporter = find(target)
    if not adapter_paths:
        raise PlanError("give at least one adapter to export")
    summed = (asked.mode if plan is None else plan.mode) != "branch"
    read = (asked.projection_rounding, asked.trained_as, asked.tokenizer, summed)
    model = open_model(base, adapter_paths, *read)
    if plan is not None:
        plans.check_made_for(plan, model)
        step_options.check(plan, model.checkpoint, graph=True)
    from vera_edge.reference.loading import check_complete  # imports torch

    model = replace(model, checkpoint=with_fast_tokenizer(model.checkpoint))
    check_complete(model.checkpoint)
    notes = dict.fromkeys([*model.notes, *model.checkpoint.notes])
    if plan is None:
        asked, plan, note = _settled(exporter, model, asked, out)
        notes |= dict.fromkeys(note)
    options = dict(asked.options)
    plan = plan_options.in_blocks(plan, options.pop("block", None), options.pop("symmetric", None))
    plan = plan_options.with_activations(plan, options.pop("activations", FLOAT))
    if isinstance(exporter, WithFormats):
        plan = exporter.settle(plan, model)
    if target in OLD_NAMES:
        notes[f"the target {target} is called {exporter.name} now; write that"] = None
    request = ExportRequest(model, plan, out, {**plan_options.stored(plan), **options})
    if asked.weights is None and asked.plan is None and isinstance(exporter, WithUsualWeights):
        notes[exporter.usual_note(request, plan.weights)] = None
    return exporter, request, list(notes)


def _settled(
    exporter: Exporter, model: TrainedModel, asked: ExportArguments, out: Path
) -> tuple[ExportArguments, Plan, list[str]]:
    """What is asked with what `device` comes to, the plan for it, and a note that says why."""
    notes = []
    if asked.device is not None:
        asked, why = _for_device(exporter, model, asked, out)
        notes.append(why)
    mode, weights = asked.mode or "merged", asked.weights
    if weights is None:
        weights = _usual(exporter, model, mode, asked.options)
    return asked, plans.plan_model(model, mode, planned_weights(exporter, weights)), notes


def _usual(exporter: Exporter, model: TrainedModel, mode: str, options: Mapping[str, str]) -> str:
    """What a target stores where nobody asks."""
    if isinstance(exporter, WithUsualWeights):
        return exporter.usual_weights(model, mode, options)
    return "fp32"


def _for_device(
    exporter: Exporter, model: TrainedModel, asked: ExportArguments, out: Path
) -> tuple[ExportArguments, str]:
    """What is asked with the mode, weights and head that suit the device, and a sentence that says why."""
    estimate = getattr(exporter, "estimate", None)
    if estimate is None:
        raise TargetError(
            f"the target {exporter.name} doesn't tell beforehand what an export takes, so that no form can "
            "be chosen for a device; give --weights instead of --for"
        )
    profile = device_profile.find(str(asked.device))
    config = model.checkpoint.config
    generates = tasks.is_decoder(tasks.architecture(config))

    def options(form: Form) -> dict[str, str]:
        return dict(asked.options) | ({"head": form.head} if form.head else {})

    def reckoned(form: Form) -> device_form.Reckoned | None:
        with suppress(VeraEdgeError):
            plan = plans.plan_model(model, form.mode, planned_weights(exporter, form.weights))
            size = estimate(ExportRequest(model, plan, out, options(form)), timed=False).size
            return device_form.reckon(form, size, config, profile.stream, generates)
        return None

    mode = asked.mode or (None if generates else "merged")
    forms = device_form.forms(mode, _usual(exporter, model, "branch", {}))
    chosen = device_form.choose(forms, reckoned, profile.memory)
    form = chosen.form
    note = device_form.why(chosen, profile.name, profile.source)
    return replace(asked, mode=form.mode, weights=form.weights, options=options(form)), note
