"""Text into token windows: what both models read, token for token.

Windows don't overlap, and are spread evenly over the text when it holds more than asked for. A tokenizer
that starts every text with a token of its own (BOS) starts every window with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vera_edge.arrays import Int64
from vera_edge.errors import CheckpointError, DataError, MismatchError
from vera_edge.storage import tokenizer_json
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.side_files import SideFiles
from vera_edge.text import tokenizer as tokenizer_files
from vera_edge.text.bootstrap import MIN_WINDOWS

BUILT_IN = "built-in"
WINDOW = 256
TOKENS = 8192
# A window shorter than this says little, and a text without a single one nothing.
MIN_WINDOW = 16
_LARGEST_TEXT = 64 << 20
_BUILT_IN_FILES = ("english.txt", "code.txt")


@dataclass(frozen=True)
class SourceText:
    """Text to measure on: where it is from, and the SHA-256 of its UTF-8 bytes."""

    source: str
    content: str
    sha256: str


@dataclass(frozen=True)
class Windows:
    """Token windows of one text. `scored` is the number of tokens that have a token before them."""

    text: SourceText
    tokens: tuple[Int64, ...]
    window: int

    @property
    def scored(self) -> int:
        return sum(len(window) - 1 for window in self.tokens)


def read_text(source: str | Path) -> SourceText:
    """The text of a UTF-8 file, or the text that ships with vera-edge for "built-in".

    Raises DataError when the file is missing, empty, not UTF-8, or larger than 64 MiB.
    """
    if str(source) == BUILT_IN:
        folder = Path(__file__).parent / "built_in"
        raw = b"\n\n".join((folder / name).read_bytes() for name in _BUILT_IN_FILES)
    else:
        raw = _read_file(Path(source))
    try:
        content = raw.decode()
    except UnicodeDecodeError as cause:
        raise DataError(f"{source} isn't UTF-8 text (byte {cause.start}); give a plain text file") from None
    if not content.strip():
        raise DataError(f"{source} holds no text; give a file with some, or {BUILT_IN}")
    return SourceText(str(source), content, sha256_bytes(raw))


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise DataError(
                f"{path} is larger than {_LARGEST_TEXT >> 20} MiB; a few hundred KB of it suffice"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give a text file, or {BUILT_IN}") from None
    except OSError as cause:
        raise DataError(f"{path} can't be read: {cause.strerror}") from None


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `folder/tokenizer.json`. Raises CheckpointError when it's missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; save the model's tokenizer there (save_pretrained)")
    return tokenizer_files.read(SideFiles({path.name: folder}), {})


def check_ids(ids: Sequence[int] | Int64, tokenizer: Tokenizer, vocab_size: int, source: str) -> None:
    """Raise MismatchError when a token that occurs in a text has no row in a model of `vocab_size` rows.

    A tokenizer may know more tokens than that: published models have some which never occur in text.
    """
    if len(ids) and (largest := int(max(ids))) >= vocab_size:
        known = tokenizer.get_vocab_size(with_added_tokens=True)
        raise MismatchError(
            f"{source} holds the token {tokenizer.id_to_token(largest)!r} of id {largest}: the tokenizer "
            f"knows {known} tokens and the model only {vocab_size}; it belongs to another model"
        )


def beyond(tokenizer: Tokenizer, vocab_size: int) -> tuple[str, ...]:
    """A sentence when the tokenizer knows tokens that a model of `vocab_size` rows has none for."""
    count = sum(number >= vocab_size for number in tokenizer.get_vocab(with_added_tokens=True).values())
    if not count:
        return ()
    return (f"the tokenizer knows {count} tokens beyond the model's {vocab_size}; none is in this text",)


def check_tokenizers(text: SourceText, folders: Sequence[Path]) -> None:
    """Raise MismatchError when the tokenizers of two model folders read the start of `text` differently.

    Folders without a tokenizer.json are left out: they are read with the first one's tokens.
    """
    having = [folder for folder in folders if (folder / "tokenizer.json").is_file()]
    check_alike(text, [(folder, open_tokenizer(folder)) for folder in having])


def check_alike(text: SourceText, tokenizers: Sequence[tuple[Path, Tokenizer]]) -> None:
    """Raise MismatchError when the tokenizers of model folders read the start of `text` differently."""
    sample = text.content[:20_000]
    encoded = [(folder, _ids(tokenizer, sample)) for folder, tokenizer in tokenizers]
    for folder, ids in encoded[1:]:
        if ids != encoded[0][1]:
            raise MismatchError(
                f"the tokenizers of {encoded[0][0]} and {folder} split the same text differently; "
                "they belong to different models"
            )


def make(
    text: SourceText, tokenizer: Tokenizer, vocab_size: int, tokens: int = TOKENS, window: int = WINDOW
) -> Windows:
    """Windows of `window` tokens, about `tokens` in all, spread evenly over the text.

    An interval needs several windows, so a text that would give too few is cut into shorter ones.
    Raises DataError when the text is too short or the request senseless, MismatchError when a token of it is
    beyond a model of `vocab_size` tokens.
    """
    if window < MIN_WINDOW:
        raise DataError(f"a window of {window} tokens is too small; use at least {MIN_WINDOW}")
    if tokens < window:
        raise DataError(
            f"{tokens} tokens don't fill a window of {window}; measure on more, or take a shorter window"
        )
    ids = np.asarray(_ids(tokenizer, text.content), np.int64)
    start = _prefix(tokenizer)
    check_ids(np.concatenate([start, ids]), tokenizer, vocab_size, f"{text.source} text")
    window = min(window, max(MIN_WINDOW, len(ids) // MIN_WINDOWS + len(start)))
    body = window - len(start)
    pieces = [ids[at : at + body] for at in range(0, len(ids), body)]
    whole = [piece for piece in pieces if len(piece) == body]
    if not whole:
        # A text shorter than one window is one window, as long as it holds enough to say anything.
        whole = [piece for piece in pieces if len(piece) >= MIN_WINDOW]
    if not whole:
        raise DataError(
            f"{text.source} holds {len(ids)} tokens, too few to measure on; give at least {MIN_WINDOW}, "
            f"better {TOKENS}"
        )
    return Windows(
        text, tuple(np.concatenate([start, piece]) for piece in spread(whole, tokens // window)), window
    )


def pieces(text: str, source: str, tokenizer: Tokenizer, vocab_size: int, window: int) -> list[Int64]:
    """All windows of a text, the last of which may be shorter, but none under MIN_WINDOW.

    Raises MismatchError when a token of it is beyond a model of `vocab_size` tokens.
    """
    ids, start = np.asarray(_ids(tokenizer, text), np.int64), _prefix(tokenizer)
    check_ids(np.concatenate([start, ids]), tokenizer, vocab_size, f"{source} text")
    body = window - len(start)
    cut = [np.concatenate([start, ids[at : at + body]]) for at in range(0, len(ids), body)]
    return [piece for piece in cut if len(piece) >= min(MIN_WINDOW, window)]


def _ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    with tokenizer_json.told(
        "the model's tokenizer can't be used", CheckpointError, "save the model's again"
    ):
        return tokenizer.encode(text, add_special_tokens=special).ids


def _prefix(tokenizer: Tokenizer) -> Int64:
    """The tokens that the tokenizer puts before every text (BOS), usually none or one."""
    plain, whole = _ids(tokenizer, "a"), _ids(tokenizer, "a", special=True)
    for length in range(len(whole) - len(plain) + 1):
        if whole[length : length + len(plain)] == plain:
            return np.asarray(whole[:length], np.int64)
    return np.zeros(0, np.int64)


def spread(pieces: list[Int64], count: int) -> list[Int64]:
    """So many of the pieces, evenly from the first to the last; all where there are no more."""
    if count >= len(pieces):
        return pieces
    return [pieces[index * len(pieces) // count] for index in range(count)]
