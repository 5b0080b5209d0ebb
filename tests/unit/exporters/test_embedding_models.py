"""Embedding models out of decoders, and layers behind the pooling, against PEFT and torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import heads, tiny_encoder
from tests.conftest import Cli
from tests.families import FAMILIES, Family
from tests.heads import Trained
from vera_edge import merging as merge
from vera_edge.device.check.validate import validate
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.errors import BundleError
from vera_edge.exporting import golden_vectors, target
from vera_edge.measuring.assess import DriftRequest, assess_any

TEXTS = list(tiny_encoder.TEXTS)
_QWEN = {**FAMILIES["qwen3"].config, "vocab_size": 160}
_LAST = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}


def _truth(model: Any, base: Path, padding_side: str = "right") -> Any:
    """PEFT's hidden states of TEXTS, at each text's last token."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side=padding_side)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        hidden = model(**inputs)[0]
    mask = inputs["attention_mask"]
    ends = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(TEXTS)), ends]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path, Path]:
    """A base as Qwen3-Embedding is: saved without a head, and with a class that has one."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    root = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(3)
    Qwen3Model(Qwen3Config(**{**_QWEN, "tie_word_embeddings": True})).save_pretrained(root / "base")
    config = json.loads((root / "base" / "config.json").read_text())
    (root / "base" / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    tiny_encoder.save_tokenizer(root / "base")
    tiny_encoder.pooled(root / "base", _LAST, normalize=True)
    trained = Trained("Qwen3Model", "AutoModel", "FEATURE_EXTRACTION", ("q_proj", "down_proj"), _QWEN)
    trained.train(root / "base").save_pretrained(root / "adapter")
    return trained, root / "base", root / "adapter"


def _close(found: Any, truth: Any) -> None:
    np.testing.assert_allclose(found, truth.numpy(), atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_a_decoder_with_last_token_pooling_gives_embeddings(
    qwen: tuple[Trained, Path, Path], tmp_path: Path, mode: str
) -> None:
    import torch

    trained, base, adapter = qwen
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out", mode=mode)
    assert "Qwen3Model for feature-extraction" in made.notes
    encoder = Encoder.open(made.folder)
    assert encoder.pooling.ways == ("lasttoken",) and encoder.graph.outputs.keys() == {"last_hidden_state"}
    found = encoder.embed(TEXTS)
    for side in ("right", "left"):
        _close(found, torch.nn.functional.normalize(_truth(trained.train(base), base, side)))
    _close(encoder.embed(TEXTS, batch=1), torch.from_numpy(found))
    if mode == "branch":
        encoder.swap(None)
        with (model := trained.train(base)).disable_adapter():
            _close(encoder.embed(TEXTS), torch.nn.functional.normalize(_truth(model, base)))


@pytest.mark.parametrize("headed", [False, True])
def test_one_trained_under_a_head_for_words_gives_embeddings_too(
    qwen: tuple[Trained, Path, Path], tmp_path: Path, headed: bool, cli: Cli
) -> None:
    """modules.json says what the model is for; the adapter's layers are the same under either class.

    headed: the base has the head in its folder, and "model." before its layers' names.
    """
    import torch

    _, base, _ = qwen
    if headed:
        base, _ = Trained("Qwen3ForCausalLM", "AutoModel", None, ("q_proj",), _QWEN).make(tmp_path)
        tiny_encoder.pooled(base, _LAST, normalize=True)
        shutil.rmtree(tmp_path / "adapter")
    trained = Trained("Qwen3Model", "AutoModelForCausalLM", "CAUSAL_LM", ("q_proj", "down_proj"), _QWEN)
    trained.train(base).save_pretrained(tmp_path / "adapter")
    made = target.export(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    model = trained.train(base).get_base_model().model
    _close(Encoder.open(made.folder).embed(TEXTS), torch.nn.functional.normalize(_truth(model, base)))
    report = assess_any(DriftRequest(tmp_path / "adapter", made.folder, base=base)).to_dict()
    assert report["embeddings"]["cosine"]["value"] > 1 - 1e-6
    assert report["effect"]["cosine"]["value"] < 1 - 1e-3
    printed = json.loads(cli("run", made.folder, TEXTS[0]).stdout)["embedding"]
    np.testing.assert_allclose(printed, Encoder.open(made.folder).embed(TEXTS[:1])[0], atol=1e-5)
    merge.to_folder(base, [(tmp_path / "adapter", 1.0)], tmp_path / "m", to="fp32")
    found = heads.Trained("Qwen3Model", "AutoModel", None, (), _QWEN).loaded(tmp_path / "m", heads.feeds())
    with torch.no_grad():
        truth = model(**{key: torch.from_numpy(value) for key, value in heads.feeds().items()})[0]
    there = heads.feeds()["attention_mask"].astype(bool)
    _close(found[0][there], truth[torch.from_numpy(there)])


def test_a_decoder_for_words_stays_one(tmp_path: Path) -> None:
    from vera_edge.trained import model as trained_base

    trained = Trained("LlamaForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM", ("q_proj",), heads._LLAMA)
    base, adapter = trained.make(tmp_path)
    checkpoint, _ = trained_base.read(base, [(adapter, 1.0)])
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]


def test_modules_that_pool_nothing_are_no_embedding_model(tmp_path: Path) -> None:
    """A reranker's modules.json, say, whose model answers in words."""
    from vera_edge.trained import model as trained_base

    trained = Trained("LlamaForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM", ("q_proj",), heads._LLAMA)
    base, adapter = trained.make(tmp_path)
    kinds = [("Transformer", ""), ("LogitScore", "1_LogitScore")]
    (base / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.{kind}", "path": path} for kind, path in kinds])
    )
    checkpoint, _ = trained_base.read(base, [(adapter, 1.0)])
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]


