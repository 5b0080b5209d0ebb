"""The members of a request's JSON, each checked as it's read; what isn't read is refused by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from vera_edge.errors import DataError
from vera_edge.serving.refusal import RefusedRequestError
from vera_edge.storage.json_text import SHORT, Bound, parse_json


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a body; raises RefusedRequestError (400) on anything else."""
    try:
        value = parse_json(data, "the body", DataError, Bound(max(len(data), 1), SHORT.values))
    except DataError as cause:
        reason = str(cause).partition("; copy")[0]
        raise RefusedRequestError(400, f"{reason}; send a JSON object", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RefusedRequestError(400, "the body isn't a JSON object; send one", code="invalid_json")
    return value


def wrong(name: str, message: str, code: str | None = None) -> RefusedRequestError:
    """A refusal that names the member at fault."""
    return RefusedRequestError(400, f"{name} {message}", param=name, code=code)


class Fields:
    """Reads members by name. null counts as left out, as OpenAI has it."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self._read: set[str] = set()

    def raw(self, name: str) -> Any:
        """The member as it is, None where there is none."""
        self._read.add(name)
        return self._body.get(name)

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.raw(name)
        if not isinstance(value, str) or not value:
            raise wrong(name, "is missing; give a string" if value is None else "must be a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(name, "must be true or false")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number from `least` to `most`."""
        value = self.raw(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise wrong(name, f"must be a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number from `least` to `most`."""
        value = self.raw(name)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise wrong(name, f"must be a whole number from {least} to {most}")
        return value

    def object(self, name: str) -> Mapping[str, Any]:
        """An object, empty where there is none."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise wrong(name, "must be an object")
        return value

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse any value but these, for what isn't done here; a value that asks for nothing passes."""
        value = self.raw(name)
        if value is not None and value not in allowed:
            raise wrong(name, why, code="unsupported_parameter")

    def end(self, ignored: Collection[str]) -> None:
        """Refuse members that nothing read: a mistyped one would be obeyed by nobody, in silence."""
        for name in self._body:
            if name not in self._read and name not in ignored:
                raise RefusedRequestError(400, f"{name!r} isn't known here", name, "unknown_parameter")
