"""Safetensors on demand: headers first, one tensor's bytes at a time, nothing trusted.

The `safetensors` package is the judge of what it supports; this module exists because its numpy side has no
bfloat16 or float8, and because a merge must know every size and offset before it reads a byte.
Layout of the format: 8 bytes little-endian header length, JSON header, data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import CheckpointError, VeraEdgeError
from vera_edge.storage import byte_ranges, json_text, shard_index

# Widths in bytes. The 16-bit and 8-bit floats that numpy lacks are carried as their bits.
DTYPES: Mapping[str, tuple[int, str]] = {
    "BOOL": (1, "?"),
    "U8": (1, "u1"),
    "I8": (1, "i1"),
    "F8_E4M3": (1, "u1"),
    "F8_E5M2": (1, "u1"),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "F32": (4, "<f4"),
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F64": (8, "<f8"),
}
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_PIECE = 1 << 22
_MAX_VALUES = 1 << 48  # of a tensor, were its empty sides 1: array libraries count little further


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: dtype as safetensors spells it, byte range `[start, end)` within `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class RawTensor:
    """A tensor's bytes as they lie in the file, with the dtype and shape that give them a meaning."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes  # one dimension, contiguous

    @classmethod
    def of(cls, array: npt.NDArray[Any], dtype: str | None = None) -> RawTensor:
        """Wrap a numpy array; `dtype` names what the bits are when numpy can't (BF16, F8_E4M3)."""
        if dtype is None:
            dtype = _NUMPY_NAMES[array.dtype.newbyteorder("=").str.lstrip("<>=|")]
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        return cls(dtype, tuple(array.shape), little.reshape(-1).view(np.uint8))

    def array(self) -> npt.NDArray[Any]:
        """The values in numpy's dtype; BF16 and F8 come as their unsigned bits."""
        return self.data.view(DTYPES[self.dtype][1]).reshape(self.shape)

    def float32(self) -> Float32:
        """The values as float32, exact for every float dtype up to 32 bits. Raises CheckpointError else.

        What of a float64 is too large for float32 becomes infinite.
        """
        return float32_of(self.dtype, self.shape, [self.data])


_NUMPY_NAMES = {"b1": "BOOL", "u1": "U8", "i1": "I8", "u2": "U16", "i2": "I16", "f2": "F16"} | {
    f"{kind}{size}": f"{kind.upper()}{size * 8}" for kind in "uif" for size in (4, 8)
}


def float32_of(dtype: str, shape: tuple[int, ...], pieces: Iterable[Bytes]) -> Float32:
    """A tensor as float32, of its bytes in pieces of whole values; see `RawTensor.float32`."""
    if dtype not in FLOATS:
        raise CheckpointError(f"a {dtype} tensor of shape {list(shape)} stands where floats belong")
    found, start = np.empty(math.prod(shape), np.float32), 0
    for piece in pieces:
        values = piece.view(DTYPES[dtype][1])
        here = found[start : start + values.size]
        start += values.size
        if dtype == "BF16":
            np.left_shift(values, np.uint32(16), out=here.view(np.uint32), dtype=np.uint32)
            continue
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite
            here[...] = values
    return found.reshape(shape)


def bf16_to_float32(bits: npt.NDArray[np.uint16]) -> Float32:
    """Widen bfloat16 bits to float32 (exact)."""
    return np.left_shift(bits, np.uint32(16), dtype=np.uint32).view(np.float32)


def float32_to_bf16(values: Float32) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, to nearest with ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    result = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FC0), result) if nan.any() else result


def read_header(path: Path, error: type[VeraEdgeError] = CheckpointError) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in file order, every size and offset checked against the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise error(f"{path} is cut short or isn't safetensors; copy or download it again")
            text = stream.read(min(length, json_text.TABLE.size + 1))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as cause:
        raise error(f"{path} can't be read: {cause.strerror}") from None
    header = json_text.parse_json(text, f"the header of {path}", error, json_text.TABLE)
    if not isinstance(header, dict):
        raise error(f"the header of {path} isn't a JSON object; copy or download it again")
    header.pop("__metadata__", None)
    infos = [_tensor_info(name, entry, path, 8 + length, error) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    position = 8 + length
    for info in infos:
        if info.start != position:
            raise error(f"tensor {info.name} in {path} overlaps another or leaves a hole; the header lies")
        position = info.end
    if position != size:
        raise error(f"{path} holds {size} bytes where its header promises {position}; copy it again")
    return {info.name: info for info in infos}


def _tensor_info(name: str, entry: Any, path: Path, base: int, error: type[VeraEdgeError]) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, start, end]
        sound = all(type(number) is int and number >= 0 for number in numbers) and len(shape) <= 32
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or not isinstance(dtype, str):
        raise error(f"the header entry of tensor {name} in {path} is malformed; copy the file again")
    if dtype not in DTYPES:
        raise error(f"tensor {name} in {path} has dtype {dtype}, which vera-edge doesn't know")
    if math.prod(max(size, 1) for size in shape) >= _MAX_VALUES:
        raise error(f"tensor {name} in {path} has shape {list(shape)}, which no tensor has; copy it again")
    if math.prod(shape) * DTYPES[dtype][0] != end - start:
        raise error(
            f"tensor {name} in {path}: shape {list(shape)} of {dtype} doesn't fill {end - start} bytes"
        )
    return TensorInfo(name, dtype, shape, path, base + start, base + end)


