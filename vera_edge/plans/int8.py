"""What the "int8" of a step means: three ways to store a weight go by that name, told apart here alone."""

from __future__ import annotations

from typing import Literal

from vera_edge.plans.plan import FLOAT, Step

Int8Form = Literal["llm_int8", "int8_blocks", "int8_qdq"]
# bitsandbytes' LLM.int8 in a checkpoint: a scale for each row, symmetric (arXiv 2208.07339).
LLM_INT8: Int8Form = "llm_int8"
# Blocks of a graph's MatMulNBits, each with a scale, beside float activations.
INT8_BLOCKS: Int8Form = "int8_blocks"
# Rows of a graph's own integer products, beside activations that are rounded to uint8.
INT8_QDQ: Int8Form = "int8_qdq"


def int8_form(step: Step, graph: bool) -> Int8Form | None:
    """Which of them a step's result is, in a graph or in a checkpoint; None where it isn't "int8"."""
    if step.result != "int8":
        return None
    if not graph:
        return LLM_INT8
    return INT8_BLOCKS if step.activations == FLOAT else INT8_QDQ
