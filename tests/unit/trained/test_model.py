"""Which model an adapter was trained on: class, head and vocabulary, against PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import exported, heads, tiny
from tests.conftest import Cli
from tests.families import FAMILIES
from tests.heads import DECODERS, ENCODERS, Trained
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.device.runtime.session import Session
from vera_edge.errors import MismatchError, TargetError
from vera_edge.exporting import target
from vera_edge.measuring.assess import DriftRequest, assess
from vera_edge.parallel import Engine
from vera_edge.trained import model as trained_base


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path, Path]:
    trained = ENCODERS["roberta classes"]
    return trained, *trained.make(tmp_path_factory.mktemp("roberta"))


def _change(adapter: Path, target_folder: Path, **config: Any) -> Path:
    """A copy of an adapter with another config."""
    folder = Path(shutil.copytree(adapter, target_folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def _drop(adapter: Path, target_folder: Path, *endings: str) -> Path:
    """A copy of an adapter without the tensors whose names end so."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(adapter, target_folder))
    path = folder / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.endswith(endings)}
    save_file(kept, path, {"format": "pt"})
    return folder


def test_a_base_of_the_class_that_was_trained_is_left_alone(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    checkpoint, ((adapter, weight),) = trained_base.read(tiny_llama.nf4, [(tiny_adapter, 0.5)])
    plain = Checkpoint.open(tiny_llama.nf4)
    assert weight == 0.5 and adapter.digest and checkpoint.notes == ()
    assert checkpoint.config == plain.config and checkpoint.tensors.keys() == plain.tensors.keys()
    assert checkpoint.layout_digest == plain.layout_digest and checkpoint.digest == plain.digest


def test_the_head_comes_from_the_adapter_and_the_digest_stays_the_folders(
    roberta: tuple[Trained, Path, Path],
) -> None:
    _, base, adapter = roberta
    checkpoint, _ = trained_base.read(base, [(adapter, 1.0)])
    assert checkpoint.config["architectures"] == ["RobertaForSequenceClassification"]
    assert "classifier.out_proj" in checkpoint.linears and "lm_head.dense" not in checkpoint.linears
    assert checkpoint.digest == Checkpoint.open(base).digest
    assert any(note.startswith("left out") and "lm_head.bias" in note for note in checkpoint.notes)


def test_a_class_without_a_place_for_what_was_trained_is_refused(
    roberta: tuple[Trained, Path, Path], tmp_path: Path, cli: Cli
) -> None:
    _, base, adapter = roberta
    plain = _change(adapter, tmp_path / "adapter", task_type=None, auto_mapping=None)
    for words in (("export", base, plain), ("merge", base, plain, "--to", "fp32")):
        result = cli(*words, "-o", tmp_path / "out")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert "classifier.dense.bias, which a RobertaForMaskedLM has no place for" in result.stderr
        assert not (tmp_path / "out").exists()


def test_a_head_that_was_not_saved_is_refused(roberta: tuple[Trained, Path, Path], tmp_path: Path) -> None:
    _, base, adapter = roberta
    for endings, name in (((".out_proj.bias",), "out_proj.bias"), (("dense.weight",), "dense.weight")):
        without = _drop(adapter, tmp_path / name, *endings)
        with pytest.raises(MismatchError, match=rf"neither it nor .* holds classifier\.{name}") as caught:
            trained_base.read(base, [(without, 1.0)])
        assert "\n" not in str(caught.value) and "modules_to_save" in str(caught.value)


def test_a_pooler_that_was_made_up_is_refused_where_the_head_reads_it(tmp_path: Path) -> None:
    """A BERT of a masked language model has none, and PEFT doesn't save the one that training began with."""
    trained = Trained(
        "BertForMaskedLM", "AutoModelForSequenceClassification", "SEQ_CLS", ("query",), heads._BERT, 3
    )
    base, adapter = trained.make(tmp_path)
    with pytest.raises(MismatchError, match=r"bert\.pooler\.dense\.weight, which was made up"):
        trained_base.read(base, [(adapter, 1.0)])
    whole = Trained(**{**vars(trained), "peft": {"modules_to_save": ["pooler"]}})
    base, adapter = whole.make(tmp_path / "whole")
    report = merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    feeds = heads.feeds()
    truth = whole.truth(base, adapter, feeds)
    np.testing.assert_allclose(whole.loaded(report.folder, feeds)[0], truth[0], atol=1e-5)


@pytest.mark.parametrize("labels", [1, 5])
def test_a_head_of_another_number_of_labels_is_taken(tmp_path: Path, labels: int) -> None:
    """PEFT with ignore_mismatched_sizes, on a base that is a classifier already."""
    base_trained = ENCODERS["distilbert classes"]
    sizes = {**base_trained.config, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    trained = Trained(
        "DistilBertForSequenceClassification", base_trained.auto, "SEQ_CLS", ("q_lin",), sizes, labels
    )

    class Loose(Trained):
        def train(self, base: Path, **options: Any) -> Any:
            return super().train(base, ignore_mismatched_sizes=True, **options)

    loose = Loose(**vars(trained))
    base, adapter = loose.make(tmp_path)
    feeds = heads.feeds()
    truth = loose.truth(base, adapter, feeds)
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert any(f"the head has {labels} labels" in note for note in made.notes)
    found = exported.session(made.folder).run(["logits"], feeds)[0]
    assert found.shape == (3, labels) and exported.error(found, truth[0]) < 1e-5
    report = merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    assert exported.error(loose.loaded(report.folder, feeds)[0], truth[0]) < 1e-5
    assert len(json.loads((report.folder / "config.json").read_text())["id2label"]) == labels


def test_the_names_of_as_many_labels_stay(tmp_path: Path) -> None:
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    one = ENCODERS["distilbert classes"]
    trained = Trained(
        "DistilBertForSequenceClassification", one.auto, "SEQ_CLS", ("q_lin",), {**one.config, **names}, None
    )
    base, adapter = trained.make(tmp_path)
    checkpoint, _ = trained_base.read(base, [(adapter, 1.0)])
    assert checkpoint.config["id2label"] == {"0": "no", "1": "yes"} and checkpoint.notes == ()


def test_two_adapters_of_two_classes_are_refused(roberta: tuple[Trained, Path, Path], tmp_path: Path) -> None:
    _, base, adapter = roberta
    tags = ENCODERS["roberta tags"].make(tmp_path)[1]
    with pytest.raises(MismatchError, match=r"SequenceClassification and .* a \w+TokenClassification") as one:
        trained_base.read(base, [(adapter, 1.0), (tags, 1.0)])
    assert "\n" not in str(one.value)


def test_a_task_that_transformers_has_no_class_for_is_refused(tmp_path: Path) -> None:
    trained = ENCODERS["roberta classes"]
    base, adapter = trained.make(tmp_path)
    config = json.loads((base / "config.json").read_text())
    other = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
    (base / "config.json").write_text(json.dumps(config | other))
    with pytest.raises(MismatchError, match="has no AutoModelForSequenceClassification for model type 'clip"):
        trained_base.read(base, [(adapter, 1.0)])


def test_the_padding_token_is_the_tokenizers_where_config_json_names_none(tmp_path: Path) -> None:
    one = DECODERS["llama reward"]
    config = {**one.config, "pad_token_id": None}
    trained = Trained(**{**vars(one), "config": config})
    base, adapter = trained.make(tmp_path)
    checkpoint, _ = trained_base.read(base, [(adapter, 1.0)])
    assert checkpoint.config["pad_token_id"] == 0  # [PAD]
    assert any("padding token" in note for note in checkpoint.notes)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TargetError, match=r"by its padding token, and neither config\.json") as said:
        target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert "\n" not in str(said.value) and not (tmp_path / "out").exists()


def _llama(folder: Path, tied: bool) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=384,
        initializer_range=0.15,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **sizes,
    )
    return tiny.save(LlamaForCausalLM(config), folder)


