"""How a byte-level tokenizer cuts text into words, by the name that llama.cpp has for it.

llama.cpp knows a list of names (`tokenizer.ggml.pre`), each with its regular expressions in C++. Here the
name is found by the expressions in tokenizer.json themselves. (llama.cpp's own converter goes by a digest of
one text's tokens, so by the vocabulary: it knows no tokenizer that was trained anew.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vera_edge.errors import TargetError

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _words(numbers: str) -> str:
    return rf"{_CONTRACTED}|{_LEAD}\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"


def _cased(numbers: str, contracted: str) -> str:
    word = rf"{_LEAD}{_UPPER}*{_LOWER}+{contracted}|{_LEAD}{_UPPER}+{_LOWER}*{contracted}"
    return rf"{word}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"


# expression -> names, of a tokenizer that takes words which are tokens whole, and of one that merges them
_SPLITS: Mapping[str, tuple[str | None, str | None]] = {
    _words(r"\p{N}{1,3}"): ("llama-bpe", "smaug-bpe"),
    _words(r"\p{N}"): (None, "qwen2"),
    _cased(r"\p{N}", ""): ("tekken", None),
    _cased(r"\p{N}{1,3}", f"{_CONTRACTED}?"): (None, "gpt-4o"),
}


def name_of(pre_tokenizer: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    """llama.cpp's name for the `pre_tokenizer` of a byte-level tokenizer.json.

    ignore_merges: the model's setting of that name. Raises TargetError when llama.cpp has none.
    """
    parts = _parts(pre_tokenizer)
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        raise _unknown(f"ends in {parts[-1].get('type') if parts else None!r}")
    before, by_itself = parts[:-1], parts[-1].get("use_regex", True)
    found: str | None = None
    if by_itself and not before and not ignore_merges:
        found = "gpt-2"
    elif by_itself and not ignore_merges and _is_digits(before):
        found = "smollm"
    elif not by_itself and len(before) == 1 and before[0].get("type") == "Split":
        pattern = (before[0].get("pattern") or {}).get("Regex")
        if before[0].get("behavior") == "Isolated" and not before[0].get("invert"):
            found = _SPLITS.get(str(pattern), (None, None))[0 if ignore_merges else 1]
    if found is None:
        shown = "; ".join(_shown(part) for part in before) or "nothing"
        raise _unknown(f"cuts words by {shown}")
    return found


def _parts(given: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if given is None:
        return ()
    return tuple(given.get("pretokenizers") or ()) if given.get("type") == "Sequence" else (given,)


def _is_digits(parts: Sequence[Mapping[str, Any]]) -> bool:
    return len(parts) == 1 and parts[0].get("type") == "Digits" and bool(parts[0].get("individual_digits"))


def _shown(part: Mapping[str, Any]) -> str:
    return str((part.get("pattern") or {}).get("Regex") or part.get("type"))[:200]


def _unknown(why: str) -> TargetError:
    return TargetError(f"llama.cpp has no pre-tokenizer like this model's, which {why}; export it to onnx")
