"""What an adapter's folder tells of the base's quantization, as trainers have written it down."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import peft_cases, tiny
from tests.conftest import Cli
from vera_edge.adapters import reading as adapters
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import parse
from vera_edge.errors import MismatchError
from vera_edge.trained import record as training_record
from vera_edge.trained.provenance import resolve_for_command
from vera_edge.trained.record import ASSUMED

# The list that PEFT wrote, up to 0.6 say; the YAML that Axolotl writes; a script pasted by hand.
PEFT = """
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: True
- llm_int8_threshold: 6.0
- llm_int8_skip_modules: None
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: True
- bnb_4bit_compute_dtype: bfloat16
"""
YAML = """
```yaml
base_model: some/model
load_in_8bit: true
load_in_4bit: false
```
"""
SCRIPT = """
    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_compute_dtype=torch.float16,
    )
"""
UNSURE = "load_in_4bit: true\nadapter: qlora\n"
CARDS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "peft": (PEFT, {"format": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}),
    "yaml": (YAML, {"format": "int8"}),
    "script": (SCRIPT, {"format": "fp4", "compute_dtype": "float16"}),
    "unsure": (UNSURE, {}),
    "neither": ("load_in_4bit: false\nload_in_8bit: False\n", None),
    "silent": ("# A model\n\nTrained with load_in_4bit, I think.\n", None),
}


@pytest.fixture
def adapter(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> Path:
    found = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    (found / "README.md").unlink()
    return found


@pytest.mark.parametrize("name", CARDS)
def test_what_a_model_card_tells(name: str, adapter: Path) -> None:
    text, told = CARDS[name]
    (adapter / "README.md").write_text(text)
    assert training_record.told(adapters.read(adapter)) == told


def test_a_card_that_is_no_text_tells_nothing(adapter: Path) -> None:
    (adapter / "README.md").write_bytes(bytes(range(256)) * 9)
    assert training_record.told(adapters.read(adapter)) is None
    (adapter / "README.md").unlink()
    (adapter / "README.md").mkdir()
    assert training_record.told(adapters.read(adapter)) is None


def notes(adapter: Path, base: Path, words: str = "") -> tuple[str, ...]:
    return training_record.notes(
        adapters.read(adapter), Checkpoint.open(base, parse(words) if words else None)
    )


def test_notes(adapter: Path, tiny_llama: tiny.TinyLlama) -> None:
    """Assumed where nothing is known, silent where it was said, and told where the card has it otherwise."""
    assert notes(adapter, tiny_llama.fp32) == (ASSUMED,)
    for base, words in (
        (tiny_llama.fp32, "nf4"),
        (tiny_llama.fp32, "float"),
        (tiny_llama.fp32, "bf16"),
        (tiny_llama.nf4, ""),
        (tiny_llama.int8, ""),
    ):
        assert notes(adapter, base, words) == ()
    (adapter / "README.md").write_text(PEFT)
    (told,) = notes(adapter, tiny_llama.fp32)
    assert "loaded as nf4,double,compute=bfloat16, and the base here is in floats" in told
    assert notes(adapter, tiny_llama.fp32, "nf4,double,compute=bf16,dtype=bf16") == ()
    for base, words in ((tiny_llama.fp32, "nf4"), (tiny_llama.nf4, ""), (tiny_llama.fp32, "float")):
        (told,) = notes(adapter, base, words)
        assert "give the float base with --trained-as nf4,double,compute=bfloat16" in told
    (adapter / "README.md").write_text(UNSURE)
    assert notes(adapter, tiny_llama.nf4) == notes(adapter, tiny_llama.fp4) == ()
    for base in (tiny_llama.fp32, tiny_llama.int8):
        (told,) = notes(adapter, base)
        assert "was loaded in 4 bits" in told and "--trained-as nf4 or fp4" in told


@pytest.mark.parametrize(
    ("base", "words", "agrees"),
    [
        ("bf16", "", True),
        ("bf16", "nf4,compute=bf16", True),
        ("bf16", "nf4", False),
        ("bf16", "fp32", False),
        ("fp32", "", False),
        ("fp32", "bf16", True),
        ("nf4", "", False),
    ],
)
def test_saved_projections_speak_against_another_base(
    base: str, words: str, agrees: bool, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """They were rounded to bfloat16, so the base computed in it or was loaded in it."""
    peft_cases.make(peft_cases.Case("bf16", config={"save_projection": True}), tiny_llama, tmp_path)
    adapter = adapters.read(tmp_path)
    checkpoint = Checkpoint.open(getattr(tiny_llama, base), parse(words) if words else None)
    found = resolve_for_command(adapter, checkpoint)
    said = [note for note in found.notes if "the base wasn't loaded as it is here" in note]
    assert len(said) == (0 if agrees else 1)
    assert all("saved projections are rounded to bfloat16, but PEFT" in note for note in said)


def quantized(cli: Cli, tmp_path: Path, *words: object) -> dict[str, Any]:
    result = cli("quantize", *words, "-o", tmp_path / "out", "--force", "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_quantize_like_an_adapter(
    adapter: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    (adapter / "README.md").write_text(PEFT)
    base = tiny_llama.bf16
    made = quantized(cli, tmp_path, base, "--like", adapter)
    assert made["trained_as"] == "nf4,double,compute=bfloat16"
    assert any("README.md in the adapter's folder tells: format nf4" in note for note in made["notes"])
    assert any("fits; its projections: drawn from seed 31" in note for note in made["notes"])
    # What is asked goes first, and a card that says otherwise isn't kept back.
    made = quantized(cli, tmp_path, base, "--like", adapter, "--compute-dtype", "float16")
    assert made["trained_as"] == "nf4,double,compute=float16"
    made = quantized(cli, tmp_path, base, "--like", adapter, "--to", "int8")
    assert made["trained_as"] == "int8"
    assert any(
        "was loaded as nf4,double,compute=bfloat16, and the base here is int8" in n for n in made["notes"]
    )
    (adapter / "README.md").write_text(UNSURE)
    refused = cli("quantize", base, "-o", tmp_path / "other", "--like", adapter)
    assert (refused.exit_code, "give --to nf4, fp4" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("base", "version", "words"),
    [
        ("nf4-bf16", "0.21.2", "nf4,double,compute=bfloat16"),
        ("nf4", "0.21.2", "nf4,double"),
        ("nf4-stored-bf16", "0.18.1", "nf4,double,storage=bfloat16"),
    ],
)
def test_saved_projections_tell_what_the_base_computed_in(
    base: str, version: str, words: str, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    """As PEFT made them; for the older one its buffers, which it rounded to the storage dtype."""
    case = peft_cases.Case(base, config={"save_projection": True})
    peft_cases.make(case, tiny_llama, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    facts = json.loads(config.read_text()) | {"peft_version": version}
    config.write_text(json.dumps(facts))
    if version == "0.18.1":
        _round_saved(tmp_path / "adapter")
    made = quantized(
        cli, tmp_path, tiny_llama.fp32, "--like", tmp_path / "adapter", "--to", "nf4", "--double-quant"
    )
    assert made["trained_as"] == words
    told = [note for note in made["notes"] if "saved projections are rounded to bfloat16" in note]
    assert len(told) == (words != "nf4,double")


def _round_saved(adapter: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in ("base_model.vera_A", "base_model.vera_B"):
        tensors[name] = tensors[name].to(torch.bfloat16).float()
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_an_adapter_that_does_not_fit_stops_quantize(
    tiny_gpt2: Path, adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    refused = cli("quantize", tiny_gpt2, "-o", tmp_path / "out", "--to", "nf4", "--like", adapter)
    assert refused.exit_code == 2
    assert "which isn't there in" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_projections_that_cannot_be_told_do_not_stop_quantize(
    adapter: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_version": "0.18.2.dev0"}))
    words = (tiny_llama.bf16, "--like", adapter, "--to", "nf4", "--compute-dtype", "bfloat16")
    made = quantized(cli, tmp_path, *words)
    assert any("give the dtype with --projection-rounding" in note for note in made["notes"])


def test_inspect_and_projections_say_what_they_assume(
    adapter: Path, tiny_llama: tiny.TinyLlama, cli: Cli
) -> None:
    for command in ("inspect", "projections"):
        words = (command, adapter, "--base", tiny_llama.bf16)
        assert cli(*words).stdout.replace("\n", " ").count("assuming the adapter was trained on") == 1
        assert "assuming" not in cli(*words, "--trained-as", "bf16").stdout
        alone = cli(command, adapter, "--trained-as", "nf4")
        assert alone.exit_code == 2
        assert "give the base with --base" in alone.stderr
        wrong = cli(*words, "--trained-as", "nf4,dubble")
        assert (wrong.exit_code, "'dubble' says nothing" in wrong.stderr) == (2, True)


def test_several_adapters_are_assumed_of_once(
    tiny_llama: tiny.TinyLlama, adapter: Path, tmp_path: Path
) -> None:
    from vera_edge import merging as merge

    other = tmp_path / "other"
    tiny.make_adapter(tiny_llama.fp32, other, vectors_seed=6)
    ready = merge.prepare(tiny_llama.fp32, [(adapter, 1.0), (other, 0.5)])
    assert ready.model.notes.count(ASSUMED) == 1


@pytest.mark.parametrize("told", [{"bnb_4bit_compute_dtype": "float64"}, {"llm_int8_skip_modules": ["a,b"]}])
def test_a_base_whose_config_has_no_words_for_it(
    told: dict[str, Any], adapter: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """It is read as before; only --trained-as has nothing that it could be called."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama.nf4, base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] |= told
    (base / "config.json").write_text(json.dumps(config))
    assert notes(adapter, base) == ()
    with pytest.raises(MismatchError, match="is quantized already, as nf4, and can't"):
        notes(adapter, base, "nf4,double")


def test_merges_of_many_adapters_say_what_is_assumed_once(
    adapter: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    tiny.make_adapter(tiny_llama.fp32, tmp_path / "other", vectors_seed=6)
    words = ("merge", tiny_llama.fp32, adapter, tmp_path / "other", "--each", "-o", tmp_path / "out")
    made = cli(*words, "--to", "fp32")
    assert made.exit_code == 0
    assert made.stdout.count("assuming the adapter was trained on") == 1
    planned = cli(*words, "--dry-run")
    assert planned.stderr.count("assuming the adapter was trained on") == 1


def test_a_worker_opens_the_base_as_it_was_loaded(
    adapter: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    import pickle

    from vera_edge import merging as merge
    from vera_edge.merging.work import MergeJob

    ready = merge.prepare(tiny_llama.fp32, [(adapter, 1.0)], trained_as=parse("fp4,dtype=bf16"))
    sent: MergeJob = pickle.loads(
        pickle.dumps(MergeJob("key", ready.plan, ready.model, {}, tmp_path, 1 << 30))
    )
    assert sent.model.checkpoint.layout_digest == ready.model.checkpoint.layout_digest
    assert dataclasses.replace(sent.model.checkpoint, path=tmp_path).trained_as == parse("fp4,dtype=bf16")