def _resized(base: Path, folder: Path, size: int, whole: Sequence[str] | None, **options: Any) -> Any:
    """A PEFT model on `base` whose vocabulary was resized, saved to `folder`."""
    import torch
    from peft import VeraConfig, get_peft_model

    model = tiny.load(base)
    model.resize_token_embeddings(size, mean_resizing=False, **options)
    settings = VeraConfig(
        r=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        save_projection=False,
        modules_to_save=None if whole is None else list(whole),
    )
    adapted = get_peft_model(model, settings)
    tiny.randomize(adapted, 0.25, 5)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "modules_to_save" in name:
                value.add_(0.05 * torch.randn(value.shape))
    adapted.eval().save_pretrained(folder)
    return adapted


BOTH = ("embed_tokens", "lm_head")


@pytest.mark.parametrize(
    ("tied", "whole", "size", "options"),
    [
        (True, None, 386, {}),  # PEFT saves both by itself, frozen
        (True, BOTH, 386, {}),
        (True, ("embed_tokens",), 380, {}),
        (False, None, 386, {}),
        (False, BOTH, 380, {}),
        (False, ("lm_head",), 386, {}),
        (False, None, 386, {"pad_to_multiple_of": 64}),
    ],
)
def test_a_resized_vocabulary_is_taken(
    tmp_path: Path, tied: bool, whole: Sequence[str] | None, size: int, options: dict[str, Any]
) -> None:
    import torch

    base = _llama(tmp_path / "base", tied)
    model = _resized(base, tmp_path / "adapter", size, whole, **options)
    ids = exported.tokens(40, min(size, 384), 3)
    with torch.no_grad():
        truth = model(torch.from_numpy(ids[None])).logits[0].numpy()
    rows = 448 if options else size
    assert truth.shape == (40, rows)
    adapters = [(tmp_path / "adapter", 1.0)]
    report = merge.to_folder(base, adapters, tmp_path / "m", to="fp32")
    assert any(f"the vocabulary has {rows} tokens" in note for note in report.notes)
    merged = tiny.load(tmp_path / "m")
    with torch.no_grad():
        assert exported.error(merged(torch.from_numpy(ids[None])).logits[0].numpy(), truth) < 1e-5
    assert merged.config.vocab_size == rows
    for mode in ("merged", "branch"):
        target.export(base, adapters, tmp_path / mode, mode=mode)
        assert exported.error(Session.open(tmp_path / mode).logits(ids), truth) < 1e-5
    if size > 384:
        drift = assess(DriftRequest(tmp_path / "adapter", tmp_path / "branch", base=base, tokens=256))
        assert drift.effect is not None
        assert drift.fidelity.kl.mean.value < 1e-9 and drift.effect.kl.mean.value > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "bert", "gemma3"])
