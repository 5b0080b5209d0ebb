"""A tokenizer.json given to the tokenizers package, whose complaints are told as ours.

The package raises bare Exception, also when it is used: a vocabulary may lack its own unknown token. A panic
of its Rust part is no Exception at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer

from vera_edge.errors import VeraEdgeError


def parse(text: str, where: object, error: type[VeraEdgeError], advice: str) -> Tokenizer:
    """The tokenizer of a file's text. Raises `error` when the package reads none of it."""
    with told(f"{where} isn't a tokenizer that the tokenizers package reads", error, advice):
        return Tokenizer.from_str(text)


@contextmanager
def told(what: str, error: type[VeraEdgeError], advice: str) -> Iterator[None]:
    """Raise `error` for whatever the package raises, but for text that is none."""
    try:
        yield
    except (VeraEdgeError, UnicodeEncodeError, TypeError):
        raise
    except BaseException as cause:
        if not complains(cause):
            raise
        raise error(f"{what} ({_short(cause)}); {advice}") from None


def complains(cause: BaseException) -> bool:
    """Whether that is an exception or a panic, and not the end of the process."""
    return isinstance(cause, Exception) or type(cause).__name__ == "PanicException"


def _short(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__
