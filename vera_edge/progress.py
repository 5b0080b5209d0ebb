"""How the library tells how far it is: one callable, so that it never prints and never owns a bar."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: `progress(what, done, total)`; `total` is in the unit of `done`."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def silent(what: str, done: int, total: int) -> None:
    """A Progress that says nothing."""
