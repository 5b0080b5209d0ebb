"""Writes safetensors shards and their Hugging Face index, tensor by tensor, in any order.

All names, dtypes and shapes are given first, so every tensor's place is known before a byte is written: the
files come out the same whoever writes which tensor when, and no more than one tensor is in memory.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from vera_edge.files import canonical_json, write_atomic
from vera_edge.tensors import DTYPES, RawTensor, write_header

MAX_SHARD_BYTES = 5_000_000_000
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


class ShardWriter:
    """Writes the tensors of `layout` (name -> dtype, shape) into `folder`; `total` is their bytes.

    Use as a context manager; leaving it without an error checks that every tensor was written, and writes
    the index. Raises OSError when the disk is full or refuses.
    """

    def __init__(self, folder: Path, layout: Layout, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._layout = dict(layout)
        self._files = assign(layout, max_shard_bytes)
        self._offsets: dict[str, int] = {}
        self._handles: dict[str, int] = {}
        self._missing = set(layout)
        self.total = sum(nbytes(*entry) for entry in self._layout.values())

    def __enter__(self) -> ShardWriter:
        try:
            for file in sorted(set(self._files.values())):
                self._create(file)
        except BaseException:
            self._close()
            raise
        return self

    def _create(self, file: str) -> None:
        """Write a shard's header and give the file its full length.

        Wide dtypes come first, as safetensors itself has it, so that every tensor is aligned to its width.
        """
        names = [name for name, place in self._files.items() if place == file]
        names.sort(key=lambda name: (-DTYPES[self._layout[name][0]][0], name))
        header = io.BytesIO()
        write_header(header, {name: self._layout[name] for name in names}, {"format": "pt"})
        handle = os.open(self._folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._handles[file] = handle
        _write_at(handle, header.getbuffer(), 0)
        offset = header.tell()
        for name in names:
            self._offsets[name] = offset
            offset += nbytes(*self._layout[name])
        os.truncate(handle, offset)

    def write(self, name: str, tensor: RawTensor) -> None:
        """Put one tensor in its place. Raises ValueError when it isn't what the layout announced."""
        if (tensor.dtype, tensor.shape) != self._layout[name] or name not in self._missing:
            raise ValueError(
                f"{name} is {tensor.dtype} {tensor.shape}, announced once as {self._layout[name]}"
            )
        _write_at(self._handles[self._files[name]], tensor.data.data, self._offsets[name])
        self._missing.remove(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is not None:
            return
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never written: {sorted(self._missing)[0]}")
        files = set(self._files.values())
        if len(files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self._files}
            write_atomic(self._folder / "model.safetensors.index.json", canonical_json(index))

    def _close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    view = data.cast("B") if data.nbytes else data
    done = 0
    while done < view.nbytes:
        done += os.pwrite(handle, view[done:], offset + done)
