"""HQQ's storage, as transformers saves it: 8, 4, 3, 2 or 1 bits, zeros and scales in floats, read only.

The weight's values, in row-major order, form a matrix: (-1, group_size) for axis 1, (group_size, -1) for
axis 0. Each of its rows or columns is a group: `w = (q - zero) * scale`. `W_q` packs rows that lie a fraction
of the matrix apart into one byte (3 bits: ten into an int32), the first in the highest bits. hqq itself
computes in the layer's compute dtype, mostly float16; the values here are those of float32.
Source: https://github.com/mobiusml/hqq, `core/bitpack.py` and `core/quantize.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import CheckpointError, FormatError
from vera_edge.formats import checks
from vera_edge.formats.readonly import ReadOnly
from vera_edge.formats.weight import StoredLinear
from vera_edge.storage.tensors import RawTensor, TensorFolder

# packing -> (bits, codes in a word, dtype of a word)
_PACKINGS = {
    "8bit_u8": (8, 1, "u1"),
    "4bit_u8": (4, 2, "u1"),
    "3bit_32": (3, 10, "<i4"),
    "2bit_u8": (2, 4, "u1"),
    "1bit_u8": (1, 8, "u1"),
}
_EXTRAS = (
    "axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits", "offload_meta",
    "optimize", "packing", "quant_scale", "quant_zero", "round_zero", "shape", "stores_quant_config",
    "unpack_view_dtype", "view_as_float",
)  # fmt: skip
_MAX_TEXT = 64


@dataclass(frozen=True)
class HqqWeight:
    """An HQQ weight in memory: words (steps, columns); scales and zeros flat, one for each group."""

    shape: tuple[int, int]
    packing: str
    axis: int
    words: npt.NDArray[Any]
    scales: Float32
    zeros: Float32
    stored: Mapping[str, RawTensor]

    def rows(self, start: int, stop: int) -> Float32:
        begin, end, columns = start * self.shape[1], stop * self.shape[1], self.words.shape[1]
        first, last = begin // columns, -(-end // columns)
        values = self._codes(np.arange(first, last)).astype(np.float32)
        if self.axis == 1:
            values -= self.zeros[first:last, None]
            values *= self.scales[first:last, None]
        else:
            values -= self.zeros
            values *= self.scales
        return values.reshape(-1)[begin - first * columns : end - first * columns].reshape(-1, self.shape[1])

    def _codes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of the matrix of codes."""
        bits, each, _ = _PACKINGS[self.packing]
        steps = self.words.shape[0]
        shifts = ((each - 1 - rows // steps) * bits).astype(self.words.dtype)
        return self.words[rows % steps] >> shifts[:, None] & self.words.dtype.type((1 << bits) - 1)

    def tensors(self) -> Mapping[str, RawTensor]:
        return self.stored


@dataclass(frozen=True)
class Hqq(ReadOnly):
    """HQQ, without quantized zeros and scales (which transformers can't save)."""

    name: str = "hqq"

    quant_method = "hqq"

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        if checks.method(config) != self.quant_method:
            return {}
        modules = [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]
        return {module: _stored(tensors, module) for module in modules}

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> HqqWeight:
        roles, params = linear.tensors, linear.params
        stored = {f".{role}": tensors.read(name) for role, name in roles.items()}
        words = stored[".W_q"].data.view(_PACKINGS[params["packing"]][2]).reshape(-1, params["columns"])
        scales = checks.finite(tensors, roles["scale"]).reshape(-1)
        zeros = checks.finite(tensors, roles["zero"]).reshape(-1)
        return HqqWeight(linear.shape, params["packing"], params["axis"], words, scales, zeros, stored)


def _stored(tensors: TensorFolder, module: str) -> StoredLinear:
    roles = checks.roles(
        tensors, module, "hqq", {name: f".{name}" for name in ("W_q", "scale", "zero", "shape")}
    )
    roles |= {name: f"{module}.{name}" for name in _EXTRAS if f"{module}.{name}" in tensors}
    out, inside = _shape(tensors, roles["shape"])
    packing = _text(tensors, roles, "packing", module)
    axis = _integer(tensors, roles, "axis", module)
    if packing not in _PACKINGS or axis not in (0, 1):
        raise FormatError(f"{module} is HQQ with packing {packing!r} and axis {axis}, which isn't known")
    for part in ("zero_q", "scale_q", "meta_zero", "meta_scale", "zero_scale"):
        if f"{module}.{part}" in tensors:
            raise FormatError(f"{module} has quantized HQQ zeros and scales ({part}), which isn't known")
    group = _integer(tensors, roles, "group_size", module) if "group_size" in roles else None
    rows, columns = _matrix(out * inside, inside, group, axis, module)
    _, each, word = _PACKINGS[packing]
    packed = tensors[roles["W_q"]]
    if packed.nbytes != -(-rows // each) * columns * np.dtype(word).itemsize:
        raise CheckpointError(
            f"{packed.name} in {packed.file} holds {packed.nbytes} bytes, but {out} x {inside} codes "
            f"packed as {packing} fill another number"
        )
    for role in ("scale", "zero"):
        info = tensors[roles[role]]
        if math.prod(info.shape) != (rows if axis == 1 else columns):
            raise CheckpointError(
                f"{info.name} in {info.file} has shape {list(info.shape)}; its groups are others"
            )
        checks.expect(tensors, info.name, checks.SCALES, info.shape, "hqq")
    params = {"packing": packing, "axis": axis, "group_size": group, "columns": columns}
    return StoredLinear(module, out, inside, "hqq", roles, params)


def _matrix(size: int, inside: int, group: int | None, axis: int, module: str) -> tuple[int, int]:
    """Rows and columns of the matrix that is packed."""
    if group is None:
        return size // inside, inside
    if group < 1 or size % group:
        raise CheckpointError(f"{module}: a group size of {group} doesn't divide its {size} values")
    return (size // group, group) if axis == 1 else (group, size // group)


def _shape(tensors: TensorFolder, name: str) -> tuple[int, int]:
    checks.expect(tensors, name, {"I64", "I32"}, (2,), "a matrix")
    out, inside = (int(size) for size in tensors.read(name).array())
    if not (0 < out < 1 << 40 and 0 < inside < 1 << 40):
        raise CheckpointError(
            f"{name} in {tensors[name].file} says {out} x {inside}, which is no weight's shape"
        )
    return out, inside


def _integer(tensors: TensorFolder, roles: Mapping[str, str], role: str, module: str) -> int:
    if role not in roles:
        raise CheckpointError(f"{module} is stored as hqq, but its tensor {module}.{role} is missing")
    info = tensors[roles[role]]
    if math.prod(info.shape) != 1 or info.dtype not in ("I32", "I64", "U8"):
        raise CheckpointError(f"{info.name} in {info.file} isn't the whole number hqq keeps there")
    return int(tensors.read(info.name).array().reshape(()))


def _text(tensors: TensorFolder, roles: Mapping[str, str], role: str, module: str) -> str:
    if role not in roles:
        raise CheckpointError(f"{module} is stored as hqq, but its tensor {module}.{role} is missing")
    info = tensors[roles[role]]
    if info.dtype != "U8" or info.nbytes > _MAX_TEXT:
        raise CheckpointError(f"{info.name} in {info.file} isn't the text hqq keeps there")
    return tensors.read(info.name).data.tobytes().decode("latin-1")
