"""What will be done, decided before any weight is read: one step for every linear layer, as pure data.

A plan is JSON both ways. A dry run shows it, an executor (merge, an exporter) performs it, and it travels
with the artefact, so that the same inputs can be held against it later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vera_edge import formats
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections, ProjectionSpec
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError, PlanError
from vera_edge.formats import StoredLinear
from vera_edge.plans import plan_schema
from vera_edge.storage import json_schema
from vera_edge.storage.json_text import TABLE, read_json
from vera_edge.trained.trained_model import TrainedModel, check_together

VERSION = 1
SAME = "same"
# What an encoder's int8 linears read: float32, or uint8 whose range is found at each run or was calibrated.
HEAD = "head"  # the output head, beside the modules of a model
FLOAT = "float"
ACTIVATIONS = (FLOAT, "dynamic", "static")
Mode = Literal["merged", "branch"]
Action = Literal["merge", "branch", "keep"]
DENSE = ("fp32", "fp16", "bf16")

# Layers of a stack are numbered. Heads, poolers and the like aren't, and keep their float format unless a
# plan in a file says otherwise: few weights, which the model's answers depend on most.
_IN_STACK = re.compile(r"\.\d+\.")
# Formats whose readers replace nn.Linear alone, and would leave a Conv1D with weights that were made up.
_LINEAR_ONLY = frozenset({"awq", "compressed-tensors", "w4a16", "w8a16", "w8a8", "fp8", "fp8-dynamic"})
# Routers are few values that choose experts: quantizing them saves nothing and changes the choice.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})
# transformers keeps these in float32 whatever the quantization (`_keep_in_fp32_modules`).
_FLOAT_ONLY = {"wo": frozenset({"t5", "mt5", "umt5", "udop", "pop2piano"})}


@dataclass(frozen=True)
class Step:
    """What happens to one linear layer.

    action: "merge" adds the adapters' delta to the weight, "branch" computes it beside, "keep" has none.
    source, result: weight formats ("nf4", ...). shape: (out_features, in_features).
    options: of the result's format (block size and the like).
    """

    module: str
    action: Action
    source: str
    result: str
    shape: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def copies(self) -> bool:
        """Whether the layer's bytes stay as they are."""
        return self.action != "merge" and self.source == self.result

    @property
    def activations(self) -> str:
        """What the layer reads in an export, one of ACTIVATIONS; other than float, its int8 is by rows."""
        return str(self.options.get("activations", FLOAT))


