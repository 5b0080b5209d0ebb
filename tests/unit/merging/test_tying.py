"""Heads that config.json ties to the embedding, and that a checkpoint stores all the same.

The truth is PEFT's forward on what transformers loads. Loaders that tie whatever config.json says is tied
must get the same: where two values are stored, config.json says that nothing is tied.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import exported, tiny
from tests.families import FAMILIES, Family
from vera_edge import merging as merge
from vera_edge.adapters.reading import read
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.exporting import target
from vera_edge.reference.model import open_reference
from vera_edge.trained import alignment, provenance

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Tied:
    """A family whose head is tied. inner: targets of an adapter elsewhere; saved: the embedding's module."""

    family: Family
    head: str
    embedding: str
    inner: tuple[str, ...]

    @property
    def saved(self) -> str:
        return self.embedding.split(".")[-2]


_BERT = {**FAMILIES["bert"].config, "num_hidden_layers": 1}
KINDS = {
    "llama": Tied(
        Family(
            "LlamaForCausalLM", (), {**FAMILIES["llama"].config, "head_dim": 16, "tie_word_embeddings": True}
        ),
        "lm_head.weight",
        "model.embed_tokens.weight",
        ("q_proj", "down_proj"),
    ),
    "gpt2": Tied(
        replace(FAMILIES["gpt2"], targets=()), "lm_head.weight", "transformer.wte.weight", ("c_attn", "c_fc")
    ),
    "bert": Tied(
        Family("BertForMaskedLM", (), _BERT),
        "cls.predictions.decoder.weight",
        "bert.embeddings.word_embeddings.weight",
        ("query", "value"),
    ),
    "roberta": Tied(
        Family("RobertaForMaskedLM", (), {**_BERT, "pad_token_id": 1}),
        "lm_head.decoder.weight",
        "roberta.embeddings.word_embeddings.weight",
        ("query", "value"),
    ),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def stored_twice(kind: Tied, folder: Path, factor: float = 1.0) -> Path:
    """A base that stores its head although it is tied, `factor` times the embedding."""
    kind.family.make().save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    assert kind.head not in state
    save_file({**state, kind.head: state[kind.embedding] * factor}, folder / WEIGHTS, {"format": "pt"})
    return folder


def forward(kind: Tied, model: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model.eval()(**kind.family.inputs()).logits.numpy()
    return found


def peft(kind: Tied, base: Path, adapter: Path) -> np.ndarray[Any, Any]:
    from peft import PeftModel

    return forward(kind, PeftModel.from_pretrained(kind.family.load(base), adapter))


def adapted(kind: Tied, base: Path, folder: Path, *targets: str, **settings: Any) -> Path:
    family = replace(kind.family, targets=targets, adapter={**kind.family.adapter, **settings})
    return family.adapted(base, folder)


def drawn(adapter: Path, *names: str) -> Path:
    """Other values for modules that were saved whole."""
    state = load_file(adapter / "adapter_model.safetensors")
    draw = torch.Generator().manual_seed(4)
    for name, value in state.items():
        if any(f"{part}.weight" in name for part in names):
            state[name] = value + torch.randn(value.shape, generator=draw) * 0.3
    save_file(state, adapter / "adapter_model.safetensors", {"format": "pt"})
    return adapter


def values(folder: Path, kind: Tied) -> tuple[Any, Any]:
    state = load_file(folder / WEIGHTS)
    return state.get(kind.head), state[kind.embedding]


def is_tied(folder: Path) -> bool:
    """What config.json says, or the class where it says nothing."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("tie_word_embeddings", True) is not False


def check(kind: Tied, base: Path, adapter: Path, folder: Path, tied: bool) -> Path:
    """Merge, and hold the result to PEFT's forward and its config to `tied`."""
    expected = peft(kind, base, adapter)
    assert exported.error(forward(kind, kind.family.load(base)), expected) > 0.01, "the adapter must show"
    merge.to_folder(base, [(adapter, 1.0)], folder, "fp32")
    assert exported.error(forward(kind, kind.family.load(folder)), expected) < 1e-4
    assert is_tied(folder) is tied
    head, embedding = values(folder, kind)
    assert tied is (head is None or torch.equal(head, embedding))
    return folder


@KIND
def test_an_adapted_head_is_kept_apart(kind: str, tmp_path: Path) -> None:
    tied = KINDS[kind]
    base = stored_twice(tied, tmp_path / "base")
    target_name = tied.head.split(".")[-2] if kind in ("llama", "gpt2") else tied.head.removesuffix(".weight")
    settings = {"fan_in_fan_out": False} if kind == "gpt2" else {}
    adapter = adapted(tied, base, tmp_path / "adapter", target_name, **settings)
    check(tied, base, adapter, tmp_path / "m", tied=False)


@KIND
def test_a_head_that_nothing_touches_stays_tied(kind: str, tmp_path: Path) -> None:
    tied = KINDS[kind]
    base = stored_twice(tied, tmp_path / "base")
    adapter = adapted(tied, base, tmp_path / "adapter", *tied.inner)
    check(tied, base, adapter, tmp_path / "m", tied=True)


@KIND
def test_a_head_that_differs_in_the_base_is_kept_apart(kind: str, tmp_path: Path) -> None:
    """transformers loads both, and ties neither."""
    tied = KINDS[kind]
    base = stored_twice(tied, tmp_path / "base", factor=1.5)
    adapter = adapted(tied, base, tmp_path / "adapter", *tied.inner)
    check(tied, base, adapter, tmp_path / "m", tied=False)
    checkpoint = Checkpoint.open(base)
    aligned = alignment.align(read(adapter), checkpoint)
    auto_class = "AutoModelForCausalLM" if kind in ("llama", "gpt2") else "AutoModelForMaskedLM"
    projections = provenance.resolve(aligned, checkpoint).projections
    reference = open_reference(checkpoint, [(aligned, 1.0)], projections, auto_class)
    assert exported.error(forward(tied, reference.model), peft(tied, base, adapter)) < 1e-4


@KIND
@pytest.mark.parametrize("twice", [True, False], ids=["stored twice", "stored once"])
@pytest.mark.parametrize("which", ["embedding", "head", "both", "both alike"])
def test_trained_copies_of_either_or_both(kind: str, which: str, twice: bool, tmp_path: Path) -> None:
    tied = KINDS[kind]
    base = tmp_path / "base"
    if twice:
        stored_twice(tied, base)
    else:
        tied.family.make().save_pretrained(base)
    head = tied.head.removesuffix(".weight")
    names = {"embedding": [tied.saved], "head": [head]}.get(which, [tied.saved, head])
    adapter = adapted(tied, base, tmp_path / "adapter", *tied.inner, modules_to_save=names)
    drawn(adapter, *(name.split(".")[-1] for name in names))
    if which == "both alike":
        path = adapter / "adapter_model.safetensors"
        state = load_file(path)
        ours = [name for name in state if name.endswith((f"{tied.saved}.weight", tied.head))]
        assert len(ours) == 2
        save_file({**state, ours[0]: state[ours[1]].clone()}, path, {"format": "pt"})
    check(tied, base, adapter, tmp_path / "m", tied=which == "both alike")


def test_a_hubs_names_without_the_models_prefix(tmp_path: Path) -> None:
    tied = KINDS["gpt2"]
    base = stored_twice(tied, tmp_path / "base")
    state = {name.removeprefix("transformer."): value for name, value in load_file(base / WEIGHTS).items()}
    save_file(state, base / WEIGHTS, {"format": "pt"})
    bare = replace(tied, embedding="wte.weight")
    adapter = adapted(bare, base, tmp_path / "adapter", "lm_head", fan_in_fan_out=False)
    check(bare, base, adapter, tmp_path / "m", tied=False)
    elsewhere = adapted(bare, base, tmp_path / "elsewhere", *tied.inner, modules_to_save=["wte"])
    check(bare, base, drawn(elsewhere, "wte"), tmp_path / "m2", tied=False)


def test_a_config_that_unties_already_is_left_alone(tmp_path: Path) -> None:
    tied = KINDS["llama"]
    untied = replace(
        tied, family=replace(tied.family, config={**tied.family.config, "tie_word_embeddings": False})
    )
    untied.family.make().save_pretrained(tmp_path / "base")
    adapter = adapted(untied, tmp_path / "base", tmp_path / "adapter", "lm_head")
    check(untied, tmp_path / "base", adapter, tmp_path / "m", tied=False)


def test_t5s_flag_scales_too_and_stays(tmp_path: Path) -> None:
    """It says whether the decoder scales its outputs, too; transformers keeps apart what is stored twice."""
    family = FAMILIES["t5"]
    family.make().save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base" / WEIGHTS)
    state["lm_head.weight"] = state["shared.weight"].clone()
    save_file(state, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    before = json.loads((tmp_path / "base" / "config.json").read_text()).get("tie_word_embeddings")
    tied = Tied(family, "lm_head.weight", "shared.weight", ("q", "v"))
    adapter = adapted(tied, tmp_path / "base", tmp_path / "adapter", "lm_head")
    expected = peft(tied, tmp_path / "base", adapter)
    merge.to_folder(tmp_path / "base", [(adapter, 1.0)], tmp_path / "m", "fp32")
    assert exported.error(forward(tied, family.load(tmp_path / "m")), expected) < 1e-4
    assert json.loads((tmp_path / "m" / "config.json").read_text()).get("tie_word_embeddings") == before


@pytest.mark.parametrize("to", ["nf4", "int8", "bf16", "w4a16"])
def test_in_every_format_the_head_is_pefts(to: str, tmp_path: Path) -> None:
    tied = KINDS["llama"]
    base = stored_twice(tied, tmp_path / "base")
    adapter = adapted(tied, base, tmp_path / "adapter", "lm_head")
    options = {"group_size": 16} if to == "w4a16" else {}
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to, options)
    assert not is_tied(tmp_path / "m")
    written, exact = Checkpoint.open(tmp_path / "m"), tmp_path / "fp32"
    merge.to_folder(base, [(adapter, 1.0)], exact, "fp32")
    head = Checkpoint.open(exact).dequantize("lm_head")
    assert np.abs(written.dequantize("lm_head") - head).max() < 0.1 * np.abs(head).max()
    embedding = load_file(base / WEIGHTS)[tied.embedding].numpy()
    assert np.abs(written.float32(tied.embedding) - embedding).max() < 0.01 * np.abs(embedding).max()


@pytest.mark.parametrize("mode", ["merged", "branch"])
@pytest.mark.parametrize("what", ["adapted", "differs", "saved"])
def test_exports_compute_what_peft_does(what: str, mode: str, tmp_path: Path) -> None:
    tied = KINDS["llama"]
    config = {**tied.family.config, "vocab_size": 384}
    tied = replace(tied, family=replace(tied.family, config=config))
    base = stored_twice(tied, tmp_path / "base", 1.5 if what == "differs" else 1.0)
    tiny.save_tokenizer(base)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]} if what == "saved" else {}
    if what == "saved" and mode == "branch":
        return  # a side-branch carries no embedding, and says so
    names = ("lm_head", "q_proj") if what == "adapted" else tied.inner
    adapter = adapted(tied, base, tmp_path / "adapter", *names, **saved)
    if what == "saved":
        drawn(adapter, "embed_tokens", "lm_head")
    for weights in ("fp32", "int8"):
        out = tmp_path / weights
        target.export(base, [(adapter, 1.0)], out, mode=mode, weights=weights)
        ids = exported.tokens(24)
        vectors = out / "adapters" / "default.onnx_adapter" if mode == "branch" else None
        expected = exported.peft_logits(base, adapter, ids)
        assert exported.error(exported.logits(out, ids, vectors), expected) < (
            1e-4 if weights == "fp32" else 0.1
        )


