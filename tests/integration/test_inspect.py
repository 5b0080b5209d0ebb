"""`vera-edge inspect` on the trained demo adapter, and on adapters that don't fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from scripts.prepare_demo import Demo
from tests import tiny
from tests.conftest import Cli

SAVED = Path(__file__).parents[1] / "golden" / "adapters" / "peft-0.21.2" / "saved-fp32"


@pytest.mark.real
def test_tells_what_the_demo_adapter_is(cli: Cli, demo: Demo) -> None:
    result = cli("inspect", demo.adapter, "--base", demo.base, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    file = load_file(demo.adapter / "adapter_model.safetensors")
    config = json.loads((demo.adapter / "adapter_config.json").read_text())
    assert told["parameters"] == sum(tensor.size for tensor in file.values())
    assert told["layers"] == list(range(30))
    assert (told["rank"], told["seed"]) == (config["r"], config["projection_prng_key"])
    assert told["peft_version"] == config["peft_version"]
    assert told["fits"] is True
    assert told["misfit"] is None
    assert told["dead"] == []
    kinds = {kind["name"]: kind for kind in told["kinds"]}
    assert kinds["self_attn.k_proj"]["shape"] == [192, 576]
    assert kinds["mlp.down_proj"]["shape"] == [576, 1536]
    assert {kind["modules"] for kind in kinds.values()} == {30}
    largest = max(abs(file[name]).max() for name in file if "down_proj.vera_lambda_b" in name)
    assert kinds["mlp.down_proj"]["ranges"]["lambda_b"][1] == pytest.approx(largest)
    rank, hidden, inner, narrow = told["rank"], 576, 1536, 192
    assert told["spec"]["in_max"] == told["spec"]["out_max"] == inner
    assert told["cost"]["vectors"]["fp32"] == 4 * told["parameters"]
    assert told["cost"]["projections"]["fp32"] == 4 * rank * 2 * inner
    # half a byte a value, and a float32 scale to a block: of 128 values in A, of a whole row in B
    assert told["cost"]["projections"]["int4"] == rank * inner + 4 * (rank * inner // 128 + inner)
    # q, k and v share A x, and so do gate and up; o and down have inputs of their own
    inputs = hidden + hidden + hidden + inner
    outputs = 2 * hidden + 2 * narrow + 2 * inner + hidden
    assert told["cost"]["branch_macs"] == 30 * (rank * inputs + 7 * rank + outputs * (rank + 1))
    base = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
    assert told["cost"]["base_macs"] == 30 * base


@pytest.mark.real
def test_shows_a_table(cli: Cli, demo: Demo) -> None:
    result = cli("inspect", demo.adapter, "--base", demo.base)
    assert result.exit_code == 0
    for expected in ("fits the base", "yes", "0-29", "self_attn.q_proj", "projections", "int4 0.41 MB"):
        assert expected in result.stdout
    assert json.loads(cli("inspect", demo.adapter, "--base", demo.base, "--json").stdout)["digest"] in (
        "".join(line.strip() for line in result.stdout.splitlines())
    )


def test_without_a_base_it_says_what_is_missing(cli: Cli, tiny_adapter: Path) -> None:
    result = cli("inspect", tiny_adapter, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["fits"] is None
    assert told["spec"] is None
    assert "give --base" in told["unresolved"]
    assert "no base given" in cli("inspect", tiny_adapter).stdout


def test_an_adapter_of_another_base_ends_with_2(cli: Cli, tiny_adapter: Path, tiny_gpt2: Path) -> None:
    result = cli("inspect", tiny_adapter, "--base", tiny_gpt2, "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    assert told["fits"] is False
    assert told["misfit"] in result.stderr
    assert result.stderr.count("\n") == 1


def test_names_dead_branches(cli: Cli, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """An untrained adapter changes nothing: PEFT starts every lambda_b at zero."""
    folder = tiny.make_adapter(tiny_llama.fp32, tmp_path / "untrained", targets=["q_proj"], strength=0.0)
    told = json.loads(cli("inspect", folder, "--base", tiny_llama.fp32, "--json").stdout)
    assert told["dead"] == [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    assert "model.layers.1.self_attn.q_proj" in cli("inspect", folder).stdout


def test_handles_conv1d(cli: Cli, tiny_gpt2: Path, tiny_gpt2_adapter: Path) -> None:
    told = json.loads(cli("inspect", tiny_gpt2_adapter, "--base", tiny_gpt2, "--json").stdout)
    assert told["fits"] is True
    kinds = {kind["name"]: kind["shape"] for kind in told["kinds"]}
    assert kinds["attn.c_attn"] == [192, 64]
    assert kinds["mlp.c_fc"] == [160, 64]
    assert kinds["mlp.c_proj"] == [64, 160]


def test_bad_input_is_one_sentence(cli: Cli, tmp_path: Path) -> None:
    for words in (("inspect", tmp_path / "nowhere"), ("inspect", SAVED, "--base", tmp_path / "nowhere")):
        result = cli(*words)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("vera-edge: ")
        assert result.stderr.count("\n") == 1


def test_square_brackets_in_a_name_are_shown(cli: Cli, tiny_adapter: Path, tmp_path: Path) -> None:
    """rich would take them for its markup, and fail on a closing tag without an opening one."""
    for name in ("[red] one", "a[/b]"):
        shutil.copytree(tiny_adapter, tmp_path / name)
        done = cli("inspect", tmp_path / name)
        assert done.exit_code == 0 and str(tmp_path / name) in done.stdout
