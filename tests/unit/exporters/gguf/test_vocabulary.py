"""Tokenizers as llama.cpp's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests import tiny
from vera_edge.errors import TargetError
from vera_edge_gguf import file, pre_tokenizer
from vera_edge_gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, BYTE_LEVEL | {"use_regex": False}]}


def byte_level(folder: Path) -> Path:
    folder.mkdir()
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def sentencepiece(folder: Path, **settings: Any) -> Path:
    """Llama 2's kind: spaces as ▁, one put before the text, bytes to fall back on, <s> before a text."""
    folder.mkdir()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["▁▁"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    found, notes = vocabulary(byte_level(tmp_path / "model"), tiny.VOCABULARY + 2)
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[:-2] == [tokenizer.id_to_token(index) for index in range(tiny.VOCABULARY)]
    assert tokens[-2:] == ["[PAD384]", "[PAD385]"]
    kinds = found["tokenizer.ggml.token_type"]
    assert kinds[:3] == [CONTROL] * 3 and kinds[-2:] == [UNUSED] * 2 and set(kinds[3:-2]) == {NORMAL}
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == tiny.CHAT_TEMPLATE
    assert len(found["tokenizer.ggml.merges"]) > 10 and not notes


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    found, _ = vocabulary(sentencepiece(tmp_path / "model"), 265)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert kinds[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and kinds[-1] == USER_DEFINED
    assert tokens[-1] == "  "  # as text holds it, not as the vocabulary does
    assert 0 == scores["▁a"] > scores["▁ab"] > scores["a"]
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False


def stripping(folder: Path, *tokens: str) -> Path:
    """These tokens take the whitespace after them along; added, with what llama.cpp wants beside them."""
    given = json.loads((folder / "tokenizer.json").read_text())
    added, known = given["added_tokens"], given["model"]["vocab"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in ("<unk>", "<|endoftext|>", *tokens):
        if token not in {entry["content"] for entry in added}:
            after = max([*known.values(), *(entry["id"] for entry in added)]) + 1
            added.append({"id": known.get(token, after), "content": token, "special": True, **plain})
    for entry in added:
        entry["rstrip"] = entry["content"] in tokens
    (folder / "tokenizer.json").write_text(json.dumps(given))
    return folder


def test_tokens_that_take_whitespace_along_are_told_by_the_name_of_the_file(tmp_path: Path) -> None:
    """As Phi-3's do; llama.cpp goes by general.name."""
    folder = sentencepiece(tmp_path / "model")
    assert "general.name" not in vocabulary(folder, 265)[0]
    found, notes = vocabulary(stripping(folder, "</s>", "▁▁", "<|user|>"), 267)
    assert found["general.name"] == "Phi-3" and not notes
    found, notes = vocabulary(stripping(folder, "<|user|>"), 267)
    assert "general.name" not in found
    assert notes == ("1 tokens take whitespace beside them along (<|user|>), which llama.cpp isn't told",)


def test_several_ends_are_named(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 5, 6]}))
    found, notes = vocabulary(folder, tiny.VOCABULARY)
    ids = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ids == [2, 0, 5] and "text ends at 4 tokens" in notes[0]


@pytest.mark.parametrize(
    ("given", "ignore_merges", "name"),
    [
        (BYTE_LEVEL, False, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
            },
            False,
            "smollm",
        ),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), False, "qwen2"),
    ],
)
def test_the_pre_tokenizer_is_named_by_its_expressions(
    given: dict[str, Any], ignore_merges: bool, name: str
) -> None:
    assert pre_tokenizer.name_of(given, ignore_merges) == name


@pytest.mark.parametrize(
    "given",
    [split(r"\p{L}+"), None, BYTE_LEVEL | {"add_prefix_space": True}, {"type": "Whitespace"}],
)
def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused(given: dict[str, Any] | None) -> None:
    with pytest.raises(TargetError, match=r"llama\.cpp has no pre-tokenizer like this model's"):
        pre_tokenizer.name_of(given, False)


def test_tokens_around_a_text_that_gguf_cannot_say_are_refused(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path / "model", bos_token="</s>")
    with pytest.raises(TargetError, match="puts the tokens"):
        vocabulary(folder, 265)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(TargetError, match="the tokenizer is WordLevel"):
        vocabulary(folder, 2)


def trained_sentencepiece(folder: Path) -> Tokenizer:
    """BPE over whole lines, spaces as ▁, bytes for what the text hadn't, merges as SentencePiece's."""
    from tokenizers import trainers

    folder.mkdir()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(tiny.TEXT.splitlines(), trainer)
    given = json.loads(tokenizer.to_str())
    # The bytes are plain tokens; only the trainer needs to be told of them.
    given["added_tokens"] = [entry for entry in given["added_tokens"] if entry["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(given))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text("{}")
    return tokenizer


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "stripping"])
def test_llama_cpp_cuts_text_into_the_same_tokens(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = tmp_path / "model"
    if kind != "byte level":
        tokenizer = trained_sentencepiece(folder)
        if kind == "stripping":
            tokenizer = Tokenizer.from_file(str(stripping(folder, "</s>", "<|user|>") / "tokenizer.json"))
    else:
        tokenizer = Tokenizer.from_file(str(byte_level(folder) / "tokenizer.json"))
    found, _ = vocabulary(folder, tokenizer.get_vocab_size())
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2}
    settings = {f"llama.{key}": value for key, value in sizes.items()}
    settings["llama.attention.layer_norm_rms_epsilon"] = 1e-5  # type: ignore[assignment]
    file.write(tmp_path / "vocabulary.gguf", "llama", {**settings, **found}, (), lambda *_: None)
    model = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    for text in (
        "<|user|>\n  a</s> \tb",
        tiny.TEXT,
        "Zwölf Boxkämpfer  jagen 12345 Eva\n\tquer über den Sylter Deich 🚀",
        "a",
    ):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids
