"""Options under the names of earlier versions: they go on working for a release, with a note."""

from __future__ import annotations

from collections.abc import Sequence

_RENAMED = {
    "--output": "--out",
    "--projection-dtype": "--projection-rounding",
    "--projections-dtype": "--store-projections",
    "--projections": "--projections-from",
}


def respelled(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command with its options under today's names, and a note for each that had another."""
    today, notes = list(words), []
    for place, word in enumerate(words):
        if word == "--":  # what follows are arguments
            break
        name, equals, value = word.partition("=")
        if name in _RENAMED:
            today[place] = f"{_RENAMED[name]}{equals}{value}"
            notes.append(f"{name} is called {_RENAMED[name]} now; write that")
    return today, list(dict.fromkeys(notes))
