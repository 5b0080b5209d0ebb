"""Content-defined chunks: what a slow link needn't carry again when a large file changed a little.

A file is cut where a rolling hash of its last 32 bytes says so, hence an insertion moves only the cuts near
it (the gear hash of FastCDC, Xia et al., USENIX ATC 2016). `chunks.json` in a bundle lists every file's
chunks; a client that holds an older version fetches only the ranges it lacks, from any static server.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.errors import BundleError
from vera_edge.storage.json_text import Bound, canonical_json, read_json

INDEX = "chunks.json"
FORMAT = 1
MINIMUM, AVERAGE, MAXIMUM = 16 << 10, 64 << 10, 256 << 10
_LONGEST = Bound(32 << 20, 1_000_000)  # an index of 300 000 chunks: some 20 GB
_WINDOW = 32
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 18  # bytes read at once; what hashing makes of them stays in the processor's cache
_MASK = np.uint32((AVERAGE - 1) << (32 - AVERAGE.bit_length() + 1))
# 256 random words; the file format depends on them, so their seed never changes.
_GEAR = np.random.RandomState(0x5EED).randint(0, 1 << 32, size=256, dtype=np.uint32)


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: byte range `[start, start + size)` and the hex SHA-256 of its content."""

    start: int
    size: int
    sha256: str


def rolling_hash(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """h[i] = sum over j < 32 of gear[data[i - j]] << j, modulo 2^32, for every i.

    Computed by doubling: a window of 2k is a window of k plus the one k bytes before it, shifted by k.
    """
    value = _GEAR[data]
    width = 1
    while width < _WINDOW:
        longer = value.copy()
        longer[width:] += value[:-width] << np.uint32(width)
        value, width = longer, width * 2
    return value


def split(path: Path) -> list[Chunk]:
    """The chunks of a file, in order; they cover it exactly. Memory doesn't grow with the file."""
    chunks: list[Chunk] = []
    with path.open("rb") as stream:
        for start, data in _pieces(stream.read, _cuts(path)):
            chunks.append(Chunk(start, len(data), hashlib.sha256(data).hexdigest()))
    return chunks


def _cuts(path: Path) -> Iterator[int]:
    """End offsets of the chunks."""
    size, last, offset = path.stat().st_size, 0, 0
    tail = np.empty(0, np.uint8)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            data = np.concatenate([tail, np.frombuffer(block, np.uint8)])
            hits = np.flatnonzero((rolling_hash(data)[len(tail) :] & _MASK) == 0) + offset + 1
            for hit in hits.tolist():
                while hit - last > MAXIMUM:
                    last += MAXIMUM
                    yield last
                if hit - last >= MINIMUM:
                    last = hit
                    yield last
            offset += len(block)
            tail = data[-(_WINDOW - 1) :]
    while size - last > MAXIMUM:
        last += MAXIMUM
        yield last
    if size > last:
        yield size


def _pieces(read: Any, cuts: Iterator[int]) -> Iterator[tuple[int, bytes]]:
    start = 0
    for end in cuts:
        yield start, read(end - start)
        start = end


def index(files: Mapping[str, Sequence[Chunk]]) -> bytes:
    """The content of `chunks.json` for files, by name, with their chunks."""
    listed = {name: [[chunk.size, chunk.sha256] for chunk in found] for name, found in files.items()}
    return canonical_json({"format": FORMAT, "files": listed})


def read_index(path: Path) -> Mapping[str, tuple[Chunk, ...]]:
    """The chunks that a `chunks.json` lists, by file. Raises BundleError when it isn't sound."""
    value = read_json(path, BundleError, _LONGEST)
    files = value.get("files")
    if value.get("format") != FORMAT or not isinstance(files, dict):
        raise BundleError(f"{path} isn't a chunk index that vera-edge knows; update vera-edge or fetch again")
    return {name: _read_chunks(path, name, entries) for name, entries in files.items()}


def _read_chunks(path: Path, name: str, entries: Any) -> tuple[Chunk, ...]:
    start, chunks = 0, []
    try:
        for size, digest in entries:
            if type(size) is not int or not 0 < size <= MAXIMUM or not _SHA256.fullmatch(digest):
                raise ValueError
            chunks.append(Chunk(start, size, digest))
            start += size
    except (TypeError, ValueError):
        raise BundleError(f"{path}: the chunks of {name!r} are malformed; fetch it again") from None
    return tuple(chunks)
