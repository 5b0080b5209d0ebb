"""Inputs that are nearly right: one seed, changed where its form says that it can go wrong.

Everything drawn comes from the `Random` that is given, so an input can be made again from its number.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from enum import Enum
from random import Random
from typing import Any

from tests.fuzzing import json_text
from tests.fuzzing.json_text import Pairs, Raw

_SIZES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40,
          1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "U8", "I8", "BOOL", "F8_E4M3", "F4", "f32", "")
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_TOKEN = re.compile(rb"\s+|[A-Za-z_][A-Za-z0-9_]*|[0-9.]+|[^\sA-Za-z0-9_]{1,2}")
_MOST = 4 << 20  # bytes: what the largest input may grow to


class Form(Enum):
    """What an input's bytes are, which decides how it's changed."""

    JSON = "json"
    TEXT = "text"
    TOML = "toml"
    HTTP = "http"
    SAFETENSORS = "safetensors"
    BINARY = "binary"


def mutate(data: bytes, form: Form, draw: Random, words: tuple[str, ...] = ()) -> bytes:
    """`data` with a change or a few. words: what text of this form is made of beside what is there."""
    by_form: Callable[[], bytes] = {
        Form.JSON: lambda: _json(data, draw),
        Form.TEXT: lambda: _text(data, draw, words),
        Form.TOML: lambda: _toml(data, draw, words),
        Form.HTTP: lambda: _http(data, draw, words),
        Form.SAFETENSORS: lambda: _safetensors(data, draw),
        Form.BINARY: lambda: _bytes(data, draw),
    }[form]
    found = by_form() if draw.random() < 0.9 else _bytes(data, draw)
    return found[:_MOST]


def _json(data: bytes, draw: Random) -> bytes:
    try:
        return json_text.write(json_text.changed(json_text.parse(data), draw))
    except ValueError:
        return _bytes(data, draw)


def _bytes(data: bytes, draw: Random) -> bytes:
    for _ in range(json_text.several(draw, 8)):
        data = draw.choice(_BYTE_CHANGES)(data, draw)
    return data


def _flip(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data) or 1)
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :] if data else data


def _set(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data) or 1)
    return data[:at] + bytes([draw.choice((0, 0xFF, 0x80, 0x7F, 10, 34, 92))]) + data[at + 1 :]


def _cut(data: bytes, draw: Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _drop(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[at + draw.choice((1, 2, 4, 8, 16, 100)) :]


def _insert(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.choice((1, 2, 4, 8, 100))) + data[at:]


def _double(data: bytes, draw: Random) -> bytes:
    at, size = draw.randrange(len(data) + 1), draw.choice((1, 4, 8, 32, 200))
    return data[:at] + data[at : at + size] * draw.choice((1, 2, 50)) + data[at:]


def _length(data: bytes, draw: Random) -> bytes:
    """Another number where a small one stands, as lengths, counts and offsets are: 4 or 8 bytes."""
    width = draw.choice((4, 8))
    spots = [
        at
        for at in range(min(len(data), 4096) - width + 1)
        if 0 < int.from_bytes(data[at : at + width], "little") < 1 << 16
    ]
    if not spots:
        return _flip(data, draw)
    at = draw.choice(spots)
    old = int.from_bytes(data[at : at + width], "little")
    new = draw.choice((old + 1, old - 1, old * 2, old << 16, *_SIZES)) % (1 << (8 * width))
    return data[:at] + new.to_bytes(width, "little") + data[at + width :]


def _prefix(data: bytes, draw: Random) -> bytes:
    return draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\n", b"PK\x03\x04")) + data


def _recode(data: bytes, draw: Random) -> bytes:
    try:
        return data.decode().encode(draw.choice(("utf-16", "utf-16-le", "utf-32", "latin-1")))
    except ValueError:
        return data


_BYTE_CHANGES = (
    _flip, _flip, _set, _cut, _drop, _insert, _double, _length, _length, _length, _prefix, _recode,
)  # fmt: skip


def _text(data: bytes, draw: Random, words: tuple[str, ...]) -> bytes:
    """Words of a text swapped, dropped, doubled, or replaced by others of its language."""
    parts = _TOKEN.findall(data)
    for _ in range(json_text.several(draw, 5)):
        if not parts:
            break
        at, way = draw.randrange(len(parts)), draw.random()
        if way < 0.45:
            parts[at] = _word(draw, words, parts[at])
        elif way < 0.6:
            parts.insert(at, _word(draw, words, parts[at]))
        elif way < 0.75:
            del parts[at : at + draw.choice((1, 1, 2, 5))]
        elif way < 0.9:
            size = draw.choice((1, 3, 10))
            parts[at:at] = parts[at : at + size] * draw.choice((1, 1, 2, 20))
        else:
            other = draw.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
    return b"".join(parts)


def _toml(data: bytes, draw: Random, words: tuple[str, ...]) -> bytes:
    """The document with other values, each table on a line of its own; or its text changed."""
    if draw.random() < 0.3:
        return _text(data, draw, words)
    document = json_text.parse(json.dumps(tomllib.loads(data.decode())).encode())
    changed = json_text.changed(document, draw)
    entries = changed if isinstance(changed, Pairs) else []
    lines = [f"{_toml_key(key)} = {_toml_value(value)}\n" for key, value in entries]
    return "".join(lines).encode("utf-8", "surrogatepass")


def _toml_key(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(str(key))


def _toml_value(value: Any) -> str:
    if isinstance(value, Raw):
        return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(value, value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value)


def _http(data: bytes, draw: Random, words: tuple[str, ...]) -> bytes:
    """An answer whose head is changed, or now and then its body."""
    head, end, body = data.partition(b"\r\n\r\n")
    if draw.random() < 0.8:
        return _text(head, draw, words) + end + body
    return head + end + _bytes(body, draw)


def _word(draw: Random, words: tuple[str, ...], old: bytes) -> bytes:
    found: Any = draw.choice(words) if words and draw.random() < 0.5 else None
    if found is None:
        found = draw.choice(draw.choice((json_text.NUMBERS, json_text.TEXTS)))
    if isinstance(found, (int, float)):
        return str(found).encode()
    text = found.encode("utf-8", "surrogatepass")
    return b'"' + text + b'"' if old.startswith(b'"') and draw.random() < 0.5 else bytes(text)


def _safetensors(data: bytes, draw: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    body = data[8 + size :]
    if (way := draw.random()) < 0.25:
        return data[: 8 + size] + _values(body, draw)
    if way < 0.6:
        return _refitted(json.loads(data[8 : 8 + size]), body, draw)
    header = json_text.write(json_text.changed(json_text.parse(data[8 : 8 + size]), draw))
    length = len(header) if draw.random() < 0.95 else draw.choice(_SIZES)
    return length.to_bytes(8, "little") + header + body


def _values(body: bytes, draw: Random) -> bytes:
    """Other numbers: NaN, infinities, the largest, zeros, in any place that a value can begin at."""
    kinds = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", b"\x00" * 4, b"\xff\xff\x7f\x7f",
             b"\x00\x7e", b"\x80\x7f", b"\x00\x7c", b"\x80", b"\x7f", b"{}", b"[]")  # fmt: skip
    for _ in range(draw.choice((1, 1, 3, 20))):
        kind = draw.choice(kinds)
        at = draw.randrange(0, len(body) + 1, len(kind) if len(kind) <= len(body) else 1)
        body = body[:at] + kind + body[at + len(kind) :] if at + len(kind) <= len(body) else body
    return body


def _refitted(header: dict[str, Any], body: bytes, draw: Random) -> bytes:
    """A sound file with other tensors: renamed, reshaped, of another dtype, gone, or with other metadata."""
    tensors = {name: dict(entry) for name, entry in header.items() if name != "__metadata__"}
    contents = {name: body[slice(*entry["data_offsets"])] for name, entry in tensors.items()}
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not tensors:
            break
        _refit_one(draw.choice(sorted(tensors)), tensors, contents, draw)
    offset, written, data = 0, Pairs(), []
    if "__metadata__" in header:
        metadata = json_text.parse(json.dumps({"_": header["__metadata__"]}).encode())
        changed = json_text.changed(metadata, draw) if draw.random() < 0.3 else metadata
        written.append(["__metadata__", changed[0][1] if isinstance(changed, Pairs) and changed else changed])
    for name, entry in tensors.items():
        end = offset + len(contents[name])
        written.append([name, json_text.parse(json.dumps({**entry, "data_offsets": [offset, end]}).encode())])
        data.append(contents[name])
        offset = end
    text = json_text.write(written)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def _refit_one(name: str, tensors: dict[str, Any], contents: dict[str, bytes], draw: Random) -> None:
    entry, way = tensors[name], draw.random()
    if way < 0.2:
        del tensors[name]
        return
    if way < 0.4:
        other = draw.choice(
            (draw.choice(sorted(tensors)), name + ".x", name.upper(), name[:-1], "", "a.b\n.c")
        )
        tensors[other], contents[other] = tensors.pop(name), contents.pop(name)
        return
    if way < 0.6:
        entry["dtype"] = draw.choice(_DTYPES)
    elif entry["shape"]:
        axis = draw.randrange(len(entry["shape"]))
        shape = list(entry["shape"])
        shape[axis] = draw.choice((0, 1, shape[axis] + 1, max(0, shape[axis] - 1), shape[axis] * 2))
        entry["shape"] = draw.choice((shape, shape[::-1], [1, *shape], shape[:-1], []))
    count = _WIDTHS.get(entry["dtype"], 1)
    for side in entry["shape"]:
        count *= side
    if count <= _MOST:
        contents[name] = (contents[name] * (count // max(1, len(contents[name])) + 1))[:count].ljust(
            count, b"\0"
        )
