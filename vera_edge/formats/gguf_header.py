"""The header of a GGUF file: its metadata and where its tensors lie, everything held against the file's size.

The `gguf` package reads headers too, but trusts them: it makes arrays of every value of every list, and names
for as many blocks as a header claims. Here a header can't ask for more than a file of its size may hold.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.errors import CheckpointError, FormatError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DIMENSIONS = 4  # ggml's own limit
_MAX_FIELDS, _MAX_TENSORS, _MAX_ITEMS = 1 << 16, 1 << 20, 1 << 22
_MAX_NAME, _MAX_TEXT = 1 << 16, 1 << 24  # bytes
_MAX_VALUES = 1 << 48  # of one tensor
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# The tokens at which llama.cpp ends a text, beside those it knows by name: `tokenizer.ggml.NAME_token_id`.
ENDS = ("eos", "eot", "eom")
# type of a metadata value -> how struct spells it
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: ggml's name of its type, its shape with rows first, and its bytes in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class Header:
    """metadata: the numbers and texts; its lists, which are the tokenizer's, are left out."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


class _Unsound(ValueError):
    """What is wrong with a header."""


def read(file: Path) -> Header:
    """The header of a GGUF file. Raises CheckpointError when it isn't sound or not the file's."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data), file)
    except OSError as cause:
        raise CheckpointError(f"{file} can't be read: {cause.strerror}") from None
    except ValueError as cause:  # an empty file, what isn't UTF-8, and what is found below
        raise CheckpointError(
            f"{file} isn't a sound GGUF file ({cause}); copy or download it again"
        ) from None


class _Cursor:
    """A place in the file, from which values are read one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at, self.size = data, 0, len(data)

    def skip(self, count: int) -> int:
        """Step over `count` bytes; returns where they begin."""
        if count > self.size - self.at:
            raise _Unsound("it ends inside its header")
        self.at += count
        return self.at - count

    def bytes(self, count: int) -> bytes:
        start = self.skip(count)
        return self._data[start : self.at]

    def scalar(self, kind: str) -> Any:
        form = struct.Struct("<" + kind)
        return form.unpack(self.bytes(form.size))[0]

    def count(self, most: int, what: str) -> int:
        found = int(self.scalar("Q"))
        if found > most:
            raise _Unsound(f"{found} {what}, where no model has over {most}")
        return found

    def text(self, most: int) -> str:
        return self.bytes(self.count(most, "bytes in a text")).decode()


def _read(cursor: _Cursor, file: Path) -> Header:
    if cursor.bytes(4) != _MAGIC:
        raise _Unsound("it doesn't begin with GGUF")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        swapped = " and byte order" if not version & 0xFFFF else ""
        raise _Unsound(f"it is of a version{swapped} that vera-edge doesn't read")
    tensors = cursor.count(_MAX_TENSORS, "tensors")
    fields = cursor.count(_MAX_FIELDS, "metadata fields")
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        key = cursor.text(_MAX_NAME)
        if key in metadata:
            raise _Unsound(f"its metadata has {key!r} twice")
        metadata[key] = _value(cursor)
    entries = [_entry(cursor) for _ in range(tensors)]
    step = metadata.get("general.alignment", _ALIGNMENT)
    if type(step) is not int or not 0 < step <= 1 << 20 or step & (step - 1):
        raise _Unsound(f"its alignment is {step!r}, no power of two")
    start = -(-cursor.at // step) * step
    found = tuple(_tensors(entries, start, file))
    _check_places(found, step, cursor.size)
    return Header({key: value for key, value in metadata.items() if value is not None}, found)


def _value(cursor: _Cursor) -> Any:
    """The next value of the metadata; None for a list."""
    kind = cursor.scalar("I")
    if kind == _STRING:
        return cursor.text(_MAX_TEXT)
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind != _ARRAY:
        raise _Unsound(f"its metadata has a value of unknown type {kind}")
    kind, count = cursor.scalar("I"), cursor.count(_MAX_ITEMS, "items in a list")
    if kind in _SCALARS:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[kind]))
    elif kind == _STRING:
        for _ in range(count):
            cursor.skip(cursor.count(_MAX_TEXT, "bytes in a text"))
    else:
        raise _Unsound(f"its metadata has a list of type {kind}")
    return None


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape with rows first, type and offset of the next tensor."""
    name, dimensions = cursor.text(_MAX_NAME), cursor.scalar("I")
    if not 0 < dimensions <= _DIMENSIONS:
        raise _Unsound(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    if not 0 < math.prod(shape) < _MAX_VALUES:
        raise _Unsound(f"tensor {name!r} has shape {list(shape)}")
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _tensors(
    entries: list[tuple[str, tuple[int, ...], int, int]], start: int, file: Path
) -> Iterator[GgufTensor]:
    """The tensors of entries, with the sizes that ggml gives their types."""
    try:
        import gguf
    except ImportError:
        raise FormatError(f"reading {file} needs the gguf package: pip install 'vera-edge[build]'") from None
    known = {kind.value for kind in gguf.GGML_QUANT_SIZES}
    for name, shape, number, offset in entries:
        if number not in known:
            raise _Unsound(f"tensor {name!r} is of unknown type {number}")
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _Unsound(f"tensor {name!r} has rows of {shape[-1]} values, no multiple of {block}")
        yield GgufTensor(name, kind.name, shape, start + offset, math.prod(shape) // block * size)


def _check_places(tensors: tuple[GgufTensor, ...], step: int, size: int) -> None:
    """Refuse two tensors of one name, or with bytes in common, and what lies past the end of the file."""
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _Unsound("two of its tensors have one name")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start % step or tensor.start < end:
            raise _Unsound(f"tensor {tensor.name!r} begins inside of another or off its alignment")
        end = tensor.end
        if end > size:
            raise _Unsound(f"it ends inside of tensor {tensor.name!r}")
