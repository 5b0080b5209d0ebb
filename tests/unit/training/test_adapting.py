"""An adapter carried to another base: better by PEFT's own forward, never worse, and a PEFT folder still."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import vera_edge
from tests import peft_adapters, tiny, tiny_encoder
from tests.conftest import Cli
from vera_edge.training import load
from vera_edge.training.distillation import Schedule, distil
from vera_edge.training.on_device import placed


@pytest.fixture(scope="module")
def here(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (NF4), `adapter` trained on it, `shipped` (GPTQ) and `text.txt`."""
    folder = tmp_path_factory.mktemp("adapting")
    shutil.copytree(tiny_llama.nf4, folder / "base")
    tiny.make_adapter(folder / "base", folder / "adapter", save_projection=True, strength=0.5)
    (folder / "text.txt").write_text(tiny.TEXT * 16)
    vera_edge.quantize(folder / "base", out=folder / "shipped", to="gptq", method="rtn")
    return folder


def logits(base: Path, adapter: Path, ids: Any) -> Any:
    """Log-probabilities by PEFT's own forward of an adapter on a base."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(base), adapter).eval()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits[0], -1)


def test_it_is_nearer_to_what_was_trained_by_pefts_own_forward(here: Path, cli: Cli, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = (here / "base", here / "adapter", "--onto", here / "shipped", "-o", tmp_path / "carried")
    result = cli("adapt", *words, "--calibration", f"{here / 'text.txt'}=1", "--steps", 40, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["improved"]
    assert told["after"] < 0.8 * told["before"] < told["effect"]
    ids = AutoTokenizer.from_pretrained(here / "base")(tiny.TEXT, return_tensors="pt").input_ids
    trained = logits(here / "base", here / "adapter", ids)
    found = [logits(here / "shipped", adapter, ids) for adapter in (here / "adapter", tmp_path / "carried")]
    before, after = [float((trained.exp() * (trained - one)).sum(-1).mean()) for one in found]
    assert after < before
    old, new = (
        load_file(path / "adapter_model.safetensors") for path in (here / "adapter", tmp_path / "carried")
    )
    assert old.keys() == new.keys()
    for name, values in old.items():
        same = np.array_equal(values, new[name])
        assert same == ("vera_A" in name or "vera_B" in name), name  # the projections, and nothing else
    config = json.loads((tmp_path / "carried" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(here / "shipped")


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_s_pairs_are_carried_over_too(here: Path, cli: Cli, tmp_path: Path, dora: bool) -> None:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora, task_type="CAUSAL_LM")
    lora = peft_adapters.save(here / "base", tmp_path / "lora", settings, 0.3)
    words = (here / "base", lora, "--onto", here / "shipped", "-o", tmp_path / "carried")
    result = cli("adapt", *words, "--calibration", f"{here / 'text.txt'}=1", "--steps", 40)
    assert result.exit_code == 0, result.stderr
    ids = AutoTokenizer.from_pretrained(here / "base")(tiny.TEXT, return_tensors="pt").input_ids
    trained = logits(here / "base", lora, ids)
    found = [logits(here / "shipped", adapter, ids) for adapter in (lora, tmp_path / "carried")]
    before, after = [float((trained.exp() * (trained - one)).sum(-1).mean()) for one in found]
    assert after < before
    old, new = (load_file(path / "adapter_model.safetensors") for path in (lora, tmp_path / "carried"))
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[name], new[name]) == ("magnitude" in name) for name in old)


def test_an_adapter_of_another_method_is_refused(here: Path, cli: Cli, tmp_path: Path) -> None:
    from peft import IA3Config

    settings = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    other = peft_adapters.save(here / "base", tmp_path / "other", settings)
    result = cli("adapt", here / "base", other, "--onto", here / "shipped", "-o", tmp_path / "carried")
    assert result.exit_code == 2
    assert (
        "is an adapter of IA3, and those of VeRA and LoRA alone are carried over; train it on"
        in result.stderr
    )


def test_what_cant_be_bettered_comes_out_as_it_went_in(here: Path, cli: Cli, tmp_path: Path) -> None:
    words = (here / "base", here / "adapter", "--onto", here / "base", "-o", tmp_path / "carried")
    result = cli("adapt", *words, "--calibration", here / "text.txt", "--steps", 12)
    assert result.exit_code == 0, result.stderr
    assert "nothing did better on the held-out text" in result.stdout
    assert re.search(r"trained on \d+ tokens of \S*text.txt and \d+ of built-in text", result.stderr)
    old, new = (
        load_file(path / "adapter_model.safetensors") for path in (here / "adapter", tmp_path / "carried")
    )
    assert all(np.array_equal(values, new[name]) for name, values in old.items())


def test_a_base_of_the_same_shapes_and_other_values_is_doubted(
    here: Path, cli: Cli, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    other = tiny.load(tiny_llama.fp32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    tiny.save(other, tmp_path / "other")
    tiny.save_tokenizer(tmp_path / "other")
    words = (here / "base", here / "adapter", "--onto", tmp_path / "other", "-o", tmp_path / "carried")
    result = cli("adapt", *words, "--calibration", here / "text.txt", "--steps", 1)
    assert result.exit_code == 0, result.stderr
    assert "see whether it is the same model" in result.stderr


def test_a_training_that_diverges_keeps_what_was_before(here: Path) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(here / "shipped"), here / "adapter").eval()
    before = {name: value.clone() for name, value in model.named_parameters() if "vera_lambda" in name}
    windows = [np.arange(start, start + 32, dtype=np.int64) for start in range(0, 128, 32)]
    drawn = np.random.default_rng(1)

    def teacher(window: Any) -> Any:
        return drawn.standard_normal((len(window), 384)).astype(np.float32)

    schedule = Schedule(steps=20, rates=(1e30, 1e30), every=5)
    found = distil(teacher, model, windows[:3], windows[3:], schedule)
    assert found.best == 0
    assert found.after == found.before
    assert found.stopped is not None and "wasn't finite" in found.stopped
    for name, arrays in found.arrays.items():
        for kind in ("vera_lambda_b", "vera_lambda_d"):
            assert np.array_equal(arrays[kind], before[f"base_model.model.{name}.{kind}.default"].numpy())


def test_it_ends_where_held_out_text_gains_no_more(here: Path) -> None:
    """Trained towards what is true of the training windows only, and false of the others."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(here / "shipped"), here / "adapter").eval()
    one, other = (np.arange(start, start + 40, dtype=np.int64) for start in (0, 100))
    with torch.no_grad():
        now = model(input_ids=torch.from_numpy(other)[None]).logits[0].numpy().copy()
    wild = np.random.default_rng(2).standard_normal((40, 384)).astype(np.float32) * 5

    def teacher(window: Any) -> Any:
        return wild if window[0] == 0 else now

    found = distil(teacher, model, [one], [other], Schedule(steps=60, every=2, patience=3))
    assert found.best == 0
    assert found.steps == 6
    assert found.after == found.before < 1e-6


