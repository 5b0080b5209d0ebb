"""The three things that a step's "int8" may be."""

from __future__ import annotations

import pytest

from vera_edge.plans.int8 import INT8_BLOCKS, INT8_QDQ, LLM_INT8, int8_form
from vera_edge.plans.plan import Step
from vera_edge.rounding.weight_rounding import grid_of


@pytest.mark.parametrize(
    ("options", "graph", "form", "block"),
    [
        ({}, False, LLM_INT8, 0),
        ({}, True, INT8_BLOCKS, 32),
        ({"block": 128}, True, INT8_BLOCKS, 128),
        ({"activations": "float"}, True, INT8_BLOCKS, 32),
        ({"activations": "dynamic"}, True, INT8_QDQ, 0),
        ({"activations": "static"}, True, INT8_QDQ, 0),
    ],
)
def test_int8(options: dict[str, object], graph: bool, form: str, block: int) -> None:
    step = Step("a.b", "merge", "fp32", "int8", (64, 128), options)
    assert int8_form(step, graph) == form
    grid = grid_of(step, exported=graph)
    assert grid is not None and grid.block == block and grid.bits == 8


def test_what_is_none() -> None:
    assert int8_form(Step("a.b", "merge", "fp32", "int4", (64, 128), {}), graph=True) is None
