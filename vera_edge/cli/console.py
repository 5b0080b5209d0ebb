"""What is drawn with rich: tables, and the bar. It is loaded when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from vera_edge import printable
from vera_edge import progress as progress_protocol

_WIDE = 1000  # columns


class _Console(Console):
    """A console that shows control characters of texts instead of obeying them, in cells of tables too."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, as `printable` has it."""
        return super().render_str(printable.lines(text), **options)


def out() -> Console:
    """The console for results (stdout); square brackets are text, as a folder's name may hold some.

    Into a file or a pipe every line goes whole, those of tables too.
    """
    terminal = sys.stdout.isatty()
    return _Console(highlight=False, markup=False, soft_wrap=not terminal, width=None if terminal else _WIDE)


def err() -> Console:
    """The console for talk (stderr): that of the bar while one is drawn, so that lines come above it."""
    return (
        drawing[-1]
        if drawing
        else _Console(stderr=True, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())
    )


class _Speed(TransferSpeedColumn):
    """Bytes per second, of what is counted in bytes."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names

    def render(self, task: Task) -> Text:
        return super().render(task) if task.description in self._names else Text()


drawing: list[Console] = []  # the console that a bar is drawn on, while one is


@contextmanager
def _drawn_on(console: Console) -> Iterator[None]:
    drawing.append(console)
    try:
        yield
    finally:
        drawing.pop()


@contextmanager
def progress_bar(quiet: bool = False, in_bytes: Collection[str] = ()) -> Iterator[progress_protocol.Progress]:
    """A Progress drawn on stderr while the block runs; nothing when stderr isn't a terminal or `quiet`.

    in_bytes: what is counted in bytes, and so shown with its speed.
    """
    console = err()
    if quiet or not console.is_terminal:
        yield progress_protocol.silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Speed(in_bytes),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _drawn_on(console), Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