def test_golden_vectors_of_an_embedding_decoder_and_of_a_decoders_classes(
    qwen: tuple[Trained, Path, Path], tmp_path: Path
) -> None:
    _, base, adapter = qwen
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    golden_vectors.ask(made.folder, base, [(adapter, 1.0)], {"min_cosine": 0.9999}, TEXTS)
    assert validate(made.folder).passed
    base, adapter = heads.DECODERS["qwen2 classes"].make(tmp_path / "classes")
    made = target.export(base, [(adapter, 1.0)], tmp_path / "classes" / "out", mode="branch")
    golden_vectors.ask(made.folder, base, [(adapter, 1.0)], {"max_kl": 1e-6}, TEXTS)
    assert validate(made.folder).passed


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path, Path]:
    return tiny_encoder.EMBEDDINGS, *tiny_encoder.make(
        tiny_encoder.EMBEDDINGS, tmp_path_factory.mktemp("bert")
    )


def _behind(folder: Path, *modules: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    """Append modules of sentence-transformers: kind, config and tensors of each."""
    from safetensors.torch import save_file

    path = folder / "modules.json"
    entries = json.loads(path.read_text())
    for kind, config, tensors in modules:
        number = len(entries)
        name = f"{number}_{kind}"
        entries.append(
            {"idx": number, "name": str(number), "path": name, "type": f"sentence_transformers.{kind}"}
        )
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        if tensors:
            save_file(tensors, folder / name / "model.safetensors")
    path.write_text(json.dumps(entries))


def _dense(inside: int, out: int, activation: str = "activation.Tanh", bias: bool = True) -> Any:
    import torch

    torch.manual_seed(inside + out)
    layer = torch.nn.Linear(inside, out, bias=bias)
    config = {
        "in_features": inside,
        "out_features": out,
        "bias": bias,
        "activation_function": f"torch.nn.modules.{activation}",
    }
    tensors = {f"linear.{name}": value.detach() for name, value in layer.named_parameters()}
    return layer, ("Dense", config, tensors)


@pytest.mark.parametrize(
    "activation",
    ["activation.Tanh", "linear.Identity", "activation.ReLU", "activation.GELU", "activation.SiLU"],
)
def test_layers_behind_the_pooling_are_run_as_in_torch(
    bert: tuple[Family, Path, Path], tmp_path: Path, activation: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    family, base, adapter = bert
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tiny_encoder.pooled(folder, {"pooling_mode": ["cls", "mean"]}, normalize=False)
    first, one = _dense(64, 48, activation)
    second, two = _dense(48, 20, "linear.Identity", bias=False)
    norm = torch.nn.LayerNorm(20)
    torch.nn.init.normal_(norm.weight)
    tensors = {f"norm.{name}": value.detach() for name, value in norm.named_parameters()}
    _behind(folder, one, ("Normalize", {}, {}), ("Dropout", {"dropout": 0.5}, {}), two)
    _behind(folder, ("LayerNorm", {"dimension": 20}, tensors), ("Normalize", {}, {}))
    made = target.export(folder, [(adapter, 1.0)], tmp_path / "out")
    inputs = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    model = PeftModel.from_pretrained(family.load(base), adapter).eval()
    act = getattr(torch.nn, activation.rpartition(".")[2])()
    with torch.no_grad():
        hidden = model(**inputs)[0]
        mask = inputs["attention_mask"][..., None].float()
        pooled = torch.cat([hidden[:, 0], (hidden * mask).sum(1) / mask.sum(1)], 1)
        found = torch.nn.functional.normalize(act(first(pooled)))
        truth = torch.nn.functional.normalize(norm(second(found)))
    _close(Encoder.open(made.folder).embed(TEXTS), truth)
    merge.to_folder(folder, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    report = assess_any(DriftRequest(adapter, tmp_path / "m", base=folder)).to_dict()
    assert report["embeddings"]["cosine"]["value"] > 1 - 1e-6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "CNN"}, "asks for the module 'CNN'"),
        ({"activation_function": "my.Activation"}, r"knows no activation 'my\.Activation'"),
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, "knows no activation"),
        ({"in_features": 33}, "takes embeddings of 33 values, and gets 32"),
        ({"out_features": 9}, "and its config.json asks for"),
        ({"use_residual": True}, "with use_residual True"),
        ({"module_input_name": "token_embeddings"}, "works on 'token_embeddings'"),
        ({"weights": "pytorch_model.bin"}, "as a pickle"),
    ],
)
def test_what_the_device_cannot_run_is_refused_at_export(
    bert: tuple[Family, Path, Path], tmp_path: Path, change: dict[str, Any], says: str, cli: Cli
) -> None:
    _, base, adapter = bert
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tiny_encoder.pooled(folder, {"pooling_mode": "mean"}, normalize=False)
    _, (kind, config, tensors) = _dense(32, 20)
    kind, weights = change.pop("kind", kind), change.pop("weights", None)
    _behind(folder, (kind, config | change, tensors))
    if weights:
        where = folder / "2_Dense"
        (where / "model.safetensors").rename(where / weights)
    result = cli("export", folder, adapter, "-o", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    import re

    assert re.search(says, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_default_prompt_is_put_before_every_text(bert: tuple[Family, Path, Path], tmp_path: Path) -> None:
    _, base, adapter = bert
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tiny_encoder.pooled(folder, {"pooling_mode": "mean"}, normalize=False)
    settings = {"prompts": {"query": "the base layer ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    made = target.export(folder, [(adapter, 1.0)], tmp_path / "out")
    encoder = Encoder.open(made.folder)
    plain = target.export(base, [(adapter, 1.0)], tmp_path / "plain")
    expected = Encoder.open(plain.folder).embed(["the base layer " + text for text in TEXTS])
    np.testing.assert_allclose(encoder.embed(TEXTS), expected, atol=1e-6)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode": "mean", "include_prompt": False})
    )
    with pytest.raises(BundleError, match="leaves a prompt out of the pooling"):
        target.export(folder, [(adapter, 1.0)], tmp_path / "no")
