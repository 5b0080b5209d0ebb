"""`vera-edge projections` on the trained demo adapter, and on adapters with saved projections."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from scripts.prepare_demo import Demo
from tests import tiny
from tests.conftest import Cli

GOLDEN = Path(__file__).parents[1] / "golden" / "adapters" / "peft-0.21.2"


@pytest.mark.real
def test_writes_what_peft_draws_for_the_demo(cli: Cli, demo: Demo, tmp_path: Path) -> None:
    from peft import PeftConfig
    from peft.tuners.vera.model import _kaiming_init

    target = tmp_path / "projections.safetensors"
    result = cli("projections", demo.adapter, "--base", demo.base, "--out", target, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    config = PeftConfig.from_pretrained(demo.adapter)
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    written = load_file(target)
    for name, shape in (("vera_A", (config.r, 1536)), ("vera_B", (1536, config.r))):
        drawn = _kaiming_init(shape, generator=generator).numpy()
        assert np.array_equal(written[name].view(np.uint32), drawn.view(np.uint32))
    assert told["spec"]["rounding"] == "float32"
    assert "4-bit base that computes in float32" in told["how"]


@pytest.mark.real
def test_loading_the_demo_with_peft_gives_the_same_projections(demo: Demo, cli: Cli, tmp_path: Path) -> None:
    """What a user of the adapter gets on the base it was trained on."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(demo.base, device_map="cpu", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, demo.adapter)
    target = tmp_path / "projections.safetensors"
    assert cli("projections", demo.adapter, "--base", demo.base, "--out", target).exit_code == 0
    for name, written in load_file(target).items():
        held = getattr(model.base_model, name)["default"].numpy()
        assert np.array_equal(written.view(np.uint32), held.view(np.uint32))


def test_verifies_saved_projections(cli: Cli) -> None:
    result = cli("projections", GOLDEN / "saved-fp32", "--verify")
    assert result.exit_code == 0
    assert "bit for bit" in result.stdout


def test_verify_ends_with_2_when_the_seed_does_not_give_them(cli: Cli, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "saved-fp32", tmp_path / "changed")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_B"][0, 0] += 1
    save_file(tensors, file)
    result = cli("projections", folder, "--verify", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "seed 41 doesn't give them" in result.stderr
    # without --verify they are the truth, and are written as they were saved
    target = tmp_path / "kept.safetensors"
    assert cli("projections", folder, "--out", target).exit_code == 0
    assert np.array_equal(load_file(target)["vera_B"], tensors["base_model.vera_B"])


def test_verify_ends_with_2_when_nothing_was_saved(cli: Cli) -> None:
    result = cli("projections", GOLDEN / "unsaved-fp32", "--verify")
    assert result.exit_code == 2
    assert "nothing to verify" in result.stderr


def test_does_not_replace_a_file_unasked(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "projections.safetensors"
    target.write_text("precious")
    words = ("projections", GOLDEN / "saved-fp32", "--out", target)
    refused = cli(*words)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert target.read_text() == "precious"
    assert cli(*words, "--force").exit_code == 0
    assert set(load_file(target)) == {"vera_A", "vera_B"}


def test_a_refusing_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The process may write 512 bytes to a file and no more, as on a disk that runs full."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512));"
        "sys.argv[0] = 'vera-edge'; from vera_edge.cli import main; main()"
    )
    words = ["projections", str(GOLDEN / "saved-fp32"), "--out", str(tmp_path / "projections.safetensors")]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "projections.safetensors grows past the file size" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_verify_and_out_exclude_each_other(cli: Cli, tmp_path: Path) -> None:
    result = cli("projections", GOLDEN / "saved-fp32", "--verify", "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert "don't go together" in result.stderr


def test_takes_a_dtype_when_asked(cli: Cli, tiny_llama: tiny.TinyLlama) -> None:
    words = ("projections", GOLDEN / "unsaved-fp32", "--base", tiny_llama.fp32, "--json")
    specs = [
        json.loads(cli(*words, "--projection-rounding", name).stdout)["spec"] for name in ("fp16", "float16")
    ]
    assert specs[0] == specs[1]
    assert specs[0]["rounding"] == "float16"
    refused = cli(*words, "--projection-rounding", "int8")
    assert refused.exit_code == 2
    assert "float32, bfloat16 or float16" in refused.stderr
