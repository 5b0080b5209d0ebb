"""A float base taken as it was loaded in training, tensor by tensor against transformers and bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny, tiny_encoder
from tests.families import FAMILIES, Family
from tests.loaded_bases import OPTIONS, assert_same, plain, rewrite, tensors_of, written
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs, parse
from vera_edge.errors import CheckpointError, MismatchError, PlanError
from vera_edge.storage.tensors import RawTensor, float32_to_bf16

ODD = Family(
    "GPT2LMHeadModel",
    (),
    {"vocab_size": 96, "n_embd": 15, "n_inner": 7, "n_layer": 1, "n_head": 3, "n_positions": 64},
)
MORE: Mapping[str, Family] = {
    "odd": ODD,
    "bert-classes": tiny_encoder.classifier(),
    "bert-embeddings": tiny_encoder.EMBEDDINGS,
    "llama-classes": Family("LlamaForSequenceClassification", ()),
    "mixtral": Family("MixtralForCausalLM", (), {**FAMILIES["llama"].config, "num_local_experts": 4}),
}


@pytest.fixture(scope="module")
def torch_on_one_thread() -> Any:
    """bitsandbytes' mean of all absmax depends on the number of threads, for large layers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_on_one_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("words", OPTIONS)
def test_every_option_gives_the_bytes_of_transformers(
    words: str, dtype: str, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """From float32 weights, so that a dtype other than that rounds them first."""
    theirs = written(tiny_llama.fp32, tmp_path / "theirs", dtype, **OPTIONS[words])
    ours = Checkpoint.open(tiny_llama.fp32, parse(f"{words},dtype={dtype}"))
    assert_same(ours.tensors, theirs.tensors)
    assert ours.config["quantization_config"] == theirs.config["quantization_config"]
    assert ours.config["dtype"] == theirs.config["dtype"] == dtype


@pytest.mark.usefixtures("torch_on_one_thread")
@pytest.mark.parametrize("source", ["bf16", "fp16"])
@pytest.mark.parametrize("words", ["nf4,double", "fp4", "int8"])
def test_the_dtype_is_the_base_s_own_where_none_is_given(
    words: str, source: str, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    folder = getattr(tiny_llama, source)
    theirs = written(
        folder,
        tmp_path,
        {"bf16": "bfloat16", "fp16": "float16"}[source],
        **OPTIONS[words] if words in OPTIONS else tiny.four_bit("nf4"),
    )
    assert_same(Checkpoint.open(folder, parse(words)).tensors, theirs.tensors)


@pytest.mark.parametrize("words", ["nf4", "int8", "bf16", "fp16"])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_every_family(name: str, words: str, tmp_path: Path) -> None:
    {**FAMILIES, **MORE}[name].make().save_pretrained(tmp_path / "base")
    dtype = "bfloat16" if words == "bf16" else "float16"
    theirs = written(tmp_path / "base", tmp_path / "theirs", dtype, **OPTIONS.get(words, {}))
    spec = parse(words if words in ("bf16", "fp16") else f"{words},dtype=fp16")
    ours = Checkpoint.open(tmp_path / "base", spec)
    assert_same(ours.tensors, theirs.tensors)
    for module, linear in theirs.linears.items():
        assert ours.linears[module] == linear
        np.testing.assert_array_equal(ours.dequantize(module), theirs.dequantize(module))


def test_names_of_a_hub_are_kept_and_masks_are_no_layers(tiny_gpt2: Path, tmp_path: Path) -> None:
    """GPT-2 lies on the hub without the name of its only part, and with the masks of its attention."""
    import torch

    short = {name.removeprefix("transformer."): value for name, value in tensors_of(tiny_gpt2).items()}
    masks = {"h.0.attn.bias": torch.tril(torch.ones(64, 64, dtype=torch.uint8))[None, None]}
    base = rewrite(tiny_gpt2, tmp_path / "hub", short | masks)
    theirs = written(base, tmp_path / "theirs", "bfloat16", **OPTIONS["nf4"]).tensors
    ours = Checkpoint.open(base, parse("nf4,dtype=bf16")).tensors
    assert ours.read("h.0.attn.bias").dtype == "U8"
    for name in theirs:
        own = name.removeprefix("transformer.")
        assert plain(ours.read(own), own) == plain(theirs.read(name), name)


def test_a_head_that_is_tied_and_stored_all_the_same_stays_in_floats(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    tensors = tensors_of(tiny_llama.bf16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    base = rewrite(tiny_llama.bf16, tmp_path / "base", tensors)
    theirs = written(base, tmp_path / "theirs", "bfloat16", **OPTIONS["nf4"])
    assert_same(Checkpoint.open(base, parse("nf4")).tensors, theirs.tensors)
    assert theirs.linears["lm_head"].format == "bf16"


@pytest.mark.parametrize("words", ["nf4", "nf4,skip=classifier"])
def test_a_classifier_trained_on_a_language_model(words: str, tmp_path: Path) -> None:
    """config.json names the class of the language model; its pooler is quantized in the classifier."""
    import transformers

    config = transformers.BertConfig(**tiny_encoder.EMBEDDINGS.config)
    whole = transformers.BertForPreTraining(config)
    whole.save_pretrained(tmp_path / "base")
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(told | {"architectures": ["BertForMaskedLM"]}))
    skip = {"llm_int8_skip_modules": ["classifier"]} if "skip" in words else {}
    settings = {**OPTIONS["nf4"], **skip}
    theirs = written(
        tmp_path / "base", tmp_path / "theirs", "bfloat16", "BertForSequenceClassification", **settings
    )
    ours = Checkpoint.open(tmp_path / "base", parse(f"{words},dtype=bf16"))
    both = [name for name in theirs.tensors if not name.startswith("classifier.")]
    assert "bert.pooler.dense.weight.absmax" in both
    for name in both:
        assert plain(ours.tensors.read(name), name) == plain(theirs.tensors.read(name), name), name
    assert ours.linears["cls.seq_relationship"].format == "bf16"  # of neither class


def test_values_at_the_bounds_between_levels(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """Half of what bfloat16 holds lies on a bound of FP4's, where a code too high is as near."""
    import torch

    tensors = tensors_of(tiny_llama.bf16)
    halves = torch.arange(-32, 33).to(torch.bfloat16) / 32
    for name, value in tensors.items():
        if name.endswith("_proj.weight"):
            drawn = torch.randint(0, 65, value.shape, generator=torch.Generator().manual_seed(len(name)))
            tensors[name] = halves[drawn] * 0.75
    base = rewrite(tiny_llama.bf16, tmp_path / "base", tensors)
    for words in ("fp4", "nf4", "int8"):
        theirs = written(base, tmp_path / words, "bfloat16", **OPTIONS[words])
        assert_same(Checkpoint.open(base, parse(words)).tensors, theirs.tensors)


def test_a_family_whose_linears_are_of_another_class_is_not_quantized(tmp_path: Path) -> None:
    """transformers replaces nn.Linear itself only; it says in a log that it replaced nothing."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    Family("FalconForCausalLM", (), sizes).make().save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"quantizes no layer of .*save_pretrained there"):
        Checkpoint.open(tmp_path / "base", parse("nf4"))


def test_gguf_was_loaded_in_floats_if_at_all(tmp_path: Path) -> None:
    from tests.unit.formats.test_gguf import _write

    base = _write(tmp_path / "model.gguf", "llama", "F32")
    with pytest.raises(CheckpointError, match=r"is GGUF, which transformers doesn't quantize on loading"):
        Checkpoint.open(base, parse("nf4"))
    ours, plainly = Checkpoint.open(base, parse("bf16")), Checkpoint.open(base)
    for module in plainly.linears:
        assert ours.linears[module].format == "bf16"
        rounded = RawTensor.of(float32_to_bf16(plainly.dequantize(module)), "BF16").float32()
        np.testing.assert_array_equal(ours.dequantize(module), rounded)


def test_float_is_the_folder_as_it_lies(tiny_llama: tiny.TinyLlama) -> None:
    ours, plainly = Checkpoint.open(tiny_llama.bf16, parse("float")), Checkpoint.open(tiny_llama.bf16)
    assert (ours.digest, ours.layout_digest) == (plainly.digest, plainly.layout_digest)
    assert ours.trained_as == TrainedAs("float")


@pytest.mark.parametrize("spoil", ["nan", "inf", "large"])
def test_values_that_nothing_was_trained_on_are_refused(
    spoil: str, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    tensors = tensors_of(tiny_llama.fp32)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = {"nan": float("nan"), "inf": float("inf"), "large": 7e4}[spoil]
    base = rewrite(tiny_llama.fp32, tmp_path / "base", tensors)
    words = "int8" if spoil == "large" else "nf4"
    message = "beyond the largest of float16" if spoil == "large" else "holds NaN or infinite values"
    with pytest.raises(CheckpointError, match=rf"{name} in .* {message}"):
        _ = Checkpoint.open(base, parse(words)).digest


def test_what_cannot_be_is_refused(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no linear layer of .* is called mlp.gate_up or lies in it.*q_proj"):
        Checkpoint.open(tiny_llama.fp32, parse("nf4,skip=mlp.gate_up"))
    with pytest.raises(PlanError, match=r"no linear layer of .* is called \(_proj"):
        Checkpoint.open(tiny_llama.fp32, parse("nf4,skip=(_proj"))
    config = json.loads((tiny_llama.fp32 / "config.json").read_text())
    refused: list[tuple[dict[str, Any], str]] = [
        ({"architectures": ["OwnForCausalLM"]}, "no model class 'OwnForCausalLM'.*save_pretrained"),
        ({"architectures": None}, "no model class None"),
        ({"dtype": "float64"}, "loaded as float64.*say what it was loaded as with dtype="),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\..*weight, which its config.json asks for"),
        ({"num_attention_heads": "four"}, "describes no model of its type"),
    ]
    for number, (changed, message) in enumerate(refused):
        base = rewrite(tiny_llama.fp32, tmp_path / str(number), tensors_of(tiny_llama.fp32))
        (base / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(base, parse("nf4"))


@pytest.mark.parametrize(
    ("base", "same", "others"),
    [
        ("nf4", "nf4,double", ["nf4", "fp4,double", "int8", "float", "nf4,double,compute=bf16"]),
        ("fp4", "fp4,dtype=fp32", ["nf4", "fp4,dtype=bf16", "fp4,skip=lm_head", "fp4,storage=bf16"]),
        ("int8", "int8", ["fp4", "bf16", "int8,dtype=bf16"]),
    ],
)
def test_a_quantized_base_may_only_be_called_what_it_is(
    base: str, same: str, others: list[str], tiny_llama: tiny.TinyLlama
) -> None:
    folder = getattr(tiny_llama, base)
    assert Checkpoint.open(folder, parse(same)).digest == Checkpoint.open(folder).digest
    for words in others:
        with pytest.raises(MismatchError, match=rf"is quantized already, as {base}.*leave --trained-as out"):
            Checkpoint.open(folder, parse(words))
