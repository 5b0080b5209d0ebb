"""How the library tells how far it is, and what a person should hear: callables, so that it never prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: `progress(what, done, total)`; `total` is in the unit of `done`."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def silent(what: str, done: int, total: int) -> None:
    """A Progress that says nothing."""


class Tell(Protocol):
    """Given one sentence for a person as it arises: who signed a bundle, what was assumed of a base."""

    def __call__(self, sentence: str) -> None: ...


def unheard(sentence: str) -> None:
    """A Tell that nobody hears."""
