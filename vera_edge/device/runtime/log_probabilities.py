"""How likely the model thought a token and its rivals, and which bytes of the text a token stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from vera_edge.device.runtime.chat import BundleText

_HEX = re.compile(r"<0x([0-9A-F]{2})>")  # a byte of its own in tokenizers of SentencePiece's kind


@dataclass(frozen=True)
class TokenChoice:
    """A token that was chosen. logprob: natural logarithm of its probability in the model's own distribution,
    before temperature, penalties and filters; `top`: the likeliest tokens and theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def choice(logits: npt.NDArray[Any], token: int, count: int) -> TokenChoice:
    """What logits (vocab,) say of `token`, and of the `count` likeliest; the lowest id first on a tie."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top: list[tuple[int, float]] = []
    if count:
        border = np.partition(values, -count)[-count]
        near = np.flatnonzero(values >= border)
        order = near[np.argsort(-values[near], kind="stable")][:count]
        top = [(int(each), float(values[each])) for each in order]
    return TokenChoice(token, float(values[token]), tuple(top))


class TokenBytes:
    """The bytes of the text that a token stands for: a token may hold a part of a character only."""

    def __init__(self, text: BundleText) -> None:
        self._text = text
        self._bytelevel = _decodes_by(text.tokenizer, "ByteLevel")

    def of(self, token: int) -> bytes:
        """The bytes of `token`; of a special token, those of its name."""
        if token in self._text.special_tokens:
            return self._text.special_tokens[token].encode()
        word = self._text.tokenizer.id_to_token(token)
        if word is None:  # the model's table is longer than the tokenizer's
            return b""
        if self._bytelevel:
            table = _letters()
            # A token that was added to the vocabulary stands there as it is.
            return (
                bytes(table[mark] for mark in word) if all(mark in table for mark in word) else word.encode()
            )
        if matched := _HEX.fullmatch(word):
            return bytes([int(matched[1], 16)])
        return word.replace("▁", " ").encode()


def _decodes_by(tokenizer: Tokenizer, kind: str) -> bool:
    """Whether the tokenizer's decoder is, or holds, one of this kind."""
    import json

    if tokenizer.decoder is None:
        return False

    def within(decoder: Any) -> bool:
        if not isinstance(decoder, Mapping):
            return False
        return decoder.get("type") == kind or any(map(within, decoder.get("decoders") or ()))

    # Of the whole tokenizer's JSON a file could make gigabytes: it has a place for each id up to the highest.
    return within(json.loads(tokenizer.decoder.__getstate__()))


@cache
def _letters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's), as byte by character."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(others)}
