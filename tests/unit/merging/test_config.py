"""The config.json of a merged model, for what no family test reaches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import exported, tiny
from vera_edge import merging as merge
from vera_edge.adapters.reading import read
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, PlanError
from vera_edge.exporting import target
from vera_edge.merging.config import merged_config, skip_modules
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import Step
from vera_edge.trained import provenance


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


def _under(*path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A config with its quantization moved to `path`."""

    def move(config: dict[str, Any]) -> dict[str, Any]:
        holder = moved = {key: value for key, value in config.items() if key != "quantization_config"}
        for part in path[:-1]:
            holder = holder.setdefault(part, {})
        holder[path[-1]] = config["quantization_config"]
        return moved

    return move


def _twice(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "text_config": {"quantization_config": config["quantization_config"]}}


PLACES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "compression_config": _under("compression_config"),
    "text_config": _under("text_config", "quantization_config"),
    "a model in a model": _under("thinker_config", "text_config", "compression_config"),
    "in two places": _twice,
}


def _placed(source: Path, folder: Path, place: str) -> Path:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(PLACES[place](json.loads(path.read_text()))))
    return folder


@pytest.fixture(scope="module")
def quantized(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A compressed-tensors base."""
    folder = tmp_path_factory.mktemp("w4a16") / "base"
    options = {"group_size": 32}
    merge.to_folder(
        tiny_llama.fp32, [(tiny_adapter, 0.0)], folder, "w4a16", options, projection_rounding="fp32"
    )
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "kept"
    return tiny.make_adapter(tiny_llama.fp32, folder, save_projection=True)


@pytest.mark.parametrize("place", PLACES)
def test_a_quantization_goes_from_wherever_it_stood(
    place: str, quantized: Path, adapter: Path, tmp_path: Path
) -> None:
    base = _placed(quantized, tmp_path / "base", place)
    assert Checkpoint.open(base).quantized
    for to in ("bf16", "fp32"):
        merge.to_folder(base, [(adapter, 1.0)], tmp_path / to, to)
        text = (tmp_path / to / "config.json").read_text()
        assert "quantization_config" not in text and "compression_config" not in text
        assert "text_config" not in text  # it held nothing else
        assert not Checkpoint.open(tmp_path / to).quantized
    expected = exported.peft_logits(_dense(quantized, tmp_path / "dense"), adapter, exported.tokens(24))
    with torch.no_grad():
        found = tiny.load(tmp_path / "fp32").eval()(torch.from_numpy(exported.tokens(24)[None])).logits[0]
    assert exported.error(found.numpy(), expected) < 1e-4
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "nf4", "nf4")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert "compression_config" not in json.dumps(config) and "pack-quantized" not in json.dumps(config)


def _dense(source: Path, folder: Path) -> Path:
    """The exact values of a quantized base as a float checkpoint that our readers take no part in."""
    checkpoint = Checkpoint.open(source)
    state = {f"{name}.weight": torch.from_numpy(checkpoint.dequantize(name)) for name in checkpoint.linears}
    state |= {name: torch.from_numpy(checkpoint.float32(name)) for name in checkpoint.other_names}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_a_quantization_that_stays_stands_where_it_stood(
    place: str, quantized: Path, adapter: Path, tmp_path: Path
) -> None:
    base = _placed(quantized, tmp_path / "base", place)
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "same", "same")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "same"))
    assert after == before
    assert Checkpoint.open(tmp_path / "same").quantized


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_the_exporters_own_folder_says_nothing_of_a_quantization(
    place: str, quantized: Path, adapter: Path, tmp_path: Path
) -> None:
    base = _placed(quantized, tmp_path / "base", place)
    ids = exported.tokens(24)
    expected = exported.peft_logits(_dense(quantized, tmp_path / "dense"), adapter, ids)
    for mode in ("merged", "branch"):
        out = tmp_path / mode
        target.export(base, [(adapter, 1.0)], out, mode=mode, weights="fp32")
        vectors = out / "adapters" / "default.onnx_adapter" if mode == "branch" else None
        assert exported.error(exported.logits(out, ids, vectors), expected) < 1e-4
        assert "quant" not in (out / "config.json").read_text()


def test_two_quantizations_that_differ_are_refused(quantized: Path, tmp_path: Path) -> None:
    folder = _placed(quantized, tmp_path / "base", "in two places")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"]["format"] = "int-quantized"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="describes two quantizations that differ"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("place", ["text_config", "compression_config"])
def test_the_compute_dtype_is_read_where_it_stands(
    place: str, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    """It decides what PEFT rounded the projections to."""
    source = tiny.quantize(tiny_llama.fp32, tmp_path / "nf4", **tiny.four_bit("nf4", compute="bfloat16"))
    base = _placed(source, tmp_path / "base", place)
    spec = provenance.resolve(read(tiny_adapter), Checkpoint.open(base)).spec
    assert spec.rounding == provenance.resolve(read(tiny_adapter), Checkpoint.open(source)).spec.rounding
    assert spec.rounding == "bfloat16"
