"""Patterns of module names in a checkpoint's config: matched in bounded time, whatever they are.

Python's `re` goes back over a text as often as a pattern makes it: `(a+)+$` takes twice as long for each
letter more. Patterns that could are matched here by the set of places where each part may end, which takes
at most the square of a name's length for each part.
"""

from __future__ import annotations

import re
import re._constants as codes  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable
from typing import Any

_LONGEST_PATTERN, _LONGEST_NAME = 512, 512
_MOST_REPEATS = 64  # of a counted part, {64}
_FAST = 2  # unbounded parts one after the other that `re` may try against each other
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    codes.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    codes.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}
_BEGINS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING)
_PLACES = (*_BEGINS, codes.AT_END, codes.AT_END_STRING)
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)


class NamePattern:
    """A regular expression that a name must begin with, as `re.match` takes it, without back-references."""

    def __init__(self, text: str) -> None:
        """Raises ValueError, saying why, for what is no pattern, or one that isn't matched here."""
        if len(text) > _LONGEST_PATTERN:
            raise ValueError(f"it is longer than {_LONGEST_PATTERN} characters")
        try:
            self._tree = parser.parse(text)
            self._quick = re.compile(text)
        except (re.error, OverflowError, RecursionError) as cause:
            raise ValueError(f"it is no regular expression: {cause}") from None
        if self._quick.flags != re.UNICODE.value:
            raise ValueError("it sets flags")
        repeats = [_check(node) for node in self._tree]
        self._is_fast = sum(repeats) <= _FAST

    def matches(self, name: str) -> bool:
        """Whether `name` begins with it. Raises ValueError for a name that is longer than any."""
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"a name of {len(name)} characters is longer than any")
        if self._is_fast:
            return self._quick.match(name) is not None
        return bool(_Run(name).sequence(self._tree, {0}))


def _check(node: tuple[Any, Any]) -> int:
    """How many parts repeat; many where one is in another. Raises ValueError on what isn't known."""
    kind, value = node
    if kind in _REPEATS:
        least, most, inner = value
        within = sum(map(_check, inner))
        plain = len(inner) == 1 and inner[0][0] in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
        if (most != codes.MAXREPEAT and most > _MOST_REPEATS) or least > _MOST_REPEATS:
            raise ValueError(f"it counts over {_MOST_REPEATS} repeats")
        return (1 if plain else _FAST + 1) + within * (_FAST + 1) if most > 1 else within
    if kind is codes.SUBPATTERN:
        if value[1] or value[2]:
            raise ValueError("it sets flags")
        return sum(map(_check, value[3]))
    if kind is codes.BRANCH:
        return sum(_check(each) for branch in value[1] for each in branch)
    if kind in (codes.ASSERT, codes.ASSERT_NOT) and value[0] > 0:
        return sum(map(_check, value[1]))
    if kind is codes.AT and value in _PLACES:
        return 0
    if kind in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
        return 0
    raise ValueError("it has a part other than letters, sets, groups, choices, repeats and looks ahead")


class _Run:
    """One name: where each part of a pattern may end."""

    def __init__(self, name: str) -> None:
        self._name, self._known = name, dict[tuple[int, int], frozenset[int]]()

    def sequence(self, nodes: Iterable[Any], starts: set[int]) -> set[int]:
        for node in nodes:
            starts = {end for start in starts for end in self._ends(node, start)}
            if not starts:
                break
        return starts

    def _ends(self, node: Any, start: int) -> frozenset[int]:
        key = (id(node), start)  # the pattern keeps its parts while this runs
        if key not in self._known:
            self._known[key] = frozenset(self._part(node, start))
        return self._known[key]

    def _part(self, node: Any, start: int) -> Iterable[int]:
        kind, value = node
        if kind in _REPEATS:
            least, most, inner = value
            return self._repeats(least, most, inner, start)
        if kind is codes.SUBPATTERN:
            return self.sequence(value[3], {start})
        if kind is codes.BRANCH:
            return {end for branch in value[1] for end in self.sequence(branch, {start})}
        if kind in (codes.ASSERT, codes.ASSERT_NOT):
            found = bool(self.sequence(value[1], {start}))
            return {start} if found is (kind is codes.ASSERT) else ()
        if kind is codes.AT:
            begins = value in _BEGINS
            at_end = start == len(self._name) or (value is codes.AT_END and self._name[start:] == "\n")
            return {start} if (start == 0 if begins else at_end) else ()
        return {start + 1} if start < len(self._name) and _is_of(self._name[start], kind, value) else ()

    def _repeats(self, least: int, most: Any, inner: Any, start: int) -> set[int]:
        ends, seen, found = {start}, {start}, {start} if least == 0 else set[int]()
        for count in range(1, least + 1):
            ends = self.sequence(inner, ends)
            if count == least:
                found = seen = set(ends)
        rounds = len(self._name) + 1 if most == codes.MAXREPEAT else int(most) - least
        for _ in range(rounds):
            ends = self.sequence(inner, ends) - seen
            if not ends:
                break
            seen, found = seen | ends, found | ends
        return found


def _is_of(char: str, kind: Any, value: Any) -> bool:
    """Whether a character is one that a part of one character takes."""
    if kind is codes.ANY:
        return char != "\n"
    if kind is codes.IN:
        negated = value[0][0] is codes.NEGATE
        return any(_is_of(char, *each) for each in value[negated:]) is not negated
    if kind is codes.RANGE:
        return bool(value[0] <= ord(char) <= value[1])
    if kind is codes.CATEGORY:
        return _CATEGORIES[value](char)
    return (ord(char) == value) is (kind is codes.LITERAL)
