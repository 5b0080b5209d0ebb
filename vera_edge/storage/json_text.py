"""JSON as files hold it: what vera-edge writes, and a reader that trusts nothing.

Python objects take ten to forty times the room of their JSON, and Python's own reader has no bounds, takes
halves of characters (lone surrogates) that can't be written again, and gives integers that no float holds.
Every JSON that comes from a checkpoint, an adapter or a bundle is read here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.errors import VeraEdgeError

_DEEPEST = 64  # objects and lists in each other
_DIGITS = 300  # of an integer; every float is shorter, tokenizers write 10**30 for "no limit"
# A code unit of UTF-16 that means nothing without another one, as JSON escapes it.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Bound:
    """The most that a kind of file may hold: bytes of text, and values (counted by what separates them)."""

    size: int
    values: int


SETTINGS = Bound(16 << 20, 1_000_000)  # configs, and all that has no bound of its own
TABLE = Bound(64 << 20, 4_000_000)  # a line for each tensor, token or layer, and golden vectors
SHORT = Bound(1 << 20, 50_000)  # what describes one weight


def canonical_json(value: Any) -> bytes:
    """`value` as UTF-8 JSON with sorted keys, two-space indent and a final newline.

    Raises ValueError on NaN and infinities: they aren't JSON, and never belong in a record.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def settings_json(value: Any) -> bytes:
    """A model's own settings, as `canonical_json` but with the NaN and infinities that they may hold.

    They stand there as Python writes them, and as transformers reads them.
    """
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, error: type[VeraEdgeError], bound: Bound = SETTINGS) -> dict[str, Any]:
    """The JSON object in `path`; raises `error` when it's missing, unreadable, too large or not an object."""
    value = read_value(path, error, bound)
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__} where an object belongs")
    return value


def read_value(path: Path, error: type[VeraEdgeError], bound: Bound = SETTINGS) -> Any:
    """The JSON value in `path`, as `read_json`."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise error(f"{path} isn't a plain file; copy or download it again")
        with path.open("rb") as stream:
            data = stream.read(bound.size + 1)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as cause:
        raise error(f"{path} can't be read: {cause.strerror}") from None
    return parse_json(data, str(path), error, bound)


def parse_json(data: bytes, what: str, error: type[VeraEdgeError], bound: Bound = SETTINGS) -> Any:
    """The value of a JSON text; `what` names it in what `error` says.

    Infinities and NaN are read, as Python does. Refused: more than `bound`, what isn't UTF-8, lone
    surrogates, nesting and integers beyond any use.
    """
    if len(data) > bound.size:
        raise error(f"{what} is over {_mebibytes(bound.size)} of JSON, which nothing sound is; copy it again")
    if sum(map(data.count, (b",", b"[", b"{"))) > bound.values:
        raise error(f"{what} holds over {bound.values} JSON values, which nothing sound does; copy it again")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_int=_integer)
        if not _is_shallow(value):
            raise ValueError(f"more than {_DEEPEST} levels of nesting")
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(
            f"{what} isn't valid JSON (half of a character, a lone surrogate); copy it again"
        ) from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} isn't valid JSON ({cause}); copy or download it again") from None
    return value


def _mebibytes(size: int) -> str:
    return f"{size >> 20} MiB"


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _is_shallow(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, dict) else each
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return True
    return False