@dataclass(frozen=True)
class Plan:
    """A decision about a whole model.

    weights: the format asked for, or "same". options: asked for beside it. others: what float tensors that
    are no linear's weight become, "same" or a dense format.
    base: `Checkpoint.layout_digest`. adapters: (digest, weight) each. projection: the spec as a dict and the
    digest of the values; None when it wasn't given to `make`.
    """

    mode: Mode
    weights: str
    base: str
    adapters: tuple[tuple[str, float], ...]
    steps: tuple[Step, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    others: str = SAME
    projection: Mapping[str, Any] | None = None
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        value = asdict(self)
        value["adapters"] = [{"digest": digest, "weight": weight} for digest, weight in self.adapters]
        value["steps"] = [{**step, "shape": list(step["shape"])} for step in value["steps"]]
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises PlanError on anything that `to_dict` doesn't give."""
        if value.get("version") != VERSION:
            raise PlanError(f"a plan of version {value.get('version')!r}; this vera-edge reads {VERSION}")
        wrong = json_schema.problem(dict(value), plan_schema.SCHEMA)
        if wrong is not None:
            raise PlanError(f"this isn't a plan as vera-edge writes it: {wrong}")
        try:
            steps = tuple(Step(**{**step, "shape": tuple(step["shape"])}) for step in value["steps"])
            adapters = tuple((entry["digest"], float(entry["weight"])) for entry in value["adapters"])
            plan = cls(**{**value, "steps": steps, "adapters": adapters})
        except (TypeError, OverflowError) as cause:  # a field too many, a weight beyond any float
            raise PlanError(f"this isn't a plan as vera-edge writes it: {cause}") from None
        if len({step.module for step in steps}) < len(steps):
            raise PlanError("this isn't a plan as vera-edge writes it: it has two steps for one module")
        return plan


def read(path: Path) -> Plan:
    """The plan in a JSON file. Raises PlanError when there is none."""
    try:
        return Plan.from_dict(read_json(path, PlanError, TABLE))
    except PlanError as cause:
        raise PlanError(f"{path}: {cause}" if str(path) not in str(cause) else str(cause)) from None


def check_made_for(plan: Plan, model: TrainedModel) -> None:
    """Raise MismatchError unless `plan` was made for exactly these inputs."""
    checkpoint = model.checkpoint
    digest = plan.options.get("base_digest")
    shapes = {step.module: (step.source, step.shape) for step in plan.steps}
    own = {module: (linear.format, linear.shape) for module, linear in checkpoint.linears.items()}
    if plan.base != checkpoint.layout_digest or shapes != own or not _holds(checkpoint, digest):
        raise MismatchError(f"the plan was made for another base than {checkpoint.path}; plan again")
    if plan.adapters != tuple((adapter.digest, float(weight)) for adapter, weight in model.adapters):
        raise MismatchError("the plan was made for other adapters or weights; plan again")
    if plan.projection is not None and plan.projection.get("digest") != model.projection_digest:
        raise MismatchError("the plan was made for other projections; plan again")


def _holds(checkpoint: Checkpoint, digest: object) -> bool:
    """Whether the base is the one of that digest, where a plan names one: telling reads the whole base."""
    return digest is None or digest == checkpoint.digest


def plan_model(
    model: TrainedModel, mode: str = "merged", weights: str = SAME, options: Mapping[str, Any] | None = None
) -> Plan:
    """`make` for a model that was read, with its projections."""
    return make(model.checkpoint, model.adapters, mode, weights, options, model.projections)


def make(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    mode: str = "merged",
    weights: str = SAME,
    options: Mapping[str, Any] | None = None,
    projections: Projections | None = None,
) -> Plan:
    """Decide what happens to every linear of `checkpoint`. Reads no tensor.

    adapters: each with the weight that scales its delta. weights: a format's name, or "same" to keep each
    layer's own. options: of that format.
    Raises PlanError when the request can't be planned, MismatchError when adapters and base don't fit.
    """
    if mode not in get_args(Mode):
        raise PlanError(f"mode {mode!r} isn't known; choose merged or branch")
    if options and weights == SAME:
        raise PlanError(f"option {sorted(options)[0]!r} needs a weight format to apply to, not {SAME!r}")
    check_together(adapters, summed=mode == "merged")
    adapted = {module for adapter, _ in adapters for module in adapter.vectors}
    if missing := sorted(adapted - checkpoint.linears.keys()):
        raise MismatchError(f"{missing[0]} is adapted but isn't a linear layer of {checkpoint.path}")
    action: Action = "merge" if mode == "merged" else "branch"
    steps = tuple(
        _step(checkpoint, linear, action if module in adapted else "keep", weights, options or {})
        for module, linear in checkpoint.linears.items()
    )
    return Plan(
        mode="merged" if mode == "merged" else "branch",
        weights=weights,
        base=checkpoint.layout_digest,
        adapters=tuple((adapter.digest, float(weight)) for adapter, weight in adapters),
        steps=steps,
        options=dict(options or {}),
        others=weights if weights in DENSE else SAME,
        projection=_projection_facts(projections),
    )


def _projection_facts(projections: Projections | None) -> dict[str, Any] | None:
    if projections is None:
        return None
    spec: ProjectionSpec = projections.spec
    return {**spec.to_dict(), "digest": projections.digest}


def _step(
    checkpoint: Checkpoint, linear: StoredLinear, action: Action, weights: str, options: Mapping[str, Any]
) -> Step:
    result = weights if weights != SAME and _may_become(checkpoint, linear, weights) else linear.format
    chosen: Mapping[str, Any]
    if options and result == weights and result in formats.FORMATS:
        _check_options(linear, result, options)
    if result in _LINEAR_ONLY and result != linear.format and checkpoint.is_conv1d(linear.module):
        raise PlanError(
            f"{linear.module} is a Conv1D, which transformers reads in no {result} checkpoint; choose nf4, "
            "fp4, int8, gptq or a float format"
        )
    if result == linear.format:
        chosen = formats.get(result).options_of(linear)
    elif result in DENSE:
        chosen = {"transposed": checkpoint.is_conv1d(linear.module)}
    elif result in formats.FORMATS:
        chosen = formats.get(result).options(options)
    else:  # a format that only an exporter knows
        chosen = dict(options)
    return Step(linear.module, action, linear.format, result, linear.shape, dict(chosen))


def _check_options(linear: StoredLinear, result: str, options: Mapping[str, Any]) -> None:
    """Raise PlanError on options that the format lacks, or that a layer of that format has otherwise."""
    known = formats.get(result).options(options)
    own = formats.get(result).options_of(linear) if result == linear.format else known
    for key in options:
        if own.get(key) != known[key]:
            raise PlanError(
                f"{linear.module} is stored as {result} with {key} {own.get(key)} and keeps that; leave "
                f"{key} out or choose another format"
            )


def _may_become(checkpoint: Checkpoint, linear: StoredLinear, weights: str) -> bool:
    """Whether a layer takes part in a change of format.

    What is quantized is free to become anything. What isn't becomes quantized only when it's a layer of the
    stack and nothing in the base is quantized yet: a base that has been quantized left its other layers out
    on purpose.
    """
    if weights in DENSE or linear.format not in DENSE:
        return True
    last = linear.module.rsplit(".", 1)[-1]
    return not (
        checkpoint.quantized
        or last in _ROUTERS
        or not _IN_STACK.search(f".{linear.module}.")
        or checkpoint.config.get("model_type") in _FLOAT_ONLY.get(last, ())
    )