def test_nothing_is_tied_in_the_models_within_it_either(tmp_path: Path) -> None:
    tied = KINDS["llama"]
    base = stored_twice(tied, tmp_path / "base")
    adapter = adapted(tied, base, tmp_path / "adapter", "lm_head")
    path = base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "speech_config": {"tie_word_embeddings": True, "layers": 2}}))
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", "fp32", projection_rounding="fp32")
    after = json.loads((tmp_path / "m" / "config.json").read_text())
    assert after["tie_word_embeddings"] is False
    assert after["speech_config"] == {"tie_word_embeddings": False, "layers": 2}


def test_a_model_that_transformers_doesnt_know_is_told_by_its_names(tmp_path: Path) -> None:
    tied = KINDS["llama"]
    base = stored_twice(tied, tmp_path / "base", factor=1.5)
    adapter = adapted(tied, base, tmp_path / "adapter", *tied.inner)
    path = base / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["StrangeForCausalLM"]}
    path.write_text(json.dumps(config))
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", "fp32", projection_rounding="fp32")
    assert not is_tied(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    state = load_file(base / WEIGHTS)
    save_file({**state, tied.head: state[tied.embedding].clone()}, base / WEIGHTS, {"format": "pt"})
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", "fp32", projection_rounding="fp32")
    assert is_tied(tmp_path / "m")
