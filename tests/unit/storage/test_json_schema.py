"""The checker of JSON Schema: every keyword that it knows, and that the shipped schema needs no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vera_edge.bundle import contents
from vera_edge.storage.json_schema import problem

SCHEMA = json.loads(Path(contents.__file__).with_name("bundle.schema.json").read_bytes())


@pytest.mark.parametrize(
    ("schema", "sound", "wrong", "said"),
    [
        ({"type": "integer"}, 3, True, "is True where an integer belongs"),
        ({"type": "integer"}, 3, 3.0, "an integer"),
        ({"type": "number"}, 0.5, False, "a number"),
        ({"type": ["string", "null"]}, None, [], r"is \[\] where a string or null belongs"),
        ({"const": 1}, 1, True, "is True, not 1"),
        ({"enum": ["a", "b"]}, "b", ["a"], r"is \['a'\], not a or b"),
        ({"pattern": "^[a-z]+$"}, "ab", "ab\n", "isn't written as it must be"),
        ({"minimum": 1}, 1, 0, "is 0; it must be at least 1"),
        ({"maximum": 1}, 1, 1.5, "at most 1"),
        ({"minLength": 2}, "ab", "a", "at least 2 characters"),
        ({"maxLength": 2}, "ab", "abc", "at most 2 characters"),
        ({"minItems": 1}, [0], [], "at least 1 items"),
        ({"maxItems": 1}, [0], [0, 1], "at most 1 items"),
        ({"minProperties": 1}, {"a": 1}, {}, "at least 1 entries"),
        ({"maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}, "at most 1 entries"),
        ({"required": ["a"]}, {"a": None}, {}, "has no a"),
        ({"properties": {"a": {"type": "null"}}}, {"b": 1}, {"a": 1}, "a is 1 where null belongs"),
        (
            {"additionalProperties": {"type": "null"}},
            {"a": None},
            {"a": 1},
            r"\['a'\] is 1 where null belongs",
        ),
        ({"propertyNames": {"maxLength": 1}}, {"a": 1}, {"ab": 1}, "a name is 'ab'"),
        ({"items": {"type": "null"}}, [None], [None, 1], r"\[1\] is 1"),
        (
            {"prefixItems": [{"type": "null"}], "items": {"type": "string"}},
            [None, "a"],
            [None, 1],
            r"\[1\] is 1",
        ),
        ({"prefixItems": [{"type": "null"}]}, [None, 1], [1], r"\[0\] is 1"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}}, None, 1, "is 1 where null belongs"),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, 2, 3, "at most 2"),
        ({"oneOf": [{"type": "null"}, {"type": "string"}]}, None, 1, "is 1 where a string belongs"),
        ({"oneOf": [{"minimum": 1}, {"minimum": 2}]}, 1, 3, "two things at once"),
    ],
)
def test_every_keyword(schema: dict[str, Any], sound: Any, wrong: Any, said: str) -> None:
    assert problem(sound, schema) is None
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(problem(wrong, schema))


def test_the_shipped_schema_has_no_keyword_that_is_not_known() -> None:
    from vera_edge.storage import json_schema

    def walk(schema: dict[str, Any]) -> None:
        assert not schema.keys() - json_schema._KEYWORDS.keys() - json_schema._SILENT
        for key in ("properties", "$defs"):
            for inner in schema.get(key, {}).values():
                walk(inner)
        for key in ("additionalProperties", "propertyNames", "items"):
            if key in schema:
                walk(schema[key])
        for key in ("oneOf", "allOf", "prefixItems"):
            for inner in schema.get(key, []):
                walk(inner)

    walk(SCHEMA)
