"""A tokenizer.json as llama.cpp's metadata: byte-level BPE, and SentencePiece's with bytes to fall back on.

What llama.cpp does otherwise is refused where it changes tokens of ordinary text, and told where it may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from vera_edge.device.runtime import template
from vera_edge.errors import TargetError
from vera_edge.formats.gguf_header import ENDS
from vera_edge.storage.json_text import read_json
from vera_edge.storage.tokenizer_json import parse
from vera_edge_gguf import pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"
_UNRANKED = -1e6  # the score of a token that no merge makes
# Of a file of this name llama.cpp lets special tokens take the whitespace after them along, but for these; it
# refuses one that hasn't got them, or no </s>.
_STRIPPING, _UNSTRIPPED = "Phi-3", frozenset({"<unk>", "<s>", "<|endoftext|>"})


class Vocabulary(NamedTuple):
    """metadata: by full key. notes: for a person to read."""

    metadata: Mapping[str, Any]
    notes: tuple[str, ...]


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Of a model's folder; rows: of its embedding. Raises TargetError where llama.cpp can't have it."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TargetError(f"{folder} has no tokenizer.json, so llama.cpp couldn't read text; save it there")
    given = read_json(file, TargetError)
    model = given.get("model") or {}
    if model.get("type") != "BPE":
        raise TargetError(
            f"the tokenizer is {model.get('type')}, which vera-edge doesn't write as GGUF; export it to onnx"
        )
    notes: list[str] = []
    pieces = bool(model.get("byte_fallback"))
    found = _sentencepiece(given, rows, notes) if pieces else _byte_level(given, rows, notes)
    tokenizer = parse(file.read_text("utf-8"), file, TargetError, "save the tokenizer again")
    _special_tokens(folder, tokenizer, rows, found, notes)
    _templates(folder, found)
    named = {"general.name": name} if (name := _stripping(given, notes)) is not None else {}
    return Vocabulary({f"tokenizer.{key}": value for key, value in found.items()} | named, tuple(notes))


def _byte_level(given: Mapping[str, Any], rows: int, notes: list[str]) -> dict[str, Any]:
    model = given["model"]
    normalizer = given.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise TargetError(
            f"the tokenizer normalizes text ({normalizer.get('type')}), which llama.cpp doesn't; export it "
            "to onnx"
        )
    if normalizer is not None:
        notes.append("llama.cpp doesn't compose characters (Unicode NFC) before it cuts text into tokens")
    tokens, types = _tokens(given, rows, notes)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre_tokenizer.name_of(given.get("pre_tokenizer"), bool(model.get("ignore_merges"))),
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def _sentencepiece(given: Mapping[str, Any], rows: int, notes: list[str]) -> dict[str, Any]:
    model = given["model"]
    prefixed = _space_prefix(given, notes)
    tokens, types = _tokens(given, rows, notes)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    for index, token in enumerate(tokens):
        if types[index] == NORMAL and _BYTE.fullmatch(token):
            types[index] = BYTE
        elif types[index] in (NORMAL, CONTROL) and token == model.get("unk_token"):
            types[index] = UNKNOWN
        elif types[index] == USER_DEFINED:
            tokens[index] = token.replace(_SPACE, " ")
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": [float(-ranks[token]) if token in ranks else _UNRANKED for token in tokens],
        "ggml.token_type": types,
        "ggml.add_space_prefix": prefixed,
    }


def _space_prefix(given: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether text gets a space put before it. Raises TargetError where spaces are treated another way."""
    steps = _steps(given.get("normalizer"), "normalizers")
    cuts = _steps(given.get("pre_tokenizer"), "pretokenizers")
    prefixed = False
    for step in [*steps, *cuts]:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            prefixed = True
        elif kind == "Metaspace" and step.get("replacement") == _SPACE and step.get("split") in (None, False):
            prefixed = step.get("prepend_scheme") != "never"
            if step.get("prepend_scheme") == "first":
                notes.append("llama.cpp puts a space before the text after each special token, too")
        elif kind == "Replace" and step.get("content") == _SPACE:
            continue
        elif kind == "Split" and (step.get("pattern") or {}).get("String") == " ":
            continue  # Gemma's, which cuts what its normalizer has replaced already: nothing
        else:
            raise TargetError(
                f"the tokenizer changes text by {kind}, which llama.cpp doesn't; export to onnx"
            )
    return prefixed


