"""Which type each tensor gets, as llama.cpp's quantizer decides it."""

from __future__ import annotations

import pytest

from vera_edge.errors import PlanError
from vera_edge.plans.plan import Plan, Step
from vera_edge_gguf import tensor_types

LAYERS = 30
# Layers of 30 whose v and down get Q6_K in Q4_K_M: llama-cpp-python 0.3.36's quantizer on SmolLM2.
MORE = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}


def settled(weights: str, module: str, width: int = 512) -> str:
    step = Step(module, "merge", "fp32", weights, (64, width))
    return tensor_types._settled(step, Plan("merged", weights, "base", (), (step,)), LAYERS).result


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.down_proj"])
def test_a_mixture_gives_more_bits_to_the_layers_that_llama_cpp_gives_them(part: str) -> None:
    found = {number: settled("q4_k_m", f"model.layers.{number}.{part}") for number in range(LAYERS)}
    assert {number for number, kind in found.items() if kind == "q6_k"} == MORE
    assert set(found.values()) == {"q6_k", "q4_k"}


@pytest.mark.parametrize(
    ("weights", "part", "kind"),
    [
        ("q4_k_m", "self_attn.q_proj", "q4_k"),
        ("q5_k_m", "self_attn.v_proj", "q6_k"),
        ("q4_k_m", "self_attn.qkv_proj", "q5_k"),
        ("q5_k_m", "self_attn.qkv_proj", "q6_k"),
        ("q4_k", "self_attn.v_proj", "q4_k"),
        ("fp16", "self_attn.v_proj", "fp16"),
    ],
)
def test_other_layers(weights: str, part: str, kind: str) -> None:
    assert settled(weights, f"model.layers.0.{part}") == kind


@pytest.mark.parametrize(
    ("weights", "width", "kind"),
    [
        ("q4_k", 576, "q5_0"),
        ("q5_k", 576, "q5_1"),
        ("q6_k", 576, "q8_0"),
        ("q4_0", 48, "fp16"),
        ("q4_k", 48, "fp16"),
    ],
)
def test_rows_that_blocks_do_not_divide_fall_back(weights: str, width: int, kind: str) -> None:
    assert settled(weights, "model.layers.3.mlp.up_proj", width) == kind


def test_embedding_and_head() -> None:
    assert tensor_types.ends("q4_0", 512, tied=True) == ("q6_k", "q6_k")
    assert tensor_types.ends("q4_0", 576, tied=True) == ("q8_0", "q8_0")
    assert tensor_types.ends("q4_0", 576, tied=False) == ("q4_0", "q8_0")
    assert tensor_types.ends("q8_0", 512, tied=False) == ("q8_0", "q8_0")
    assert tensor_types.ends("q4_0", 512, tied=True, asked="fp16") == ("fp16", "fp16")
    with pytest.raises(PlanError, match="the head can't be stored as 'int8'"):
        tensor_types.ends("q4_0", 512, tied=True, asked="int8")
