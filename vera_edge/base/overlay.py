"""What an adapter was trained on, where that isn't just what the base's folder holds.

PEFT wraps whatever model it is given: a base loaded as a classifier has a head that its checkpoint lacks, and
lacks the one that it has; a resized vocabulary has other embeddings. What the adapter's folder brings of such
a model, and what it lacks of the base's, is laid over the base's tensors and its config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vera_edge.arrays import Bytes
from vera_edge.storage.side_files import SideFiles
from vera_edge.storage.tensors import RawTensor, TensorFolder, TensorInfo

_PIECE = 1 << 22


@dataclass(frozen=True, eq=False)
class Overlay:
    """config: the base's config.json as the model that was trained has it. files: its tokenizer and the like.

    dropped: tensors of the base that this model has no place for. placed: tensors of an adapter's that the
    base lacks or has in another shape, by name. brought: the file they were read from. notes: sentences for a
    person to read.
    """

    config: Mapping[str, Any]
    files: SideFiles
    dropped: frozenset[str] = frozenset()
    placed: Mapping[str, RawTensor] = field(default_factory=dict)
    brought: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def digests(self) -> dict[str, str]:
        """Hex SHA-256 of the float32 values of each placed tensor."""
        return {name: digest_of(tensor) for name, tensor in sorted(self.placed.items())}


def digest_of(tensor: RawTensor) -> str:
    """Hex SHA-256 of a float tensor's shape and its values in float32."""
    state = hashlib.sha256(f"{list(tensor.shape)}\n".encode())
    state.update(tensor.float32().tobytes())
    return state.hexdigest()


class OverlaidFolder(TensorFolder):
    """A base's tensors without some, and with others that are in memory."""

    def __init__(self, base: TensorFolder, overlay: Overlay) -> None:
        infos = {
            name: info
            for name, info in base.items()
            if name not in overlay.dropped and name not in overlay.placed
        }
        self._base, self._placed = base, overlay.placed
        file = overlay.brought or Path()
        for name, tensor in overlay.placed.items():
            infos[name] = TensorInfo(name, tensor.dtype, tensor.shape, file, 0, tensor.data.size)
        super().__init__(infos, (*base.files, file) if overlay.placed else base.files)

    def read(self, name: str) -> RawTensor:
        """The bytes of one tensor."""
        return self._placed[name] if name in self._placed else self._base.read(name)

    def pieces(self, name: str) -> Iterator[Bytes]:
        """The bytes of one tensor, piece by piece."""
        if name not in self._placed:
            yield from self._base.pieces(name)
            return
        data = self._placed[name].data
        for start in range(0, data.size, _PIECE):
            yield data[start : start + _PIECE]
