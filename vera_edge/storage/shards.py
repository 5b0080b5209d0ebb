"""Writes safetensors shards and their Hugging Face index, tensor by tensor, in any order.

All names, dtypes and shapes are given first, so every tensor's place is known before a byte is written: the
files come out the same whoever writes which tensor when, and no more than one tensor is in memory.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from vera_edge.arrays import Bytes
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.storage.tensors import DTYPES, RawTensor, write_header

MAX_SHARD_BYTES = 5_000_000_000
_PIECE = 1 << 22
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The size of a tensor."""
    return math.prod(shape) * DTYPES[dtype][0]


def assign(layout: Layout, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, str]:
    """Tensor name -> file name: shards filled in the order given, none above the limit but by one tensor."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, (dtype, shape) in layout.items():
        size = nbytes(dtype, shape)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return dict.fromkeys(shards[0], "model.safetensors")
    return {
        name: f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }


class Shards:
    """The files of `layout` (name -> dtype, shape) in `folder`, and where in them each tensor lies.

    Opens a file for each tensor it reads or writes, so that any number of processes may hold one. `total` is
    the bytes of all tensors.
    """

    def __init__(self, folder: Path, layout: Layout, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.layout = dict(layout)
        self.files = assign(layout, max_shard_bytes)
        self.total = sum(nbytes(*entry) for entry in self.layout.values())
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._lengths: dict[str, int] = {}
        for file in sorted(set(self.files.values())):
            self._place(file)

    def _place(self, file: str) -> None:
        """Wide dtypes come first, as safetensors itself has it: every tensor is aligned to its width."""
        names = [name for name, place in self.files.items() if place == file]
        names.sort(key=lambda name: (-DTYPES[self.layout[name][0]][0], name))
        header = io.BytesIO()
        write_header(header, {name: self.layout[name] for name in names}, {"format": "pt"})
        self._headers[file] = header.getvalue()
        offset = header.tell()
        for name in names:
            start, offset = offset, offset + nbytes(*self.layout[name])
            self._places[name] = (start, offset)
        self._lengths[file] = offset

    @property
    def in_order(self) -> tuple[str, ...]:
        """The tensors in the order in which the files hold them."""
        return tuple(self._places)

    def create(self) -> None:
        """Write every file's header and give it its full length; what a file holds already stays."""
        for file, header in self._headers.items():
            with _opened(self.folder / file, os.O_RDWR | os.O_CREAT) as handle:
                _write_at(handle, memoryview(header), 0)
                os.truncate(handle, self._lengths[file])

    def put(self, name: str, tensor: RawTensor) -> None:
        """Write one tensor to its place. Raises ValueError when it isn't what the layout announced."""
        self.check(name, tensor)
        self.put_bytes(name, 0, tensor.data)

    def check(self, name: str, tensor: RawTensor) -> None:
        """Raise ValueError when a tensor isn't what the layout announced."""
        if (tensor.dtype, tensor.shape) != self.layout[name]:
            raise ValueError(
                f"{name} is {tensor.dtype} {tensor.shape}, announced once as {self.layout[name]}"
            )

    def put_bytes(self, name: str, offset: int, data: Bytes) -> None:
        """Write some of one tensor's bytes, `offset` being where in it they begin."""
        start, end = self._places[name]
        if start + offset + data.size > end:
            raise ValueError(f"{name} has more bytes than were announced")
        with _opened(self.folder / self.files[name], os.O_WRONLY) as handle:
            _write_at(handle, data.data, start + offset)
            if data.size >= _PIECE // 4 and hasattr(os, "posix_fadvise"):
                # Starts the disk on them now; else all would wait for the flush at the end.
                os.posix_fadvise(handle, start + offset, data.size, os.POSIX_FADV_DONTNEED)

    def checksum(self, name: str) -> int:
        """CRC-32 of what a tensor's place holds."""
        state, (start, end) = 0, self._places[name]
        with _opened(self.folder / self.files[name], os.O_RDONLY) as handle:
            os.lseek(handle, start, os.SEEK_SET)
            while start < end and (piece := os.read(handle, min(_PIECE, end - start))):
                state = zlib.crc32(piece, state)
                start += len(piece)
        return state


class ShardWriter:
    """Makes the files of `shards`, and watches that each of their tensors is written; `total` is their bytes.

    Use as a context manager; leaving it without an error checks that every tensor was written, and writes
    the index. Raises OSError when the disk is full or refuses.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._missing = set(shards.layout)
        self.total = shards.total

    def __enter__(self) -> ShardWriter:
        self._shards.create()
        return self

    def write(self, name: str, tensor: RawTensor) -> None:
        """Put one tensor in its place. Raises ValueError when it isn't what the layout announced."""
        self.claim(name)
        self._shards.put(name, tensor)

    def claim(self, name: str) -> None:
        """Take note that a tensor is in its place, whoever wrote it. Raises ValueError the second time."""
        if name not in self._missing:
            raise ValueError(f"{name} was announced once, and is there already or never was announced")
        self._missing.remove(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never written: {sorted(self._missing)[0]}")
        files = self._shards.files
        if len(set(files.values())) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": files}
            write_atomic(self._shards.folder / "model.safetensors.index.json", canonical_json(index))


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    view = data.cast("B") if data.nbytes else data
    os.lseek(handle, offset, os.SEEK_SET)  # a handle is of one caller: see `_opened`
    done = 0
    while done < view.nbytes:
        done += os.write(handle, view[done:])
