"""The shape of a plan in JSON, as a JSON Schema; bundle.schema.json has it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXT = {"type": "string"}
_SIDE = {"type": "integer", "minimum": 1, "maximum": 1 << 24}
_STEP_FIELDS = {
    "module": _TEXT,
    "action": {"enum": ["merge", "branch", "keep"]},
    "source": _TEXT,
    "result": _TEXT,
    "shape": {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2},
    "options": {"type": "object"},
}
_ADAPTER_FIELDS = {"digest": _TEXT, "weight": {"type": "number"}}
_FIELDS: Mapping[str, Any] = {
    "version": {"type": "integer"},
    "mode": {"enum": ["merged", "branch"]},
    "weights": _TEXT,
    "others": _TEXT,
    "base": _TEXT,
    "options": {"type": "object"},
    "adapters": {
        "type": "array",
        "items": {"type": "object", "required": list(_ADAPTER_FIELDS), "properties": _ADAPTER_FIELDS},
    },
    "steps": {
        "type": "array",
        "items": {"type": "object", "required": list(_STEP_FIELDS), "properties": _STEP_FIELDS},
    },
    "projection": {
        "oneOf": [
            {"type": "null"},
            {"type": "object", "required": ["digest"], "properties": {"digest": _TEXT}},
        ]
    },
}
SCHEMA = {"type": "object", "required": list(_FIELDS), "properties": _FIELDS}