def _steps(given: Mapping[str, Any] | None, key: str) -> Sequence[Mapping[str, Any]]:
    if given is None:
        return ()
    return tuple(given.get(key) or ()) if given.get("type") == "Sequence" else (given,)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for merge in model.get("merges") or ():
        left, right = merge if isinstance(merge, list) else str(merge).split(" ", 1)
        if " " in left or " " in right:
            raise TargetError("a merge of the tokenizer holds a space, which GGUF can't write down")
        found.append((left, right))
    return found


def _tokens(given: Mapping[str, Any], rows: int, notes: list[str]) -> tuple[list[str], list[int]]:
    """The text and the type of every row of the embedding."""
    texts: dict[int, str] = {index: token for token, index in given["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for entry in given.get("added_tokens") or ():
        texts[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry.get("special") else USER_DEFINED
    if beyond := sum(index >= rows for index in texts):
        notes.append(f"{beyond} tokens have no row in the embedding, so the file hasn't got them")
    named = [texts.get(index, f"[PAD{index}]") for index in range(rows)]
    if len(set(named)) < len(named):
        raise TargetError("two tokens of the tokenizer have the same text, which llama.cpp refuses")
    return named, [types.get(index, UNUSED) for index in range(rows)]


def _stripping(given: Mapping[str, Any], notes: list[str]) -> str | None:
    """What the file must be called for special tokens to take whitespace along as the tokenizer's do."""
    added = given.get("added_tokens") or ()
    after = {entry["content"] for entry in added if entry.get("rstrip")}
    before = {entry["content"] for entry in added if entry.get("lstrip")}
    if not after and not before:
        return None
    texts = {entry["content"] for entry in added}
    if not before and after == texts - _UNSTRIPPED and texts >= {"</s>", *_UNSTRIPPED}:
        return _STRIPPING
    first = min(after | before)
    notes.append(
        f"{len(after | before)} tokens take whitespace beside them along ({first}), which llama.cpp "
        "isn't told"
    )
    return None


def _special_tokens(
    folder: Path, tokenizer: Tokenizer, rows: int, found: dict[str, Any], notes: list[str]
) -> None:
    """Where text begins and ends, what is unknown and padded, and what is put around a text."""
    settings = _settings(folder, "tokenizer_config.json")
    config, generation = _settings(folder, "config.json"), _settings(folder, "generation_config.json")
    ids: dict[str, int] = {}
    for ours, theirs in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        token = _id(settings.get(f"{ours}_token"), tokenizer)
        token = config.get(f"{ours}_token_id") if token is None else token
        if type(token) is int and 0 <= token < rows:
            ids[theirs] = token
    asked = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = [token for token in (asked if isinstance(asked, list) else [asked]) if type(token) is int]
    named = _id(settings.get("eos_token"), tokenizer)
    ends = [token for token in dict.fromkeys([named, *ends]) if token is not None and 0 <= token < rows]
    if len(ends) > len(ENDS):
        notes.append(f"text ends at {len(ends)} tokens, of which GGUF can name the first {len(ENDS)}")
    ids |= dict(zip(ENDS, ends, strict=False))
    for name, token in ids.items():
        found[f"ggml.{name}_token_id"] = token
    around = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    first, last = _around(around, plain)
    if (first and first != [ids.get("bos")]) or (last and last != [ids.get("eos")]):
        raise TargetError(
            f"the tokenizer puts the tokens {[*first, *last]} around a text, which GGUF can't say; export it "
            "to onnx"
        )
    found["ggml.add_bos_token"], found["ggml.add_eos_token"] = bool(first), bool(last)


def _around(around: list[int], plain: list[int]) -> tuple[list[int], list[int]]:
    for start in range(len(around) - len(plain) + 1):
        if around[start : start + len(plain)] == plain:
            return around[:start], around[start + len(plain) :]
    return around, []


def _id(named: Any, tokenizer: Tokenizer) -> int | None:
    text = named.get("content") if isinstance(named, Mapping) else named
    found: int | None = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return found


def _settings(folder: Path, name: str) -> Mapping[str, Any]:
    return read_json(folder / name, TargetError) if (folder / name).is_file() else {}


def _templates(folder: Path, found: dict[str, Any]) -> None:
    templates = dict(template.read(folder, _settings(folder, "tokenizer_config.json")))
    if (usual := templates.pop(template.DEFAULT, None)) is not None:
        found["chat_template"] = usual
    for name, text in templates.items():
        found[f"chat_template.{name}"] = text
    if templates:
        found["chat_templates"] = sorted(templates)