def test_a_resized_vocabulary_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    """Wte, embed_in and embed_out (which transformers renames), word_embeddings, a bias beside the head."""
    import torch
    from peft import VeraConfig, get_peft_model

    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path / "base")
    model = family.load(tmp_path / "base")
    model.resize_token_embeddings(99, mean_resizing=False)
    options = {"target_modules": list(family.targets)[:2], "save_projection": False, **family.adapter}
    adapted = get_peft_model(model, VeraConfig(r=8, **options)).eval()
    tiny.randomize(adapted, 0.5, 3)
    adapted.save_pretrained(tmp_path / "adapter")
    merge.to_folder(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "m", to="fp32")
    with torch.no_grad():
        truth = adapted(**family.inputs())[0]
        found = family.load(tmp_path / "m")(**family.inputs())[0]
    assert truth.shape[-1] == 99 and exported.error(found.numpy(), truth.numpy()) < 1e-5


def test_a_tied_head_that_is_still_the_embeddings_stays_tied(tmp_path: Path) -> None:
    base = _llama(tmp_path / "base", tied=True)
    _resized(base, tmp_path / "adapter", 386, None)
    merge.to_folder(base, [(tmp_path / "adapter", 1.0)], tmp_path / "m", to="fp32")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "m").tensors


def test_half_of_a_resized_vocabulary_is_refused(tmp_path: Path, cli: Cli) -> None:
    base = _llama(tmp_path / "base", tied=False)
    _resized(base, tmp_path / "adapter", 386, BOTH)
    for half, left in (("lm_head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
        without = _drop(
            tmp_path / "adapter", tmp_path / half, f"{half}.weight", f"{half}.modules_to_save.weight"
        )
        config = without / "adapter_config.json"
        named = [name for name in BOTH if name != half]
        config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": named}))
        result = cli("merge", base, without, "-o", tmp_path / "m", "--to", "fp32")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
        assert f"was trained with 386 tokens, and brings no {left}.weight, which has 384" in result.stderr
        assert not (tmp_path / "m").exists()


def test_workers_of_their_own_read_the_same_model(
    roberta: tuple[Trained, Path, Path], tmp_path: Path
) -> None:
    """In another process the base is opened anew, and what was laid over it goes along."""
    _, base, adapter = roberta
    one = merge.to_folder(base, [(adapter, 1.0)], tmp_path / "one", to="fp32")
    resources = merge.Resources(Engine("local", 2), 1 << 30)
    two = merge.to_folder(base, [(adapter, 1.0)], tmp_path / "two", to="fp32", resources=resources)
    shards = [report.folder / "model.safetensors" for report in (one, two)]
    assert shards[0].read_bytes() == shards[1].read_bytes()


@pytest.mark.parametrize(("to", "key"), [("w4a16", "ignore"), ("awq", "modules_to_not_convert")])
def test_a_quantized_base_leaves_the_new_head_alone(tmp_path: Path, to: str, key: str) -> None:
    """Else a loader would look for packed weights where a float head is."""
    one = DECODERS["llama reward"]
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    trained = Trained(**{**vars(one), "config": {**one.config, **sizes}})
    base, adapter = trained.make(tmp_path)
    words = Trained(one.base, "AutoModelForCausalLM", "CAUSAL_LM", one.targets, trained.config)
    words.train(base).save_pretrained(tmp_path / "words")
    quantized = merge.to_folder(base, [(tmp_path / "words", 1.0)], tmp_path / "q", to=to).folder
    merge.to_folder(quantized, [(adapter, 1.0)], tmp_path / "m", projection_rounding="fp32")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    before = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert set(config["quantization_config"][key]) == {*(before.get(key) or ()), "score"}
    assert Checkpoint.open(tmp_path / "m").linears["score"].format == "fp32"


def test_a_job_survives_being_pickled(roberta: tuple[Trained, Path, Path], tmp_path: Path) -> None:
    import pickle

    from vera_edge.merging.work import MergeJob

    _, base, adapter = roberta
    ready = merge.prepare(base, [(adapter, 1.0)], "fp32")
    job = pickle.loads(pickle.dumps(MergeJob("key", ready.plan, ready.model, {}, tmp_path, 1 << 30)))
    assert job.model.checkpoint.config == ready.model.checkpoint.config
    assert [unit.layout for unit in job.units] == [
        unit.layout for unit in MergeJob("k", ready.plan, ready.model, {}, tmp_path, 1).units
    ]
