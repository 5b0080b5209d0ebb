"""Older vocabularies made into tokenizer.json, against transformers and sentencepiece."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from tests import heads, tiny, tiny_encoder
from tests.conftest import Cli
from tests.heads import ENCODERS, Trained
from vera_edge.base.trained_files import gather
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.device.runtime.session import Session
from vera_edge.errors import CheckpointError
from vera_edge.exporting import target
from vera_edge.measuring.assess import DriftRequest, assess_any
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge.text import tokenizer

TEXT = "The adapter scales each row of one shared projection"


def pieces(kind: str, size: int = 160, **options: Any) -> bytes:
    """A sentencepiece model, trained on three sentences."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXT.splitlines() * 20),
        model_writer=out,
        vocab_size=size,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


def _folder(
    root: Path, model_type: str, files: dict[str, bytes], **settings: Any
) -> tuple[Path, dict[str, Any]]:
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    if settings:
        (root / "tokenizer_config.json").write_text(json.dumps(settings))
    return root, {"model_type": model_type}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizer"}])
def test_a_sentencepiece_model_keeps_its_ids(
    tmp_path: Path, kind: str, model_type: str, settings: dict[str, Any]
) -> None:
    model = pieces(kind)
    folder, config = _folder(tmp_path / "t", model_type, {"tokenizer.model": model}, **settings)
    found = tokenizer.read(gather(folder), config)
    truth = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in (TEXT, "a row", tiny.TEXT.splitlines()[2]):
        assert found.encode(text, add_special_tokens=False).ids == truth.encode(text)
        assert found.decode(truth.encode(text)) == truth.decode(truth.encode(text))


@pytest.mark.parametrize(
    ("model_type", "files"),
    [
        ("bert", {"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nadapter\nscale\n##s\neach\nrow"}),
        ("xlm-roberta", {"sentencepiece.bpe.model": pieces("unigram")}),
        (
            "deberta-v2",
            {
                "spm.model": pieces(
                    "unigram",
                    pad_id=0,
                    bos_id=1,
                    eos_id=2,
                    unk_id=3,
                    pad_piece="[PAD]",
                    bos_piece="[CLS]",
                    eos_piece="[SEP]",
                    unk_piece="[UNK]",
                )
            },
        ),
        ("t5", {"spiece.model": pieces("unigram")}),
    ],
)
def test_an_encoders_vocabulary_reads_as_in_transformers(
    tmp_path: Path, model_type: str, files: dict[str, bytes]
) -> None:
    from transformers import AutoTokenizer

    folder, config = _folder(tmp_path / "t", model_type, files)
    made = tokenizer.with_fast(gather(folder), config)
    (folder / "config.json").write_text(json.dumps(config))
    truth = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.read(made, config).encode(TEXT).ids == truth(TEXT)["input_ids"]
    assert "tokenizer_class" in json.loads(made.read("tokenizer_config.json"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"tokenizer.model": b"no sentencepiece model"},
            r"tokenizer\.model isn't a sentencepiece model",
        ),
        ({"spiece.model": pieces("bpe")}, "it splits text otherwise than sentencepiece does"),
        ({"tekken.json": b"{}"}, r"none of what is there \(tekken\.json\)"),
        ({"tokenizer.json": b"{}"}, "isn't a tokenizer that the tokenizers package reads"),
        ({"added_tokens.json": b"{}"}, "holds no tokenizer"),
        (
            {"vocab.json": b'{"a": 2147483648, "b": 1}', "merges.txt": b""},
            r"vocab\.json gives the token 'a' the id 2147483648",
        ),
        (
            {"vocab.json": b'{"a": 0}', "merges.txt": b"", "added_tokens.json": b'{"<x>": -1}'},
            r"added_tokens\.json gives the token '<x>' the id -1",
        ),
    ],
)
def test_what_no_tokenizer_can_be_made_of_is_refused(
    tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    folder, config = _folder(tmp_path / "t", "t5", files)
    with pytest.raises(CheckpointError, match=says) as caught:
        tokenizer.read(gather(folder), config)
    assert "\n" not in str(caught.value) and "tiktoken" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = _folder(tmp_path / "t", "llama", {"tokenizer.model": pieces("bpe", 150)})
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"takes the package sentencepiece .* 'vera-edge\[build\]'"):
        tokenizer.read(gather(folder), config)


@pytest.fixture
def llama(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> tuple[Path, Path]:
    """A Llama whose folder has a tokenizer.model alone, and an adapter on it."""
    folder = tmp_path / "base"
    tiny.load(tiny_llama.fp32).save_pretrained(folder)
    _folder(folder, "llama", {"tokenizer.model": pieces("bpe")}, tokenizer_class="LlamaTokenizer")
    return folder, tiny.make_adapter(folder, tmp_path / "adapter", targets=("q_proj", "v_proj"))


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_decoder_with_a_sentencepiece_model_alone(
    llama: tuple[Path, Path], tmp_path: Path, weights: str
) -> None:
    base, adapter = llama
    rounding = Rounding(tokens=512)
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out", weights=weights, rounding=rounding)
    session = Session.open(made.folder)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    assert session.text.tokens(TEXT, special=False).tolist() == truth.encode(TEXT)
    assert "".join(session.generate(TEXT, max_tokens=4, raw=True)) is not None
    found = assess_any(DriftRequest(adapter, made.folder, base=base, tokens=256))
    assert found.to_dict()["verdict"]["level"] != "lost"


def test_an_encoder_with_vocab_txt_alone(tmp_path: Path, cli: Cli) -> None:
    from transformers import AutoTokenizer

    trained: Trained = ENCODERS["distilbert classes"]
    base, adapter = trained.make(tmp_path)
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    (base / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    encoder = Encoder.open(made.folder)
    truth = AutoTokenizer.from_pretrained(base)
    texts = list(tiny_encoder.TEXTS)
    assert [one.ids.tolist() for one in encoder.encode(texts)] == truth(texts)["input_ids"]
    feeds = {name: np.array(value) for name, value in truth(texts, padding=True).items()}
    expected = trained.truth(base, adapter, {key: feeds[key] for key in ("input_ids", "attention_mask")})[0]
    np.testing.assert_allclose(encoder.outputs(encoder.encode(texts)), expected, atol=1e-5)
    result = cli("run", made.folder, "the row")
    assert result.exit_code == 0, result.stderr
    (tmp_path / "text").write_text("\n\n".join(texts * 3))
    report = assess_any(DriftRequest(adapter, made.folder, base=base, data=str(tmp_path / "text")))
    assert report.to_dict()["classes"]["kl"]["value"] < 1e-9


def test_an_encoder_whose_vocabulary_cannot_be_read_is_refused_at_export(tmp_path: Path) -> None:
    base, adapter = ENCODERS["distilbert classes"].make(tmp_path)
    (base / "tokenizer.json").unlink()
    (base / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"spiece\.model isn't a sentencepiece") as caught:
        target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    (base / "spiece.model").unlink()
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert any("holds no tokenizer" in note for note in made.notes)
    assert heads.feeds()["input_ids"].shape == (3, 9)
