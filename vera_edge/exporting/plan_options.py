"""Options of an export that go into its plan, and those that a plan decides: blocks, activations, ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vera_edge.errors import PlanError
from vera_edge.formats.blocks import SIZES, check_kind
from vera_edge.plans.plan import ACTIVATIONS, FLOAT, Plan

_BLOCKS = {"int8": 8, "int4": 4, "int2": 2}


def stored(plan: Plan) -> dict[str, str]:
    """What a plan says of the exporter's own options: how head and projections are stored."""
    return {name: str(plan.options[name]) for name in ("head", "projections") if name in plan.options}


def in_blocks(plan: Plan, block: str | None, symmetric: str | None) -> Plan:
    """`plan` with integer blocks of another size, or symmetric or not; raises PlanError when it has none."""
    if block is None and symmetric is None:
        return plan
    if symmetric not in (None, "true", "false") or not (block is None or block.isdecimal()):
        raise PlanError(
            f"a block is a number of inputs and symmetric true or false, not {block!r} and {symmetric!r}"
        )
    changed: dict[str, Any] = {} if block is None else {"block": int(block)}
    if symmetric is not None:
        changed["symmetric"] = symmetric == "true"
    steps = []
    for step in plan.steps:
        if step.result in _BLOCKS and not step.copies:
            check_kind(_BLOCKS[step.result], changed.get("block", SIZES[0]))
            step = replace(step, options={**step.options, **changed})
        steps.append(step)
    if tuple(steps) == plan.steps:
        raise PlanError("only weights that are quantized to int8, int4 or int2 have blocks to choose")
    return replace(plan, steps=tuple(steps))


def with_activations(plan: Plan, activations: str) -> Plan:
    """`plan` with int8 linears that read activations of this kind, one of `plan.ACTIVATIONS`.

    Raises PlanError for another kind, and where there is no int8 linear, or one in blocks.
    """
    if activations not in ACTIVATIONS:
        raise PlanError(f"activations can't be {activations!r}; choose from {', '.join(ACTIVATIONS)}")
    if activations == FLOAT:
        return plan
    changed = [step for step in plan.steps if step.result == "int8"]
    if not changed:
        raise PlanError(
            f"{activations} activations go with int8 weights, and this plan has none; add --weights int8"
        )
    if any("block" in step.options or "symmetric" in step.options for step in changed):
        raise PlanError(
            f"weights beside {activations} activations have one scale for each row and no zero point; leave "
            "block and symmetric out"
        )
    steps = [
        replace(step, options={**step.options, "activations": activations}) if step.result == "int8" else step
        for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps))
