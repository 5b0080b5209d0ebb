"""Plans: what is decided for each layer, JSON both ways, and what can't be planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter, WeightedAdapter
from vera_edge.adapters.projection import Projections, ProjectionSpec, regenerate
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError, PlanError
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import Plan
from vera_edge.storage.tensors import RawTensor
from vera_edge.trained.trained_model import check_projections


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> Adapter:
    return adapters.read(tiny_adapter)


@pytest.fixture(scope="module")
def nf4(tiny_llama: tiny.TinyLlama) -> Checkpoint:
    return Checkpoint.open(tiny_llama.nf4)


def made(tmp_path: Path, model_type: str, **config: object) -> Checkpoint:
    """A checkpoint of headers, with a stack, a head, a pooler and a router."""
    names = [
        "model.layers.0.attn.q_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.wo",
        "model.pooler.dense",
        "lm_head",
    ]
    save_file({f"{name}.weight": torch.zeros(8, 64) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return Checkpoint.open(tmp_path)


@pytest.mark.parametrize("weights", ["same", "fp32", "bf16", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_json_round_trip(nf4: Checkpoint, adapter: Adapter, weights: str, mode: str) -> None:
    projections = regenerate(ProjectionSpec(31, 8, 160, 160))
    plan = plans.make(nf4, [(adapter, 0.3)], mode, weights, projections=projections)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.adapters == ((adapter.digest, 0.3),)
    assert plan.base == nf4.layout_digest
    assert plan.projection is not None
    assert plan.projection["digest"] == projections.digest


def test_same_keeps_every_layers_own_options(nf4: Checkpoint, adapter: Adapter) -> None:
    plan = plans.make(nf4, [(adapter, 1.0)])
    assert {step.result for step in plan.steps} == {"nf4"}
    assert {step.action for step in plan.steps} == {"merge"}
    assert plan.steps[0].options == {
        "blocksize": 64,
        "double_quant": True,
        "storage": "U8",
        "dtype": "float32",
    }
    assert plan.others == "same"


def test_a_dense_target_takes_every_tensor(nf4: Checkpoint, adapter: Adapter) -> None:
    plan = plans.make(nf4, [(adapter, 1.0)], weights="bf16")
    assert {step.result for step in plan.steps} == {"bf16"}
    assert plan.others == "bf16"


def test_layers_without_an_adapter_are_kept(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    folder = tiny.make_adapter(tiny_llama.nf4, tmp_path, targets=["q_proj"], layers_to_transform=[1])
    checkpoint = Checkpoint.open(tiny_llama.nf4)
    plan = plans.make(checkpoint, [(adapters.read(folder), 1.0)])
    merged = [step.module for step in plan.steps if step.action == "merge"]
    assert merged == ["model.layers.1.self_attn.q_proj"]
    assert all(step.copies for step in plan.steps if step.action == "keep")


def test_what_of_a_dense_base_gets_quantized(tmp_path: Path) -> None:
    plan = plans.make(made(tmp_path, "llama"), [], weights="nf4")
    assert {step.module: step.result for step in plan.steps} == {
        "model.layers.0.attn.q_proj": "nf4",
        "model.layers.0.mlp.gate": "fp32",
        "model.layers.0.mlp.wo": "nf4",
        "model.pooler.dense": "fp32",
        "lm_head": "fp32",
    }


def test_what_transformers_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    plan = plans.make(made(tmp_path, "t5"), [], weights="int8")
    results = {step.module: step.result for step in plan.steps}
    assert results["model.layers.0.mlp.wo"] == "fp32"
    assert results["model.layers.0.attn.q_proj"] == "int8"


def test_conv1d_goes_back_to_its_orientation(tiny_gpt2: Path, tmp_path: Path) -> None:
    quantized = tiny.quantize(tiny_gpt2, tmp_path / "nf4", **tiny.four_bit("nf4"))
    plan = plans.make(Checkpoint.open(quantized), [], weights="fp32")
    assert all(step.options["transposed"] for step in plan.steps)


def test_a_format_only_an_exporter_knows(nf4: Checkpoint, adapter: Adapter) -> None:
    plan = plans.make(nf4, [(adapter, 1.0)], "branch", "int4", {"block": 32})
    assert {(step.action, step.result) for step in plan.steps} == {("branch", "int4")}
    assert plan.steps[0].options == {"block": 32}


class TestRefused:
    def test_an_unknown_mode(self, nf4: Checkpoint, adapter: Adapter) -> None:
        with pytest.raises(PlanError, match="mode 'fused' isn't known"):
            plans.make(nf4, [(adapter, 1.0)], "fused")

    def test_options_without_a_format(self, nf4: Checkpoint, adapter: Adapter) -> None:
        with pytest.raises(PlanError, match="needs a weight format"):
            plans.make(nf4, [(adapter, 1.0)], options={"blocksize": 32})

    def test_a_module_that_is_no_linear(self, nf4: Checkpoint, adapter: Adapter) -> None:
        changed = dataclasses.replace(
            adapter, vectors={"model.embed_tokens": next(iter(adapter.vectors.values()))}
        )
        with pytest.raises(MismatchError, match=r"model\.embed_tokens is adapted but isn't a linear"):
            plans.make(nf4, [(changed, 1.0)])

    @pytest.mark.parametrize("weight", [float("nan"), float("inf")])
    def test_a_weight_that_is_no_number(self, nf4: Checkpoint, adapter: Adapter, weight: float) -> None:
        with pytest.raises(PlanError, match="give a finite number"):
            plans.make(nf4, [(adapter, weight)])

    @pytest.mark.parametrize(("field", "word"), [("rank", "rank"), ("seed", "projection seed")])
    def test_adapters_of_other_projections(
        self, nf4: Checkpoint, adapter: Adapter, field: str, word: str
    ) -> None:
        change: dict[str, Any] = {field: 77}
        other = dataclasses.replace(adapter, path=Path("other"), **change)
        with pytest.raises(MismatchError, match=f"differ in their {word} .* 77"):
            plans.make(nf4, [(adapter, 1.0), (other, 1.0)])

    @pytest.mark.parametrize("weights", ["awq", "w4a16", "w8a8", "fp8", "fp8-dynamic"])
    def test_a_conv1d_in_a_format_of_linears_alone(self, tiny_gpt2: Path, weights: str) -> None:
        checkpoint = Checkpoint.open(tiny_gpt2)
        with pytest.raises(PlanError, match="is a Conv1D, which transformers reads in no"):
            plans.make(checkpoint, [], weights=weights)
        for allowed in ("nf4", "int8", "gptq", "bf16"):
            plans.make(checkpoint, [], weights=allowed)

    def test_two_that_replace_the_same_tensor(self, nf4: Checkpoint, adapter: Adapter) -> None:
        head = {"lm_head.weight": RawTensor.of(np.zeros((384, 64), np.float32))}
        one, two = (dataclasses.replace(adapter, modules_to_save=head) for _ in range(2))
        with pytest.raises(MismatchError, match=r"both replace lm_head\.weight"):
            plans.make(nf4, [(one, 1.0), (two, 1.0)])
        with pytest.raises(PlanError, match="can't be weighted"):
            plans.make(nf4, [(one, 0.5)])

    def test_projections_that_differ(self, adapter: Adapter) -> None:
        spec = ProjectionSpec(31, 8, 160, 160)
        first, rounded = regenerate(spec), regenerate(dataclasses.replace(spec, rounding="bfloat16"))
        pairs = [WeightedAdapter(adapter, 1.0)] * 2
        with pytest.raises(MismatchError, match=r"differ in rounding \(float32 and bfloat16\)"):
            check_projections(pairs, [first, rounded])
        edited = Projections(spec, first.a + np.float32(1), first.b)
        with pytest.raises(MismatchError, match="differ in their saved values"):
            check_projections(pairs, [first, edited])
        assert check_projections(pairs, [first, regenerate(spec)]) is first

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 99},
            {"steps": None},
            {"steps": [{"module": "x"}]},
            {"adapters": [{"digest": "x"}]},
            {"mode": "x"},
            {"more": 1},
        ],
    )
    def test_json_that_is_no_plan(self, nf4: Checkpoint, adapter: Adapter, change: dict[str, object]) -> None:
        facts = plans.make(nf4, [(adapter, 1.0)]).to_dict() | change
        with pytest.raises(PlanError, match="plan"):
            Plan.from_dict(facts)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [64]},
        {"shape": [64, 0]},
        {"shape": [64, "64"]},
        {"shape": [64, 2**70]},
        {"shape": None},
        {"action": "cut"},
        {"action": ["keep"]},
        {"module": 3},
        {"source": None},
        {"result": []},
        {"options": []},
        {"more": 1},
    ],
)
def test_a_step_in_json_has_its_whole_shape(
    nf4: Checkpoint, adapter: Adapter, change: dict[str, Any]
) -> None:
    facts = plans.make(nf4, [(adapter, 1.0)]).to_dict()
    facts["steps"][0] |= change
    with pytest.raises(PlanError, match="isn't a plan as vera-edge writes it"):
        Plan.from_dict(facts)
    del facts["steps"][0]["options"]
    with pytest.raises(PlanError, match="isn't a plan as vera-edge writes it"):
        Plan.from_dict(facts)


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": [{"digest": 1, "weight": 1.0}]},
        {"adapters": [{"digest": "x", "weight": "1"}]},
        {"adapters": 3},
        {"adapters": [{"digest": "x", "weight": True}]},
        {"projection": {}},
        {"projection": []},
        {"base": None},
        {"weights": None},
        {"others": 1},
        {"options": None},
        {"version": True},
        {"mode": None},
        {"steps": {}},
    ],
)
def test_a_plan_in_json_has_its_whole_shape(
    nf4: Checkpoint, adapter: Adapter, change: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match="plan"):
        Plan.from_dict(plans.make(nf4, [(adapter, 1.0)]).to_dict() | change)


def test_two_steps_for_one_module(nf4: Checkpoint, adapter: Adapter) -> None:
    facts = plans.make(nf4, [(adapter, 1.0)]).to_dict()
    facts["steps"].append(facts["steps"][0])
    with pytest.raises(PlanError, match="two steps for one module"):
        Plan.from_dict(facts)
