"""Are the options of a plan's steps those that its formats take? A plan in a file may say anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vera_edge import formats
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.formats.blocks import SIZES
from vera_edge.plans.plan import ACTIVATIONS, Plan, Step

# Formats whose weights are blocks of integers in a graph, and what their options may be there.
_BLOCKS = frozenset({"int8", "int4", "int2"})
_OF_BLOCKS: Mapping[str, Callable[[Any], bool]] = {
    "block": lambda value: type(value) is int and value in SIZES,
    "symmetric": lambda value: isinstance(value, bool),
    "activations": lambda value: value in ACTIVATIONS,
}


def check(plan: Plan, checkpoint: Checkpoint, graph: bool) -> None:
    """Raise PlanError unless every step has the very options with which its format stores a weight.

    graph: whether an exporter performs it; a format that only the exporter knows is left to it.
    """
    for step in plan.steps:
        options = dict(step.options)
        if graph and step.result in _BLOCKS:
            options = _without_blocks(step)
            if not step.copies:
                _same(step, options, {})
                continue
        if step.copies:
            own = formats.get(step.result).options_of(checkpoint.linears[step.module])
            _same(step, options, dict(own))
        elif step.result in formats.FORMATS or not graph:
            _same(step, options, dict(formats.get(step.result).options(options)))


def _without_blocks(step: Step) -> dict[str, Any]:
    """The options that aren't those of blocks of integers, which are checked."""
    for key, holds in _OF_BLOCKS.items():
        if key in step.options and not holds(step.options[key]):
            raise PlanError(f"the plan stores {step.module} with {key} {step.options[key]!r}; plan again")
    return {key: value for key, value in step.options.items() if key not in _OF_BLOCKS}


def _same(step: Step, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found == wanted and all(type(found[key]) is type(wanted[key]) for key in wanted):
        return
    raise PlanError(
        f"the plan stores {step.module} as {step.result} with options {dict(found)} where "
        f"{dict(wanted)} belong; plan again"
    )
