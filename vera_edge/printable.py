"""Text that may hold what a stranger's file says, made fit for a terminal.

A name in a checkpoint or a bundle can hold a line break, which would look like a sentence of ours, or an
escape sequence, which a terminal obeys. Such characters are shown as Python writes them: `\\n`, `\\x1b`.
"""

from __future__ import annotations

import unicodedata

# Control characters, halves of surrogate pairs, line and paragraph separators.
_REFUSED = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # what follows them


def line(text: object) -> str:
    """The text in one line, without a character that does anything but show."""
    return "".join(_shown(mark) for mark in str(text))


def lines(text: object) -> str:
    """The same, but for line breaks and tabs, which are ours."""
    return "".join(mark if mark in "\n\t" else _shown(mark) for mark in str(text))


def _shown(mark: str) -> str:
    if mark.isascii() and mark.isprintable():
        return mark
    if unicodedata.category(mark) in _REFUSED or mark in _TURNING:
        return mark.encode("unicode_escape").decode()
    return mark
