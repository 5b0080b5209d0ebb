"""torchao's weight-only tensors, as transformers saves them to safetensors; read only.

The file's metadata says of each weight which class it is and its block size; its parts lie beside it:
`<module>._weight_qdata`, `._weight_scale`, `._weight_zero_point`. `w = scale * (q - zero)`, for Int4Tensor
`scale * q + zero`, with two's complement nibbles, the first input in the low one.
Source: https://github.com/pytorch/ao, `quantization/quantize_/workflows` and `prototype/safetensors`; for
Int4Tensor, whose kernels need a GPU, the `int4_row_quantize_zp` that fills it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import CheckpointError, FormatError
from vera_edge.formats import affine, checks
from vera_edge.formats.fp8 import BlockFloat8
from vera_edge.formats.readonly import ReadOnly
from vera_edge.formats.weight import StoredLinear, Weight
from vera_edge.storage import json_text
from vera_edge.storage.tensors import RawTensor, TensorFolder

_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Float8Tensor")
_PARTS = ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point")


@dataclass(frozen=True)
class TorchaoWeight:
    """An integer weight in memory: codes int8 (out, in), or (out, in / 2) packed; scales, zeros (out,
    groups).
    """

    shape: tuple[int, int]
    codes: npt.NDArray[np.int8]
    scales: Float32
    zeros: Float32 | None
    packed: bool
    stored: Mapping[str, RawTensor]

    def rows(self, start: int, stop: int) -> Float32:
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        zeros = None if self.zeros is None else self.zeros[start:stop]
        if not self.packed:
            return affine.values(codes, scales, zeros)
        nibbles = np.empty((*codes.shape, 2), np.int8)
        nibbles[:, :, 0] = codes << np.int8(4) >> np.int8(4)
        nibbles[:, :, 1] = codes >> np.int8(4)
        values = affine.values(nibbles.reshape(-1, self.shape[1]), scales)
        if zeros is not None:
            values.reshape(*zeros.shape, -1)[:] += zeros[:, :, None]
        return values

    def tensors(self) -> Mapping[str, RawTensor]:
        return self.stored


@dataclass(frozen=True)
class Torchao(ReadOnly):
    """torchao's int8, int4 and FP8 weights."""

    name: str = "torchao"

    quant_method = "torchao"

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        if checks.method(config) != self.quant_method:
            return {}
        facts: dict[str, Any] = {}
        for file in tensors.files:
            facts |= _metadata(file)
        modules = [name.removesuffix("._weight_qdata") for name in tensors if name.endswith("._weight_qdata")]
        return {module: _stored(tensors, module, facts) for module in modules}

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> Weight:
        roles, (out, inside), kind = linear.tensors, linear.shape, linear.params["class"]
        stored = {f"._weight_{role}": tensors.read(name) for role, name in roles.items()}
        codes, scales = stored["._weight_qdata"], checks.finite(tensors, roles["scale"])
        block = linear.params["block"]
        if kind == "Float8Tensor":
            scales = scales.reshape(-(-out // block[0]), -(-inside // block[1]))
            return BlockFloat8(codes.array(), codes.dtype, scales, (block[0], block[1]), stored)
        zeros = _zeros(stored)
        if kind == "Int4Tensor":
            parts = (scales.T, None if zeros is None else zeros.reshape(scales.shape).T)
        else:
            parts = (_rows(scales, out), None if zeros is None else _rows(zeros, out))
        return TorchaoWeight(linear.shape, codes.array(), parts[0], parts[1], kind == "Int4Tensor", stored)


def _metadata(file: Path) -> dict[str, Any]:
    """What torchao wrote of each weight into the header of one file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            found = opened.metadata() or {}
    except (SafetensorError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"the metadata of {file} isn't what torchao writes: {cause}") from None
    return {
        name: json_text.parse_json(
            text.encode(), f"the metadata of {name} in {file}", CheckpointError, json_text.SHORT
        )
        for name, text in found.items()
        if text.startswith("{")
    }


def _stored(tensors: TensorFolder, module: str, facts: Mapping[str, Any]) -> StoredLinear:
    about = facts.get(f"{module}.weight")
    about = about if isinstance(about, dict) else {}
    kind = about.get("_type")
    if kind not in _CLASSES:
        raise FormatError(
            f"{module} is a torchao {kind or 'weight without metadata'}; vera-edge reads "
            f"{', '.join(_CLASSES)}"
        )
    roles = checks.roles(tensors, module, kind, {"qdata": "._weight_qdata", "scale": "._weight_scale"})
    roles |= {part: f"{module}._weight_{part}" for part in _PARTS if f"{module}._weight_{part}" in tensors}
    if f"{module}._weight_act_pre_scale" in tensors:
        raise FormatError(f"{module} scales its inputs (act_pre_scale), which vera-edge doesn't read")
    out, words = checks.matrix(tensors, roles["qdata"])
    inside = 2 * words if kind == "Int4Tensor" else words
    block = _block(about, module, (out, inside))
    dtypes = {"F8_E4M3", "F8_E5M2"} if kind == "Float8Tensor" else {"I8", "U8"} if words != inside else {"I8"}
    checks.expect(tensors, roles["qdata"], dtypes, (out, words), kind)
    count = (out // block[0], inside // block[1])
    for role in ("scale", "zero_point"):
        if role not in roles:
            continue
        info = tensors[roles[role]]
        expected = count[::-1] if kind == "Int4Tensor" else count
        if math.prod(info.shape) != math.prod(count) or (kind == "Int4Tensor" and info.shape != expected):
            raise CheckpointError(
                f"{info.name} in {info.file} has shape {list(info.shape)}, but blocks of {block} ask for "
                f"{list(expected)}"
            )
    checks.expect(tensors, roles["scale"], checks.SCALES, tensors[roles["scale"]].shape, kind)
    return StoredLinear(module, out, inside, "torchao", roles, {"class": kind, "block": block})


def _block(about: Mapping[str, Any], module: str, shape: tuple[int, int]) -> list[int]:
    """The block size (rows, columns): whole blocks that tile the weight, of one row or of all."""
    data = about.get("_data")
    block = data.get("block_size") if isinstance(data, dict) else None
    sound = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if not sound or not block or shape[0] % block[0] or shape[1] % block[1]:
        raise CheckpointError(f"{module}: blocks of {block!r} don't tile its {shape[0]} x {shape[1]} weight")
    if block[0] not in (1, shape[0]) or (block[0] != 1 and block[1] != shape[1]):
        raise FormatError(
            f"{module}: torchao blocks of {block} aren't known; one row's or the whole tensor's are"
        )
    return block


def _zeros(stored: Mapping[str, RawTensor]) -> Float32 | None:
    if "._weight_zero_point" not in stored:
        return None
    raw = stored["._weight_zero_point"]
    zeros = raw.float32() if raw.dtype in checks.SCALES else raw.array().astype(np.float32)
    if not np.isfinite(zeros).all():
        raise CheckpointError("a torchao zero_point holds NaN or infinite values; the checkpoint is damaged")
    return zeros


def _rows(values: Float32, out: int) -> Float32:
    """Scales or zeros as (out, groups), one for the whole tensor repeated."""
    return np.full((out, 1), values.reshape(()), np.float32) if values.size == 1 else values.reshape(out, -1)
