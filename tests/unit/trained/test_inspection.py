"""What an inspection says of small adapters, counted by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from vera_edge.adapters.reading import read
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.trained.inspection import inspect, kind_of

GOLDEN = Path(__file__).parents[2] / "golden" / "adapters" / "peft-0.21.2"
HIDDEN, INNER, NARROW, RANK = 64, 160, 32, 4


@pytest.fixture
def checkpoint(tiny_llama: tiny.TinyLlama) -> Checkpoint:
    return Checkpoint.open(tiny_llama.fp32)


def test_counts(checkpoint: Checkpoint) -> None:
    """q, v and down in both layers: q and v read the same input."""
    told = inspect(read(GOLDEN / "unsaved-fp32"), checkpoint)
    outputs = HIDDEN + NARROW + HIDDEN
    assert told.parameters == 2 * (outputs + 3 * RANK)
    assert told.layers == (0, 1)
    assert [(kind.name, kind.modules, kind.shape) for kind in told.kinds] == [
        ("mlp.down_proj", 2, (HIDDEN, INNER)),
        ("self_attn.q_proj", 2, (HIDDEN, HIDDEN)),
        ("self_attn.v_proj", 2, (NARROW, HIDDEN)),
    ]
    assert told.cost is not None
    assert told.cost.branch_macs == 2 * (RANK * (HIDDEN + INNER) + outputs * (RANK + 1) + 3 * RANK)
    every = 2 * HIDDEN * HIDDEN + 2 * NARROW * HIDDEN + 3 * HIDDEN * INNER
    assert told.cost.base_macs == 2 * every
    assert told.cost.vectors == {"fp32": 4 * told.parameters, "fp16": 2 * told.parameters}
    values = RANK * (INNER + HIDDEN)
    assert told.cost.projections == {
        "fp32": 4 * values,
        "fp16": 2 * values,
        # Blocks of 128 along A's rows, of 32 along B's short ones, the last one padded; a scale for each.
        "int8": RANK * 2 * (128 + 4) + HIDDEN * (32 + 4),
        "int4": RANK * 2 * (64 + 4) + HIDDEN * (16 + 4),
    }


def test_counts_whole_modules(checkpoint: Checkpoint) -> None:
    told = inspect(read(GOLDEN / "modules-to-save"), checkpoint)
    assert told.parameters == 2 * (HIDDEN + NARROW + HIDDEN + 3 * RANK) + 5 * HIDDEN
    assert "model.layers.1.input_layernorm.weight" in told.modules_to_save


def test_one_layer_only(checkpoint: Checkpoint) -> None:
    assert inspect(read(GOLDEN / "one-layer"), checkpoint).layers == (1,)


def test_saved_projections_tell_without_a_base() -> None:
    told = inspect(read(GOLDEN / "saved-fp32"))
    assert told.verified
    assert told.fits is None
    assert told.spec is not None
    assert told.cost is not None and told.cost.branch_macs is None
    assert told.cost.projections is not None


def test_names_dead_branches_and_ranges() -> None:
    adapter = read(GOLDEN / "unsaved-fp32")
    name = "model.layers.0.self_attn.q_proj"
    dead = LambdaVectors(np.zeros(HIDDEN, np.float32), np.array([-3, 0.5, 1, 2], np.float32))
    told = inspect(dataclasses.replace(adapter, vectors={**adapter.vectors, name: dead}))
    assert told.dead == (name,)
    kind = next(kind for kind in told.kinds if kind.name == "self_attn.q_proj")
    assert (kind.dead, kind.ranges["lambda_b"][0], kind.ranges["lambda_d"][1]) == (1, 0.0, 3.0)


def test_a_misfit_is_told_and_not_raised(tiny_gpt2: Path) -> None:
    told = inspect(read(GOLDEN / "unsaved-fp32"), Checkpoint.open(tiny_gpt2))
    assert told.fits is False
    assert told.misfit is not None
    assert told.cost is not None and told.cost.branch_macs is None
    assert {kind.shape for kind in told.kinds} == {None}


def test_survives_json(checkpoint: Checkpoint) -> None:
    told = inspect(read(GOLDEN / "unsaved-fp32"), checkpoint).to_dict()
    assert json.loads(json.dumps(told))["kinds"][0]["shape"] == [HIDDEN, INNER]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj"),
        ("h.11.attn.c_attn", "attn.c_attn"),
        ("0.attn.c_attn", "attn.c_attn"),
        ("model.layers.3.mlp.experts.7.w1", "mlp.experts.*.w1"),
        ("encoder.layer.4.attention.output.dense", "attention.output.dense"),
        ("lm_head", "lm_head"),
    ],
)
def test_kinds(module: str, kind: str) -> None:
    assert kind_of(module) == kind