class TensorFolder(Mapping[str, TensorInfo]):
    """The tensors of a Hugging Face folder, over one or many shards: headers now, bytes on demand.

    notes: sentences a person should read about its files.
    """

    def __init__(
        self, infos: Mapping[str, TensorInfo], files: Sequence[Path], notes: Sequence[str] = ()
    ) -> None:
        self._infos = dict(infos)
        self.files, self.notes = tuple(files), tuple(notes)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @classmethod
    def open(
        cls, folder: Path, stem: str = "model", error: type[VeraEdgeError] = CheckpointError
    ) -> TensorFolder:
        """Read the headers of `<stem>.safetensors`, or of the shards `<stem>.safetensors.index.json` names.

        As transformers does: a single file is read whatever an index beside it says, and of a shard every
        tensor. Raises `error` on missing, overlapping or foreign shards, and when only a pickle is there.
        """
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return cls(read_header(single, error), [single], shard_index.unread(index, single))
        if index.is_file():
            return cls._open_index(folder, index, error)
        if not folder.is_dir():
            raise error(f"{folder} isn't a folder; give the folder that holds {stem}.safetensors")
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _PICKLES)
        if pickles:
            raise error(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when read; "
                "save them as safetensors and try again"
            )
        raise error(f"{folder} holds no {stem}.safetensors and no {stem}.safetensors.index.json")

    @classmethod
    def _open_index(cls, folder: Path, index: Path, error: type[VeraEdgeError]) -> TensorFolder:
        infos: dict[str, TensorInfo] = {}
        files = list(shard_index.read(index, error)[1].values())
        for file in files:
            for name, info in read_header(file, error).items():
                if name in infos:
                    raise error(
                        f"tensor {name} is in both {infos[name].file.name} and {file.name} of {folder}"
                    )
                infos[name] = info
        places = {name: info.file for name, info in infos.items()}
        return cls(infos, files, shard_index.elsewhere(index, places, error))

    def read(self, name: str) -> RawTensor:
        """The bytes of one tensor."""
        info = self._infos[name]
        (data,) = byte_ranges.read(info.file, info.start, [info.nbytes], f"tensor {name}")
        return RawTensor(info.dtype, info.shape, data)

    def pieces(self, name: str) -> Iterator[Bytes]:
        """The bytes of one tensor, some MiB of whole values at a time."""
        info = self._infos[name]
        sizes = (min(_PIECE, info.nbytes - start) for start in range(0, info.nbytes, _PIECE))
        return byte_ranges.read(info.file, info.start, sizes, f"tensor {name}")

    def float32(self, name: str) -> Float32:
        """One tensor as float32, its stored bytes never whole in memory where they are read piece by piece.

        Raises CheckpointError when it isn't a float tensor.
        """
        info = self._infos[name]
        return float32_of(info.dtype, info.shape, self.pieces(name))


class WitnessedFolder(TensorFolder):
    """Another folder's tensors, which also keeps the SHA-256 of each that is read whole: `digests`."""

    def __init__(self, folder: TensorFolder) -> None:
        super().__init__(folder, folder.files)
        self._folder = folder
        self.digests: dict[str, str] = {}

    def read(self, name: str) -> RawTensor:
        """The bytes of one tensor."""
        tensor = self._folder.read(name)
        self.digests[name] = hashlib.sha256(tensor.data.data).hexdigest()
        return tensor

    def pieces(self, name: str) -> Iterator[Bytes]:
        """The bytes of one tensor, piece by piece."""
        state = hashlib.sha256()
        for piece in self._folder.pieces(name):
            state.update(piece.data)
            yield piece
        self.digests[name] = state.hexdigest()


def write_header(
    stream: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors header for tensors (dtype, shape) whose bytes will follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPES[dtype][0]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