def test_a_model_on_a_device_answers_and_learns_as_on_the_processor(here: Path) -> None:
    """The device is torch's own processor: others aren't everywhere."""
    ids = torch.arange(20)[None]
    found = []
    for device in (None, "cpu"):
        model = placed(load(here / "shipped"), device)
        table = model.get_input_embeddings().weight.requires_grad_(requires_grad=True)
        logits = model(input_ids=ids).logits
        logits.square().sum().backward()
        found.append((logits.detach(), table.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (tiny.TEXT, (), "tokens, too few to carry an adapter over; give at least 1,024, better 40,960"),
        (tiny.TEXT * 16, ("--compute-device", "cuda"), "there is no cuda device"),
        (tiny.TEXT * 16, ("--steps", "0"), "0 steps train nothing; give at least 1"),
        (tiny.TEXT * 16, ("--onto", "base", "--activations", "int8"), "none is stored in integers"),
        (tiny.TEXT * 16, ("--onto", "encoder"), "aren't the same model"),
    ],
)
def test_what_cant_be_done_is_said_and_nothing_is_written(
    text: str, words: tuple[str, ...], says: str, here: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text)
    if "encoder" in words:
        shutil.copytree(tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)[0], tmp_path / "encoder")
    elif "--onto" in words:
        (tmp_path / "base").symlink_to(here / "base")
    given = ["--onto", here / "shipped", *words, "-o", tmp_path / "out"]
    given = [tmp_path / word if word in ("base", "encoder") else word for word in given]
    given += ["--calibration", f"{tmp_path / 'text.txt'}=1"]
    result = cli("adapt", here / "base", here / "adapter", *given)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "out").exists()
