"""A GPTQ and an AWQ SmolLM2, merged through the command line: as PEFT computes it on the dequantized base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.prepare_demo import Demo
from tests.conftest import Cli
from vera_edge import formats
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.storage import side_files
from vera_edge.storage.tensors import RawTensor, write_header

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B"),
]
OPTIONS = {"gptq": {"group_size": 64}, "awq": {"group_size": 64}}


def _quantized(source: Path, folder: Path, name: str) -> Path:
    """The model in `source` with every linear of its layers rounded to the format, as a checkpoint."""
    checkpoint, weight_format = Checkpoint.open(source), formats.get(name)
    options = weight_format.options(OPTIONS[name])
    tensors: dict[str, RawTensor] = {}
    for module in checkpoint.linears:
        if module.startswith("model.layers."):
            weight = weight_format.quantize(checkpoint.dequantize(module), options)
            tensors |= {f"{module}{suffix}": raw for suffix, raw in weight.tensors().items()}
    kept = [key for key in checkpoint.tensors if f"{key.removesuffix('.weight')}.qweight" not in tensors]
    tensors |= {key: checkpoint.tensors.read(key) for key in kept}
    folder.mkdir()
    config = {**checkpoint.config, "quantization_config": weight_format.quantization_config(options)}
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as stream:
        write_header(stream, {key: (raw.dtype, raw.shape) for key, raw in tensors.items()}, {"format": "pt"})
        for raw in tensors.values():
            stream.write(raw.data.tobytes())
    side_files.copy(source, folder)
    return folder


def _tokens(demo: Demo) -> Any:
    from transformers import AutoTokenizer

    text = demo.eval_text.read_text()[:600]
    return AutoTokenizer.from_pretrained(demo.float_base)(text, return_tensors="pt")["input_ids"][:, :96]


def _logits(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("name", OPTIONS)
def test_merged_to_float32_it_is_pefts_unmerged_model(
    name: str, demo: Demo, cli: Cli, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out = _quantized(demo.float_base, tmp_path / name, name), tmp_path / "merged"
    done = cli("merge", base, demo.adapter, "-o", out, "--to", "fp32")
    assert done.exit_code == 0, done.stderr
    checkpoint = Checkpoint.open(base)
    assert {linear.format for linear in checkpoint.linears.values()} <= {name, "fp32"}
    dense = AutoModelForCausalLM.from_pretrained(demo.float_base, dtype=torch.float32)
    with torch.no_grad():
        for module, linear in checkpoint.linears.items():
            if linear.format == name:
                dense.get_submodule(module).weight.copy_(torch.from_numpy(checkpoint.dequantize(module)))
    tokens = _tokens(demo)
    without = _logits(dense, tokens)
    expected = _logits(PeftModel.from_pretrained(dense, demo.adapter), tokens)
    scale = expected.abs().max()
    assert (without - expected).abs().max() > 0.05 * scale, "the adapter must show"
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (_logits(merged, tokens) - expected).abs().max() < 1e-4 * scale


def test_the_trained_base_becomes_gptq_from_the_command_line(demo: Demo, cli: Cli, tmp_path: Path) -> None:
    """Rounded to nearest, in groups that divide 576 and 1536; the adapter's effect is still there."""
    out = tmp_path / "gptq"
    refused = cli("merge", demo.base, demo.adapter, "-o", out, "--to", "gptq", "--method", "rtn")
    assert refused.exit_code == 2
    assert "a group size of 128 doesn't divide its 576 inputs" in refused.stderr
    assert not out.exists()
    options = ("--to", "gptq8", "--block-size", "64")
    done = cli("merge", demo.base, demo.adapter, "-o", out, *options)
    assert done.exit_code == 0, done.stderr
    written, base = Checkpoint.open(out), Checkpoint.open(demo.base)
    assert written.config["quantization_config"]["bits"] == 8
    quantized = [module for module, linear in written.linears.items() if linear.format == "gptq"]
    assert len(quantized) == sum(linear.format == "nf4" for linear in base.linears.values()) == 210
