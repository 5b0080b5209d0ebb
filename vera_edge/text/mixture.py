"""Text to calibrate on: the user's own, each text with its share, mixed with what ships with vera-edge.

Rounding fits the text that it is calibrated on, and keeps of a model what that text shows of it. So the
user's text is mixed with prose, code, dialogue, numbers, markup and other languages, of which the text that
ships has some of each (`built_in/calibration`; `built-in` as text to measure on is another one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vera_edge.arrays import Int64
from vera_edge.errors import DataError, PlanError
from vera_edge.storage.files import sha256_bytes
from vera_edge.text import windows
from vera_edge.text.windows import BUILT_IN, MIN_WINDOW, SourceText

# Of the tokens, for texts that are given without a share; the rest is built-in text.
USER_SHARE = 0.5
KINDS = ("prose", "code", "dialogue", "numbers", "markup", "languages")
_FOLDER = Path(__file__).parent / "built_in" / "calibration"
_NEARLY = 1e-6
_MOST_UNKNOWN = 0.25  # of a window's tokens


@dataclass(frozen=True)
class SharedText:
    """A text, "built-in" or a UTF-8 file, and which share of the tokens is to be its."""

    source: str
    share: float


@dataclass(frozen=True)
class Mixture:
    """Texts with shares that come to 1."""

    texts: tuple[SharedText, ...]

    @classmethod
    def only(cls, source: str | Path) -> Mixture:
        """One text and nothing else."""
        return cls((SharedText(str(source), 1.0),))

    @classmethod
    def of(cls, words: str | Iterable[str], place: Callable[[str], str] = str) -> Mixture:
        """Texts as a person gives them: FILE, FILE=SHARE, "built-in"; with built-in text, unless shares say
        otherwise.

        Texts without a share get half of what is left, in equal parts, and built-in text the rest of it;
        where all have one, built-in text has what's left of 1. place: where a text of this name lies. Raises
        PlanError for shares that can't be.
        """
        given = [_split(word, place) for word in ([words] if isinstance(words, str) else words)]
        if twice := [name for name, _ in given if [other for other, _ in given].count(name) > 1]:
            raise PlanError(f"{twice[0]} is given to calibrate on more than once; give it one share")
        shares = dict(given)
        left = 1 - sum(share for share in shares.values() if share is not None)
        if left < -_NEARLY:
            raise PlanError(
                f"the shares of calibration texts come to {1 - left:g}; they may come to 1 at most"
            )
        open_ended = [name for name, share in shares.items() if share is None and name != BUILT_IN]
        own = left * (1.0 if shares.get(BUILT_IN) is not None else USER_SHARE)
        for name in open_ended:
            shares[name] = own / len(open_ended)
        rest = 1 - sum(share for share in shares.values() if share is not None)
        if rest > _NEARLY and shares.get(BUILT_IN) is not None:
            raise PlanError(
                f"the shares of calibration texts come to {1 - rest:g}, built-in text's among them; let them "
                "come to 1, or leave one out"
            )
        shares.setdefault(BUILT_IN, None)
        found = [(name, rest if share is None else share) for name, share in shares.items()]
        return cls(tuple(SharedText(name, share) for name, share in found if share > _NEARLY))

    @classmethod
    def either(cls, text: str | Mixture) -> Mixture:
        """A mixture as it is; the name of a text as that text alone."""
        return cls.only(text) if isinstance(text, str) else text

    @property
    def own(self) -> tuple[SharedText, ...]:
        """The texts that aren't built-in."""
        return tuple(text for text in self.texts if text.source != BUILT_IN)

    @property
    def names(self) -> tuple[str, ...]:
        """What the texts that aren't built-in are called; "built-in" where there is no other."""
        return tuple(text.source for text in self.own) or (BUILT_IN,)

    def absolute(self) -> Mixture:
        """The same, for a process that may stand in another folder."""
        return Mixture(
            tuple(
                text if text.source == BUILT_IN else SharedText(str(Path(text.source).absolute()), text.share)
                for text in self.texts
            )
        )

    def digest(self) -> str:
        """Hex SHA-256 of the texts' own and of the shares. Raises DataError for an unreadable text."""
        parts = [f"{read(text.source).sha256} {text.share:.9g}" for text in self.texts]
        return sha256_bytes("\n".join(parts).encode())


def split(word: str) -> tuple[str, str]:
    """FILE=0.3 as FILE and "=0.3"; what isn't a number after the last = belongs to the name."""
    name, sign, share = word.rpartition("=")
    try:
        float(share)
    except ValueError:
        return word, ""
    return (name, sign + share) if name else (word, "")


def _split(word: str, place: Callable[[str], str]) -> tuple[str, float | None]:
    """Where a text lies, and its share; a file may have a name that looks like a share of another."""
    name, share = split(word)
    if not share or Path(place(word)).exists():
        return (word if word == BUILT_IN else place(word)), None
    value = float(share[1:])
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise PlanError(f"{word} gives a text no share that can be; give one from 0 to 1, like {name}=0.5")
    return (name if name == BUILT_IN else place(name)), value


