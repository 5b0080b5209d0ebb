"""Which of llama.cpp's types each tensor gets: what was asked for, its mixtures, and what falls back.

Source of mixtures and fallbacks: llama.cpp's src/llama-quant.cpp (without an importance matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import gguf

from vera_edge.errors import PlanError
from vera_edge.plans.plan import Plan, Step
from vera_edge.tasks import task as tasks
from vera_edge.trained.trained_model import TrainedModel
from vera_edge_gguf.families import family_of

# what a person asks for -> the plan's name of it
_FLOATS = {"fp32": "fp32", "f32": "fp32", "fp16": "fp16", "f16": "fp16", "bf16": "bf16"}
LEGACY = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BLOCKS: tuple[str, ...] = (*LEGACY, "iq4_nl")
_MIXTURES: Mapping[str, str] = {}
ASKED: Mapping[str, str] = {**_FLOATS, **{name: name for name in (*BLOCKS, *_MIXTURES)}}
_OF_FLOATS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
# a type whose blocks don't divide a row -> what llama.cpp takes instead, where that does
_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def ggml_type(stored: str) -> gguf.GGMLQuantizationType:
    """gguf's constant for a plan's name."""
    return gguf.GGMLQuantizationType[_OF_FLOATS.get(stored, stored.upper())]


def block_size(stored: str) -> int:
    """Weights of a block."""
    return int(gguf.GGML_QUANT_SIZES[ggml_type(stored)][0])


def settle(plan: Plan, model: TrainedModel) -> Plan:
    """`plan` with the type that each layer gets.

    Raises PlanError for a format that GGUF lacks, TargetError for a family that isn't written.
    """
    family_of(tasks.architecture(model.checkpoint.config))
    steps = tuple(_settled(step, plan) for step in plan.steps)
    return plan if steps == plan.steps else replace(plan, steps=steps)


def _settled(step: Step, plan: Plan) -> Step:
    if step.result in _OF_FLOATS:
        return step
    if step.result not in BLOCKS:
        raise PlanError(
            f"GGUF stores no {step.result} weights ({step.module}); choose from {', '.join(ASKED)}"
        )
    return replace(step, result=fitting(step.result, step.shape[1]), options={})


def fitting(stored: str, width: int) -> str:
    """`stored`, or what llama.cpp falls back to for rows that its blocks don't divide."""
    for found in (stored, _FALLBACK.get(stored, stored)):
        if width % block_size(found) == 0:
            return found
    return "fp16"


class EndTypes(NamedTuple):
    """What the embedding and the output head are stored as."""

    embedding: str
    head: str


def ends(weights: str, width: int, tied: bool, asked: str | None = None) -> EndTypes:
    """For linears of type `weights` and an embedding of so many columns.

    A tied embedding is the output head, which answers depend on most: Q6_K where its blocks divide a row, and
    Q8_0 where they don't, as llama.cpp has it.
    """
    if asked is not None:
        if asked not in ASKED:
            raise PlanError(f"the head can't be stored as {asked!r}; choose from {', '.join(ASKED)}")
        found = fitting(ASKED[asked], width)
        return EndTypes(found, found)
    if weights in _OF_FLOATS:
        return EndTypes(weights, weights)
    head = "q8_0"
    if weights != "q8_0" and "q6_k" in BLOCKS and width % block_size(weights) == 0:
        head = fitting("q6_k", width)
    head = fitting(head, width)
    return EndTypes(head if tied else fitting(weights, width), head)


def notes(plan: Plan) -> tuple[str, ...]:
    """Which layers aren't of the type that was asked for."""
    asked = _MIXTURES.get(plan.weights, plan.weights)
    if asked not in BLOCKS:
        return ()
    other: dict[str, list[Step]] = {}
    for step in plan.steps:
        if step.result != asked and fitting(asked, step.shape[1]) == step.result:
            other.setdefault(step.result, []).append(step)
    return tuple(
        f"{len(steps)} layers are {stored}, as llama.cpp has it where blocks of {block_size(asked)} don't "
        f"divide a row ({steps[0].module}: {steps[0].shape[1]})"
        for stored, steps in other.items()
    )
