"""Options of steps in a plan that nobody vouches for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import VeraEdgeError
from vera_edge.plans import plan as plans
from vera_edge.plans import step_options
from vera_edge.plans.plan import Plan


@pytest.fixture(scope="module")
def base(tiny_llama: tiny.TinyLlama) -> Checkpoint:
    return Checkpoint.open(tiny_llama.nf4)


@pytest.fixture(scope="module")
def pair(tiny_adapter: Path) -> list[tuple[Adapter, float]]:
    return [(adapters.read(tiny_adapter), 1.0)]


def changed(plan: Plan, result: str, options: dict[str, Any]) -> Plan:
    """`plan` with another result and other options for a layer that is merged."""
    first = next(step for step in plan.steps if step.action != "keep")
    steps = [replace(s, result=result, options=options) if s is first else s for s in plan.steps]
    return replace(plan, steps=tuple(steps))


@pytest.mark.parametrize("weights", ["same", "nf4", "fp4", "bf16", "int8", "gptq", "w8a8", "fp8", "awq"])
@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_what_is_planned_is_taken(base: Checkpoint, pair: Any, weights: str, mode: str) -> None:
    plan = plans.make(base, pair, mode, weights)
    step_options.check(plan, base, graph=False)
    step_options.check(plan, base, graph=True)


FULL: dict[str, Any] = {"blocksize": 64, "double_quant": False, "storage": "U8", "dtype": "float32"}


@pytest.mark.parametrize(
    ("result", "options"),
    [
        ("nf4", FULL | {"storage": "XX"}),
        ("nf4", FULL | {"storage": ["U8"]}),
        ("nf4", FULL | {"dtype": "float64"}),
        ("nf4", FULL | {"double_quant": "yes"}),
        ("nf4", FULL | {"blocksize": 63}),
        ("nf4", FULL | {"blocksize": 64.0}),
        ("nf4", FULL | {"blocksize": {}}),
        ("nf4", FULL | {"more": 1}),
        ("nf4", {}),
        ("fp4", {"blocksize": 64}),
        ("gptq", {}),
        ("gptq", {"bits": 4, "sym": True, "checkpoint_format": "gptq"}),
        ("gptq", {"bits": [4], "group_size": 128, "sym": True, "checkpoint_format": "gptq"}),
        ("gptq", {"bits": 4, "group_size": 128, "sym": True, "checkpoint_format": {}}),
        ("awq", {}),
        ("awq", {"group_size": "128"}),
        ("w8a8", {}),
        ("w4a16", {"preset": ["W4A16"], "group_size": 128}),
        ("fp8", {"block": 3}),
        ("fp8", {}),
        ("bf16", {}),
        ("bf16", {"transposed": "no"}),
        ("hqq", {}),
        ("torchao", {}),
    ],
)
def test_what_a_format_does_not_take_is_a_sentence(
    base: Checkpoint, pair: Any, result: str, options: dict[str, Any]
) -> None:
    plan = changed(plans.make(base, pair), result, options)
    for graph in (False, True):
        with pytest.raises(VeraEdgeError) as caught:
            step_options.check(plan, base, graph)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"block": 33},
        {"block": [32]},
        {"block": True},
        {"symmetric": 1},
        {"activations": "none"},
        {"activations": []},
        {"rank": 4},
    ],
)
@pytest.mark.parametrize("result", ["int8", "int4", "int2"])
def test_blocks_of_a_graph(base: Checkpoint, pair: Any, result: str, options: dict[str, Any]) -> None:
    plan = plans.make(base, pair)
    with pytest.raises(VeraEdgeError, match="plan again"):
        step_options.check(changed(plan, result, options), base, graph=True)
    step_options.check(changed(plan, result, {"block": 32, "symmetric": False}), base, graph=True)
    with pytest.raises(VeraEdgeError):
        step_options.check(changed(plan, result, options), base, graph=False)


def test_a_layer_that_stays_has_its_own_options(base: Checkpoint, pair: Any) -> None:
    plan = plans.make(base, pair, "branch")
    with pytest.raises(VeraEdgeError, match="belong; plan again"):
        step_options.check(changed(plan, "nf4", FULL | {"blocksize": 4096}), base, graph=True)