@dataclass(frozen=True)
class UsedText:
    """What was calibrated on of one text. sha256: of all of it."""

    source: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class Cut:
    """Token windows of a mixture, text after text, and what each text gave."""

    windows: tuple[Int64, ...]
    used: tuple[UsedText, ...]

    def said(self) -> str:
        """ "5632 tokens of notes.txt and 10752 of built-in text"."""
        parts = [f"{used.tokens} tokens of {used.source}" for used in self.used[:1]]
        parts += [f"{used.tokens} of {used.source}" for used in self.used[1:]]
        *most, last = parts
        return f"{', '.join(most)} and {last} text" if most else f"{last} text"

    def shortage(self, inputs: int) -> tuple[str, ...]:
        """A sentence where there are fewer tokens than a model's widest layer has inputs."""
        tokens = sum(used.tokens for used in self.used)
        if not self.used or tokens >= inputs:
            return ()
        return (
            f"{tokens} tokens say little of the {inputs} inputs of the widest layer, which was rounded "
            f"almost as without any; give at least {inputs} tokens",
        )

    def to_list(self) -> list[dict[str, Any]]:
        """For a plan: names without folders, digests and shares of what was used."""
        total = sum(used.tokens for used in self.used)
        return [
            {
                "text": used.source if used.source == BUILT_IN else Path(used.source).name,
                "sha256": used.sha256,
                "tokens": used.tokens,
                "share": round(used.tokens / total, 4),
            }
            for used in self.used
        ]


def read(source: str) -> SourceText:
    """A text to calibrate on: a UTF-8 file, or the built-in one. Raises DataError as `windows.read_text`."""
    if source != BUILT_IN:
        return windows.read_text(source)
    raw = b"\n\n\n".join((_FOLDER / f"{kind}.txt").read_bytes() for kind in KINDS)
    return SourceText(BUILT_IN, raw.decode(), sha256_bytes(raw))


def _built_in() -> dict[str, str]:
    """The built-in text by its kinds."""
    return {kind: (_FOLDER / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS}


def cut(mixture: Mixture, tokenizer: Tokenizer, vocab_size: int, tokens: int, window: int) -> Cut:
    """Windows of about `tokens` tokens in all, each text's spread evenly over it.

    A text that holds less than its share gives all of it, and the others make up for that in proportion.
    Built-in text gives of each kind as much as there is of it, in characters. Raises DataError when there is
    too little of a text, MismatchError when a token is beyond a model of `vocab_size` tokens.
    """
    if len(mixture.texts) == 1 and mixture.own:
        text = read(mixture.own[0].source)
        made = windows.make(text, tokenizer, vocab_size, tokens, window)
        return Cut(made.tokens, (UsedText(text.source, text.sha256, _count(made.tokens)),))
    texts = [_Pieces.of(text.source, tokenizer, vocab_size, window) for text in mixture.texts]
    if empty := [text.text.source for text in texts if not text.count and text.text.source != BUILT_IN]:
        hold = "holds" if len(empty) == 1 else "hold"
        raise DataError(
            f"{' and '.join(empty)} {hold} no {MIN_WINDOW} tokens to calibrate on; give a longer text"
        )
    shares = [text.share for text in mixture.texts]
    counts = _portions(shares, [text.count for text in texts], max(1, tokens // window))
    taken = [text.some(count) for text, count in zip(texts, counts, strict=True)]
    if not any(taken):
        names = " and ".join(text.source for text in mixture.texts)
        raise DataError(f"{names} hold no {MIN_WINDOW} tokens to calibrate on; give a longer text")
    used = [
        UsedText(text.text.source, text.text.sha256, _count(some))
        for text, some in zip(texts, taken, strict=True)
        if some
    ]
    return Cut(tuple(chain.from_iterable(taken)), tuple(used))


def _count(pieces: Sequence[Int64]) -> int:
    return sum(map(len, pieces))


@dataclass(frozen=True)
class _Pieces:
    """A text's windows by kind, and how much there is of each kind, in characters."""

    text: SourceText
    kinds: tuple[list[Int64], ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, source: str, tokenizer: Tokenizer, vocab_size: int, window: int) -> _Pieces:
        text = read(source)
        parts = list(_built_in().values()) if source == BUILT_IN else [text.content]
        kinds = [windows.pieces(part, source, tokenizer, vocab_size, window) for part in parts]
        unknown = _unknown(tokenizer)
        kinds = [[piece for piece in kind if np.mean(piece == unknown) <= _MOST_UNKNOWN] for kind in kinds]
        return cls(text, tuple(kinds), tuple(map(len, parts)))

    @property
    def count(self) -> int:
        """How many windows there are."""
        return sum(map(len, self.kinds))

    def some(self, count: int) -> list[Int64]:
        """So many windows, of each kind its part."""
        counts = _portions(self.sizes, [len(kind) for kind in self.kinds], count)
        chosen = [windows.spread(kind, most) for kind, most in zip(self.kinds, counts, strict=True)]
        return list(chain.from_iterable(chosen))


def _unknown(tokenizer: Tokenizer) -> int:
    """The id of what a tokenizer has no token for; -1 where it has one for everything."""
    name = getattr(tokenizer.model, "unk_token", None)
    found = None if name is None else tokenizer.token_to_id(name)
    return -1 if found is None else int(found)


def _portions(shares: Sequence[float], available: Sequence[int], count: int) -> list[int]:
    """`count` in portions of these shares, none larger than what is available, rounded to whole numbers.

    What one can't give, the others give in proportion; less than `count` in all where there is no more.
    """
    portions = [0.0] * len(shares)
    left, giving = float(min(count, sum(available))), set(range(len(shares)))
    while left > _NEARLY and giving:
        total = sum(shares[index] for index in giving)
        more = {index: left * shares[index] / total if total else left / len(giving) for index in giving}
        for index, extra in more.items():
            portions[index] = min(portions[index] + extra, float(available[index]))
        left = min(count, sum(available)) - sum(portions)
        giving = {index for index in giving if portions[index] < available[index] - _NEARLY}
    whole = [int(portion + _NEARLY) for portion in portions]
    missing = round(sum(portions)) - sum(whole)
    # The largest remainders are rounded up.
    for index in sorted(range(len(whole)), key=lambda i: (whole[i] - portions[i], i))[:missing]:
        whole[index] += 1
    return whole
