"""JSON that is wrong in one place: values of another type or size, keys gone or twice, deep nesting.

A document is taken apart into lists (arrays) and `Pairs` (objects, where a key may stand twice), changed, and
written again; what JSON has no number or text for is written as it stands (`Raw`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any


class Pairs(list[Any]):
    """Of [key, value]; a list that isn't an array."""


class Raw(str):
    """Characters that go into the text as they are."""


NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1,
    1 << 63, 1 << 64, -(1 << 63) - 1, 1 << 70, 10**400, 0.5, -0.5, 1e-320, 1e308, -1e308,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-0.0"), Raw("1" * 5000),
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "a", "0", "-1", "1e5", "nan", "None", "..", "../../etc/passwd", "/etc/passwd", "a/../b", "C:\\x",
    "con", ".", "./", "\x00", "a\x00b", "a\nb", "\x1b[31m", "\r", "\u2028", "\u202e", "é", "١٢", "🙂",
    "(a+)+$", "re:(a|a)*b", "re:[", "[", "{", "%s", "{0}", "{{ 1 }}", "*", "$", "~", "~nobody/x", "a" * 300,
    Raw(r'"\ud800"'), Raw(r'"a\udfffb"'), Raw('"' + "a" * 100_000 + '"'), Raw('"' + "é" * 5_000 + '"'),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, [], Pairs(), [[]], [None], [0], [""], Pairs([["", None]]), Pairs([["a", Pairs()]]),
    Raw("[" * 200 + "]" * 200), Raw("[" * 100_000), Raw("[" * 3_000 + "]" * 3_000),
    Raw('{"a":' * 1_500 + "1" + "}" * 1_500), Raw("[" + "0," * 20_000 + "0]"), Raw("tru"), Raw(""),
)  # fmt: skip


def parse(text: bytes) -> Any:
    """A document with objects as `Pairs`. Raises ValueError when it's no JSON."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def write(value: Any) -> bytes:
    """The text of a document."""
    return _text(value).encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{_key(key)}:{_text(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value, ensure_ascii=True)


def _key(key: Any) -> str:
    return key if isinstance(key, Raw) else json.dumps(str(key))


def plain(value: Any) -> Any:
    """A document as Python reads it, of the last of equal keys. Raises ValueError on what is no JSON."""
    return json.loads(write(value))


Place = tuple[Any, int]  # a list or Pairs, and where in it


def places(value: Any) -> list[Place]:
    """Every place of a document that holds a value."""
    found: list[Place] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, list):
            continue
        for index, item in enumerate(node):
            found.append((node, index))
            waiting.append(item[1] if isinstance(node, Pairs) else item)
    return found


def get(place: Place) -> Any:
    node, index = place
    return node[index][1] if isinstance(node, Pairs) else node[index]


def put(place: Place, value: Any) -> None:
    node, index = place
    if isinstance(node, Pairs):
        node[index] = [node[index][0], value]
    else:
        node[index] = value


def strange(draw: Random, old: Any, all_places: list[Place]) -> Any:
    """A value that may stand where `old` stood: near it, of its type, of another, or from elsewhere.

    Always a copy: it is changed in its turn, and could come to lie in itself.
    """
    way = draw.random()
    if way < 0.35:
        return deepcopy(_near(draw, old))
    if way < 0.5:
        return deepcopy(get(draw.choice(all_places)))
    return any_value(draw)


def any_value(draw: Random) -> Any:
    """A value that few readers expect."""
    return deepcopy(draw.choice(draw.choice((NUMBERS, TEXTS, OTHERS))))


def _near(draw: Random, old: Any) -> Any:
    if isinstance(old, bool):
        return draw.choice((not old, int(old), str(old).lower()))
    if isinstance(old, int) and abs(old) > 1 << 200:  # no float
        return draw.choice((old + 1, -old, old // 2, str(old), [old]))
    if isinstance(old, int):
        return draw.choice(
            (old + 1, old - 1, -old, old * 2, old // 2, old + 0.5, str(old), float(old), [old])
        )
    if isinstance(old, float):
        return draw.choice((-old, old * 1e30, old / 3, round(old, 1), str(old), [old]))
    if isinstance(old, str):
        at = draw.randrange(len(old) + 1)
        more = draw.choice(("", "x", ".", "/", "\n", "0", " ", "\x00", "é", "-"))
        return draw.choice((old[:at] + more + old[at:], old[:at], old[at:], old.upper(), old * 3, [old]))
    if isinstance(old, list):
        return draw.choice(
            (type(old)(), type(old)(old * 2), type(old)(old[:1]), [old], type(old)(reversed(old)))
        )
    return draw.choice((0, "", [], Pairs()))


def _replace(draw: Random, all_places: list[Place]) -> None:
    place = draw.choice(all_places)
    put(place, strange(draw, get(place), all_places))


def _remove(draw: Random, all_places: list[Place]) -> None:
    node, index = draw.choice(all_places)
    del node[index]


def _repeat(draw: Random, all_places: list[Place]) -> None:
    node, index = draw.choice(all_places)
    node.insert(draw.randrange(len(node) + 1), deepcopy(node[index]))


def _swap(draw: Random, all_places: list[Place]) -> None:
    one, other = draw.choice(all_places), draw.choice(all_places)
    first, second = get(one), get(other)
    if not (isinstance(first, list) or isinstance(second, list)):  # a list could come to lie in itself
        put(one, second)
        put(other, first)


def _rename(draw: Random, all_places: list[Place]) -> None:
    keyed = [place for place in all_places if isinstance(place[0], Pairs)]
    if not keyed:
        return
    node, index = draw.choice(keyed)
    other, at = draw.choice(keyed)
    key = other[at][0] if draw.random() < 0.5 else _key_text(draw, str(node[index][0]))
    node[index] = [key, node[index][1]]


def _key_text(draw: Random, old: str) -> Any:
    found = _near(draw, old) if draw.random() < 0.5 else draw.choice(TEXTS)
    return found if isinstance(found, str) else old


def _add(draw: Random, all_places: list[Place]) -> None:
    node, index = draw.choice(all_places)
    value = strange(draw, get((node, index)), all_places)
    node.insert(index, [_key_text(draw, "x"), value] if isinstance(node, Pairs) else value)


_CHANGES: tuple[Callable[[Random, list[Place]], None], ...] = (
    _replace, _replace, _replace, _replace, _remove, _repeat, _swap, _rename, _add,
)  # fmt: skip


def several(draw: Random, most: int) -> int:
    """1, now and then more."""
    count = 1
    while count < most and draw.random() < 0.4:
        count += 1
    return count


def changed(value: Any, draw: Random) -> Any:
    """`value` with one to four changes; it is changed in place where it can be."""
    for _ in range(several(draw, 4)):
        found = places(value)
        if not found or draw.random() < 0.02:
            return any_value(draw)
        draw.choice(_CHANGES)(draw, found)
        if len(found) > 20_000:
            break
    return value
