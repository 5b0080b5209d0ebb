"""Does a JSON value have the shape that a JSON Schema says? The part of draft 2020-12 that our schemas use.

For devices, which have no jsonschema package; a schema with a keyword that isn't known here is a bug of ours.
Two things are stricter than the standard: 1.0 is no integer, and `$` is the end of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

_Schema = Mapping[str, Any]
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
# What says nothing of a value, and what is read together with its neighbour.
_SILENT = frozenset({"$schema", "$id", "$defs", "title", "description"})
_SHOWN = 80  # characters of a value in a message


def problem(value: Any, schema: _Schema) -> str | None:
    """The first thing at which `value` isn't what `schema` says, as "files['a'].size is -1, ..."; or None."""
    found = next(_problems(value, schema, schema, ""), None)
    return None if found is None else found.lstrip(".")


def _problems(value: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    for keyword, wanted in schema.items():
        if keyword not in _SILENT:
            yield from _KEYWORDS[keyword](value, wanted, schema, root, place)


def _type(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    names = [wanted] if isinstance(wanted, str) else wanted
    if not any(_TYPES[name](value) for name in names):
        yield f"{place} is {_short(value)} where {' or '.join(map(_with_article, names))} belongs"


def _enum(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if not any(type(value) is type(each) and value == each for each in wanted):
        yield f"{place} is {_short(value)}, not {' or '.join(map(str, wanted))}"


def _const(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    return _enum(value, [wanted], schema, root, place)


def _pattern(value: Any, wanted: str, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if isinstance(value, str) and not _compiled(wanted).search(value):
        yield f"{place} is {_short(value)}, which isn't written as it must be"


def _required(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{place} has no {key}" for key in wanted if key not in value)


def _properties(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in wanted.items():
            if key in value:
                yield from _problems(value[key], inner, root, f"{place}.{key}")


def _others(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for key in value:
            if key not in known:
                yield from _problems(value[key], wanted, root, f"{place}[{_short(key)}]")


def _names(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key in value:
            yield from _problems(key, wanted, root, f"{place}: a name")


def _items(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for number in range(len(schema.get("prefixItems", ())), len(value)):
            yield from _problems(value[number], wanted, root, f"{place}[{number}]")


def _prefix(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, (each, inner) in enumerate(zip(value, wanted, strict=False)):
            yield from _problems(each, inner, root, f"{place}[{number}]")


def _reference(value: Any, wanted: str, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    return _problems(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, place)


def _all(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    for each in wanted:
        yield from _problems(value, each, root, place)


def _one(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
    found = [next(_problems(value, each, root, place), None) for each in wanted]
    fits = found.count(None)
    if fits > 1:
        yield f"{place} is two things at once: {_short(value)}"
    if not fits:
        yield str(found[-1])  # the schemas put null first


def _bound(holds: Callable[[Any, Any], bool], what: str, kinds: Any, of: Callable[[Any], Any]) -> Any:
    def check(value: Any, wanted: Any, schema: _Schema, root: _Schema, place: str) -> Iterator[str]:
        if isinstance(value, kinds) and not isinstance(value, bool) and not holds(of(value), wanted):
            yield f"{place} is {_short(value)}; {what.format(wanted)}"

    return check


def _least(found: Any, wanted: Any) -> bool:
    return bool(found >= wanted)


def _most(found: Any, wanted: Any) -> bool:
    return bool(found <= wanted)


_KEYWORDS: Mapping[str, Callable[[Any, Any, _Schema, _Schema, str], Iterator[str]]] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "pattern": _pattern,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _others,
    "propertyNames": _names,
    "items": _items,
    "prefixItems": _prefix,
    "$ref": _reference,
    "allOf": _all,
    "oneOf": _one,
    "minimum": _bound(_least, "it must be at least {}", (int, float), lambda value: value),
    "maximum": _bound(_most, "it must be at most {}", (int, float), lambda value: value),
    "minLength": _bound(_least, "it must have at least {} characters", str, len),
    "maxLength": _bound(_most, "it must have at most {} characters", str, len),
    "minItems": _bound(_least, "it must have at least {} items", list, len),
    "maxItems": _bound(_most, "it must have at most {} items", list, len),
    "minProperties": _bound(_least, "it must have at least {} entries", dict, len),
    "maxProperties": _bound(_most, "it must have at most {} entries", dict, len),
}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("$", r"\Z"))


def _with_article(name: str) -> str:
    return name if name == "null" else f"an {name}" if name[0] in "aio" else f"a {name}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
