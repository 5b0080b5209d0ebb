"""The config.json of a merged model, for what no family test reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vera_edge import plan as plans
from vera_edge.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.merge.config import merged_config, skip_modules
from vera_edge.plan import Step


def base(folder: Path, **config: Any) -> Checkpoint:
    names = ["layers.0.fc", "layers.1.fc", "lm_head"]
    save_file({f"{name}.weight": torch.zeros(8, 64) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "made", **config}))
    return Checkpoint.open(folder)


def test_every_dtype_follows_a_dense_target(tmp_path: Path) -> None:
    nested = {"text_config": {"dtype": "float32", "layers": 2}, "vision_config": {"torch_dtype": "float16"}}
    checkpoint = base(tmp_path, torch_dtype="float32", **nested)
    config = merged_config(plans.make(checkpoint, [], weights="bf16"), checkpoint, untied=False)
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["text_config"] == {"dtype": "bfloat16", "layers": 2}
    assert config["vision_config"] == {"torch_dtype": "bfloat16"}
    assert "quantization_config" not in config


def test_code_in_another_repository_may_be_named(tmp_path: Path) -> None:
    remote = {"AutoModel": "someone/model--modeling.Own"}
    checkpoint = base(tmp_path, auto_map=remote)
    assert merged_config(plans.make(checkpoint, []), checkpoint, untied=False)["auto_map"] == remote


def test_the_compute_dtype_is_the_models(tmp_path: Path) -> None:
    checkpoint = base(tmp_path, dtype="bfloat16")
    config = merged_config(plans.make(checkpoint, [], weights="nf4"), checkpoint, untied=False)
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config["dtype"] == "bfloat16"
    assert "llm_int8_skip_modules" not in config["quantization_config"]


def step(module: str, result: str) -> Step:
    return Step(module, "keep", "fp32", result, (8, 64))


@pytest.mark.parametrize(
    ("dense", "skipped"),
    [
        ([], None),
        (["lm_head"], None),
        (["model.embed_out"], None),
        (["pooler.dense", "lm_head"], ["embed_out", "lm_head", "pooler.dense", "predictions.decoder"]),
        (["pooler.dense"], ["embed_out", "lm_head", "pooler.dense", "predictions.decoder"]),
    ],
)
def test_what_transformers_must_leave_alone(dense: list[str], skipped: list[str] | None) -> None:
    """Naming modules replaces transformers' own rule for the head, so the head is named with them."""
    steps = (step("layers.0.fc", "nf4"), *(step(module, "fp32") for module in dense))
    assert skip_modules(steps) == skipped


def test_two_quantized_formats_in_one_model_are_refused(tmp_path: Path) -> None:
    checkpoint = base(tmp_path)
    plan = plans.make(checkpoint, [], weights="nf4")
    facts = plan.to_dict()
    facts["steps"][0]["result"] = "int8"
    with pytest.raises(PlanError, match="can't hold int8 and nf4 weights together"):
        merged_config(plans.Plan.from_dict(facts), checkpoint, untied=False)
