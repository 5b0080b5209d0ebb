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
BLOCKS: tuple[str, ...] = (*LEGACY, "iq4_nl", "q6_k", "q5_k", "q4_k")
_MIXTURES: Mapping[str, str] = {"q4_k_m": "q4_k", "q5_k_m": "q5_k"}
ASKED: Mapping[str, str] = {**_FLOATS, **{name: name for name in (*BLOCKS, *_MIXTURES)}}
# which layers of a mixture get more bits in some layers of the stack, and which in all
_SENSITIVE = frozenset({"v_proj", "down_proj", "c_proj"})
_FUSED = frozenset({"qkv_proj", "c_attn"})
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
    config = model.checkpoint.config
    layers = config.get("num_hidden_layers", config.get("n_layer", 0))
    steps = tuple(_settled(step, plan, layers) for step in plan.steps)
    return plan if steps == plan.steps else replace(plan, steps=steps)


def _settled(step: Step, plan: Plan, layers: int) -> Step:
    if step.result in _OF_FLOATS:
        return step
    if step.result in _MIXTURES:
        step = replace(step, result=_mixed(step, layers))
    if step.result not in BLOCKS:
        raise PlanError(
            f"GGUF stores no {step.result} weights ({step.module}); choose from {', '.join(ASKED)}"
        )
    return replace(step, result=fitting(step.result, step.shape[1]), options={})


def _mixed(step: Step, layers: int) -> str:
    """The type that llama.cpp's mixture of medium size gives a layer: more bits where they matter most."""
    parts = step.module.split(".")
    usual, more = _MIXTURES[step.result], "q6_k"
    number = next((int(part) for part in parts if part.isdecimal()), 0)
    if parts[-1] in _FUSED:
        return "q5_k" if usual == "q4_k" else more
    first, last = layers // 8, 7 * layers // 8
    matters = number < first or number >= last or (number - first) % 3 == 2
    return more if matters and parts[-1] in _SENSITIVE and not _is_attention_output(parts) else usual


def _is_attention_output(parts: list[str]) -> bool:
    return parts[-1] == "c_proj" and "attn" in parts  # of GPT-2, whose MLP ends in a c_proj too


def base_type(plan: Plan) -> str:
    """What most weights were asked to be, a mixture by its usual type; in a plan of a file, what most are."""
    asked = _MIXTURES.get(plan.weights, plan.weights)
    if asked in BLOCKS or asked in _OF_FLOATS:
        return asked
    sizes: dict[str, int] = {}
    for step in plan.steps:
        sizes[step.result] = sizes.get(step.result, 0) + step.shape[0] * step.shape[1]
    return max(sizes, key=lambda name: sizes[name])


def file_type(plan: Plan) -> int:
    """llama.cpp's number for a file of mostly such weights."""
    names = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "q4_k": "MOSTLY_Q4_K_S", "q5_k": "MOSTLY_Q5_K_S"}
    name = plan.weights if plan.weights in _MIXTURES else base_type(plan)
    return int(gguf.LlamaFileType[names.get(name, f"MOSTLY_{name.upper()}")])


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
