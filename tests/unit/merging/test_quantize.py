"""`vera-edge quantize`: the folder that transformers would have written, had anybody saved it."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests import tiny
from tests.conftest import Cli
from tests.families import FAMILIES
from tests.loaded_bases import OPTIONS, assert_same, rewrite, tensors_of, written
from vera_edge.base.checkpoint import MERGE_RECORD, Checkpoint
from vera_edge.base.trained_as import parse
from vera_edge.errors import CheckpointError, OutputError
from vera_edge.merging import quantize
from vera_edge.storage.shards import Shards

FLAGS = {
    "fp4": ("--to", "fp4"),
    "nf4": ("--to", "nf4"),
    "nf4,double,compute=bf16": ("--to", "nf4", "--double-quant", "--compute-dtype", "bfloat16"),
    "nf4,storage=bf16": ("--to", "nf4", "--quant-storage", "bfloat16"),
    "int8": ("--to", "int8"),
    "int8,skip=down_proj,skip=lm_head": ("--to", "int8", "--skip", "down_proj", "--skip", "lm_head"),
}


@pytest.mark.parametrize("words", FLAGS)
def test_the_folder_is_the_one_that_transformers_writes(
    words: str, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    """Byte by byte, and transformers finds in it what it had when it quantized on loading."""
    import torch

    theirs = written(tiny_llama.bf16, tmp_path / "theirs", "bfloat16", **OPTIONS[words])
    result = cli("quantize", tiny_llama.bf16, "-o", tmp_path / "ours", *FLAGS[words], "--json")
    assert result.exit_code == 0, result.stderr
    assert_same(Checkpoint.open(tmp_path / "ours").tensors, theirs.tensors)
    loaded = [tiny.load(tmp_path / name, dtype=torch.bfloat16).state_dict() for name in ("ours", "theirs")]
    assert loaded[0].keys() == loaded[1].keys()
    for name, tensor in loaded[0].items():
        if "quant_state" not in name:  # as bytes: those of 4 bits under bfloat16 may read as NaN
            both = [one.reshape(-1).view(torch.uint8) for one in (tensor, loaded[1][name])]
            assert torch.equal(*both), name
    told = json.loads(result.stdout)
    assert told["trained_as"] == str(parse(words))
    assert told["layers"] == sum(linear.format != "bf16" for linear in theirs.linears.values())


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "phi3"])
def test_transformers_loads_other_families_too(name: str, tmp_path: Path) -> None:
    import torch

    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path / "base")
    written(tmp_path / "base", tmp_path / "theirs", "float32", **OPTIONS["nf4"])
    quantize.to_folder(tmp_path / "base", tmp_path / "ours", quantize.Asked("nf4"))
    ours, theirs = (family.load(tmp_path / folder).state_dict() for folder in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "words", ["nf4,double,compute=bf16", "fp4", "int8", "nf4,dtype=fp16", "fp4,skip=v_proj"]
)
@pytest.mark.parametrize("source", ["fp32", "sharded", "bf16"])
def test_trained_as_is_that_folder_in_every_respect(
    words: str, source: str, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    base, spec = getattr(tiny_llama, source), parse(words)
    asked = quantize.Asked(
        spec.format, spec.dtype, spec.double_quant, spec.compute_dtype, spec.storage, spec.skip
    )
    made = quantize.to_folder(base, tmp_path / "base", asked)
    ours, folder = Checkpoint.open(base, spec), Checkpoint.open(tmp_path / "base")
    assert ours.digest == folder.digest == made.digest
    assert ours.layout_digest == folder.layout_digest
    assert ours.config == folder.config
    assert list(ours.tensors) == list(folder.tensors)
    assert list(ours.linears.items()) == list(folder.linears.items())
    assert ours.other_names == folder.other_names
    assert ours.quantized and folder.quantized


def test_side_files_come_along_and_nothing_else(tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama.bf16, base)
    (base / "modeling_own.py").write_text("raise SystemExit")
    (base / MERGE_RECORD).write_text(json.dumps({"report": {"adapters": [{"digest": "abc"}]}}))
    config = json.loads((base / "config.json").read_text())
    local = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "rope_theta": float("inf")}
    (base / "config.json").write_text(json.dumps(config | local))
    assert cli("quantize", base, "-o", tmp_path / "out", "--to", "nf4").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        MERGE_RECORD,
    }
    made = Checkpoint.open(tmp_path / "out")
    assert made.merged == {"abc"}
    assert "auto_map" not in made.config
    assert made.layout_digest == Checkpoint.open(base, parse("nf4")).layout_digest


def test_a_large_model_is_written_in_shards(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit lowered, as five gigabytes take long to make."""
    original = Shards.__init__
    monkeypatch.setattr(
        Shards, "__init__", lambda self, folder, layout: original(self, folder, layout, 30_000)
    )
    made = quantize.to_folder(tiny_llama.sharded, tmp_path / "out", quantize.Asked("nf4"))
    folder, ours = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tiny_llama.sharded, parse("nf4"))
    assert len(folder.tensors.files) > 2
    assert (folder.digest, folder.layout_digest) == (made.digest, ours.layout_digest)
    assert list(ours.tensors) == list(folder.tensors)
    tiny.load(tmp_path / "out")


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of 40 layers of 2 MB each, with room for the pieces that a layer is worked on in."""
    import torch

    shape = (2048, 256)
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 4}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, **sizes}
    tensors = {
        f"model.layers.{layer}.mlp.{name}_proj.weight": torch.randn(
            *(shape[::-1] if name == "down" else shape)
        )
        for layer in range(14)
        for name in ("gate", "up", "down")
    }
    for layer in range(14):
        for name in "qkvo":
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = torch.randn(256, 256)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    quantize.to_folder(tmp_path / "base", tmp_path / "first", quantize.Asked("nf4"))  # imports what it needs
    tracemalloc.start()
    quantize.to_folder(tmp_path / "base", tmp_path / "out", quantize.Asked("nf4", double_quant=True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6 < (tmp_path / "base" / "model.safetensors").stat().st_size / 4


def test_what_is_said_of_a_head_that_is_quantized_too(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    tensors = tensors_of(tiny_llama.fp32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    base = rewrite(tiny_llama.fp32, tmp_path / "base", tensors)
    result = cli("quantize", base, "-o", tmp_path / "out", "--to", "nf4", "--skip", "v_proj")
    assert result.exit_code == 0
    assert "lm_head is quantized too" in result.stdout
    assert Checkpoint.open(tmp_path / "out").linears["lm_head"].format == "nf4"
    theirs = written(base, tmp_path / "theirs", "float32", **OPTIONS["nf4"], llm_int8_skip_modules=["v_proj"])
    assert_same(Checkpoint.open(tmp_path / "out").tensors, theirs.tensors)


def test_bad_input_is_one_sentence_and_writes_nothing(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    base = tiny_llama.bf16
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((base, "-o", out), "nothing says what the base was quantized to: give --to nf4, fp4"),
        ((tiny_llama.nf4, "-o", out, "--to", "fp4"), "is quantized already, as nf4,double,dtype=float32"),
        ((tiny_llama.nf4, "-o", out, "--to", "nf4"), "is quantized already"),
        ((base, "-o", out, "--to", "int8", "--double-quant"), "double belongs to nf4 and fp4"),
        ((base, "-o", out, "--to", "nf4", "--skip", "gate"), "no linear layer of"),
        ((base, "-o", taken, "--to", "nf4"), "exists and isn't empty"),
        ((base, "-o", base, "--to", "nf4", "--force"), "would delete"),
        ((tmp_path / "nothing", "-o", out, "--to", "nf4"), "isn't a folder"),
        ((base, "-o", out, "--to", "nf4", "--like", tmp_path), "isn't a PEFT adapter"),
    ]
    for words, message in cases:
        result = cli("quantize", *words)
        assert result.exit_code == 2, words
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert (taken / "file").read_text() == "mine"
    assert cli("quantize", base, "-o", out, "--to", "q4").exit_code == 2


def test_a_full_disk_leaves_nothing(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"takes [\d,]+ bytes and the disk of .* has 1,000 left"):
        quantize.to_folder(tiny_llama.bf16, tmp_path / "out", quantize.Asked("nf4"))
    assert not any(tmp_path.iterdir())


def test_damage_met_in_the_middle_leaves_nothing(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    tensors = tensors_of(tiny_llama.fp32)
    tensors["model.norm.weight"][0] = float("nan")
    base = rewrite(tiny_llama.fp32, tmp_path / "base", tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in .* holds NaN"):
        quantize.to_folder(base, tmp_path / "out", quantize.Asked("nf4"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
