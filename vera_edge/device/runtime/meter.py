"""What a rendering may cost, and how large values are: steps, characters, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2

MAX_STEPS = 2_000_000  # turns of loops, calls, filters, pieces of text; a long chat takes some ten thousand
MAX_CHARACTERS = 1 << 26  # of all that is put out or captured; a million tokens are 4 million
MAX_AT_ONCE = 1 << 25  # characters or items of one value
MAX_SECONDS = 20.0


class TooMuchError(jinja2.TemplateError):
    """A template took more than it may."""


class Meter:
    """What one rendering has left."""

    def __init__(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_CHARACTERS
        self.end = time.monotonic() + MAX_SECONDS

    def spend(self, characters: int = 0) -> None:
        """Count one step that made `characters`. Raises TooMuchError once nothing is left."""
        self.steps -= 1
        self.characters -= characters
        if self.steps < 0:
            raise TooMuchError(f"it takes more than {MAX_STEPS} steps")
        if self.characters < 0:
            raise TooMuchError(f"it makes more than {MAX_CHARACTERS} characters")
        if time.monotonic() > self.end:
            raise TooMuchError(f"it takes more than {MAX_SECONDS:.0f} seconds")


_meter: ContextVar[Meter] = ContextVar("meter")


def current() -> Meter:
    """What the rendering at work has left."""
    return _meter.get()


@contextmanager
def metered() -> Iterator[None]:
    """Give what renders within a fresh meter."""
    token = _meter.set(Meter())
    try:
        yield
    finally:
        _meter.reset(token)


def counted(values: Iterator[Any]) -> Iterator[Any]:
    """The same, a step each."""
    meter = current()
    for value in values:
        meter.spend()
        yield value


def check_size(size: int) -> None:
    """Raise TooMuchError for more characters or items than one value may have."""
    if size > MAX_AT_ONCE:
        raise TooMuchError(f"it makes more than {MAX_AT_ONCE} characters at once")


def held_items(value: Any) -> Any:
    """An iterator's items as a list, so that they can be measured; else the value."""
    return list(counted(value)) if isinstance(value, Iterator) else value


def length_of(value: Any) -> int:
    """The characters or items of a value, without those of its items."""
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set)) else 0


def size_of(value: Any) -> int:
    """About the characters of a value's text. Raises TooMuchError when it is too large to be written.

    A list that holds one list many times is short in memory and long as text.
    """
    size = len(value) if isinstance(value, str) else _weigh(value, {})
    check_size(size)
    return size


def _weigh(value: Any, known: dict[int, int]) -> int:
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, Mapping):
        parts: Iterable[Any] = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set)):
        parts = value
    else:
        return 8
    if id(value) not in known:
        known[id(value)] = 2 + sum(2 + _weigh(part, known) for part in parts)
    return known[id(value)]
