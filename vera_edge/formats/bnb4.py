"""bitsandbytes' 4-bit formats, NF4 and FP4, read and written bit for bit, in numpy.

Values are packed two to a byte, the first in the high nibble, in row-major order; each run of `blocksize`
values shares one absmax. With double quantization the absmax are 8-bit codes themselves:
`absmax = nested_quant_map[code] * nested_absmax[block of 256] + nested_offset`. Shape and sizes stand in a
JSON text kept as a uint8 tensor, `<module>.weight.quant_state.bitsandbytes__nf4`.
Source: Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314, and bitsandbytes' `functional.QuantState`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_edge.errors import CheckpointError, FormatError
from vera_edge.formats.weight import StoredLinear
from vera_edge.tensors import FLOATS, Bytes, Float32, TensorFolder

# The 16 levels. NF4: quantiles of a normal distribution. FP4: sign, 2 exponent bits, 1 mantissa bit; over 12.
_NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)
_FP4 = "0 0.0625 8 12 4 6 2 3 -0.0 -0.0625 -8 -12 -4 -6 -2 -3"
CODES: Mapping[str, Float32] = {
    "nf4": np.array(_NF4.split(), np.float32),
    "fp4": np.array(_FP4.split(), np.float32) / np.float32(12),
}
_STATE = ".weight.quant_state.bitsandbytes__"
_MAX_STATE = 1 << 16
STORAGES = {"U8": "uint8", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Nested:
    """Double-quantized absmax: 8-bit `codes` (blocks,), a scale for every `blocksize` of them, an offset."""

    codes: Bytes
    code_book: Float32  # (256,)
    scales: Float32
    blocksize: int
    offset: np.float32

    def absmax(self) -> Float32:
        """The absmax (blocks,) as bitsandbytes restores them: product, then sum, each rounded to float32."""
        scales = np.repeat(self.scales, self.blocksize)[: self.codes.size]
        return self.code_book[self.codes] * scales + self.offset


@dataclass(frozen=True)
class Bnb4Weight:
    """An NF4 or FP4 weight in memory.

    `packed`: uint8, flat, two codes a byte. `absmax`: float32 (blocks,), de-nested. `nested`: its
    double-quantized form, where it has one. `storage`: the safetensors dtype the bytes are stored under.
    """

    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    packed: Bytes
    absmax: Float32
    nested: Nested | None = None
    storage: str = "U8"
    dtype: str = "float32"

    def rows(self, start: int, stop: int) -> Float32:
        begin, end = start * self.shape[1], stop * self.shape[1]
        # Blocks run over row ends: begin at the block that holds the first value.
        first = begin // self.blocksize
        aligned = first * self.blocksize
        codes = _unpack(self.packed[aligned // 2 : (end + 1) // 2])[: end - aligned]
        values = CODES[self.quant_type][codes]
        full = values.size // self.blocksize
        blocks = values[: full * self.blocksize].reshape(full, self.blocksize)
        blocks *= self.absmax[first : first + full, None]
        values[full * self.blocksize :] *= self.absmax[first + full : first + full + 1]
        return values[begin - aligned :].reshape(stop - start, self.shape[1])


def _unpack(packed: Bytes) -> Bytes:
    codes = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed, 4, out=codes[:, 0])
    np.bitwise_and(packed, 15, out=codes[:, 1])
    return codes.reshape(-1)


@dataclass(frozen=True)
class Bnb4:
    """NF4 or FP4."""

    name: str

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        suffix = _STATE + self.name
        return {
            name.removesuffix(suffix): self._stored(tensors, name.removesuffix(suffix))
            for name in tensors
            if name.endswith(suffix)
        }

    def _stored(self, tensors: TensorFolder, module: str) -> StoredLinear:
        state = _read_state(tensors, module, self.name)
        weight, nested = f"{module}.weight", "nested_blocksize" in state
        roles = {"weight": weight, "quant_map": f"{weight}.quant_map", "absmax": f"{weight}.absmax"}
        roles["quant_state"] = f"{module}{_STATE}{self.name}"
        if nested:
            roles |= {role: f"{weight}.{role}" for role in ("nested_absmax", "nested_quant_map")}
        for role, name in roles.items():
            if name not in tensors:
                raise CheckpointError(f"{module} is {self.name} but its tensor {name} ({role}) is missing")
        out, inside = state["shape"]
        blocks = -(-out * inside // state["blocksize"])
        _expect(tensors, roles["weight"], frozenset(STORAGES), nbytes=-(-out * inside // 2))
        _expect(tensors, roles["quant_map"], FLOATS, count=16)
        _expect(tensors, roles["absmax"], frozenset({"U8"}) if nested else FLOATS, count=blocks)
        if nested:
            _expect(tensors, roles["nested_absmax"], FLOATS, count=-(-blocks // state["nested_blocksize"]))
            _expect(tensors, roles["nested_quant_map"], FLOATS, count=256)
        params = {
            "blocksize": state["blocksize"],
            "double_quant": nested,
            "storage": tensors[weight].dtype,
            "dtype": state["dtype"],
        }
        if nested:
            params |= {key: state[key] for key in ("nested_blocksize", "nested_offset")}
        return StoredLinear(module, out, inside, self.name, roles, params)

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> Bnb4Weight:
        roles, params = linear.tensors, linear.params
        levels = tensors.float32(roles["quant_map"]).reshape(-1)
        if not np.allclose(levels, CODES[self.name], rtol=0, atol=1e-6):
            raise FormatError(
                f"{roles['quant_map']} isn't the {self.name} code table; which version wrote it?"
            )
        nested = None
        if params["double_quant"]:
            nested = Nested(
                tensors.read(roles["absmax"]).data,
                tensors.float32(roles["nested_quant_map"]).reshape(-1),
                tensors.float32(roles["nested_absmax"]).reshape(-1),
                params["nested_blocksize"],
                np.float32(params["nested_offset"]),
            )
        absmax = nested.absmax() if nested else tensors.float32(roles["absmax"]).reshape(-1)
        if not np.isfinite(absmax).all():
            raise CheckpointError(
                f"{roles['absmax']} holds NaN or infinite scales; the checkpoint is damaged"
            )
        packed = tensors.read(roles["weight"]).data
        return Bnb4Weight(
            linear.shape,
            self.name,
            params["blocksize"],
            packed,
            absmax,
            nested,
            params["storage"],
            params["dtype"],
        )


def _expect(
    tensors: TensorFolder,
    name: str,
    dtypes: frozenset[str],
    count: int | None = None,
    nbytes: int | None = None,
) -> None:
    info = tensors[name]
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"{name} in {info.file} has dtype {info.dtype}, expected {'/'.join(sorted(dtypes))}"
        )
    if count is not None and math.prod(info.shape) != count:
        raise CheckpointError(
            f"{name} in {info.file} holds {math.prod(info.shape)} values, its quant_state asks for {count}"
        )
    if nbytes is not None and info.nbytes != nbytes:
        raise CheckpointError(
            f"{name} in {info.file} holds {info.nbytes} bytes, its quant_state asks for {nbytes}"
        )


def _read_state(tensors: TensorFolder, module: str, quant_type: str) -> dict[str, Any]:
    """The quant_state of one linear, every field checked."""
    name = f"{module}{_STATE}{quant_type}"
    info = tensors[name]
    state: Any = None
    if info.nbytes <= _MAX_STATE:
        try:
            state = json.loads(tensors.read(name).data.tobytes())
        except (ValueError, RecursionError):
            state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{name} in {info.file} isn't the JSON object bitsandbytes writes")
    shape = state.get("shape")
    sound = (
        state.get("quant_type") == quant_type
        and _natural(state.get("blocksize"))
        and state["blocksize"] % 2 == 0
        and isinstance(shape, list)
        and len(shape) == 2
        and all(_natural(size) for size in shape)
        and isinstance(state.get("dtype"), str)
    )
    nested = [key for key in ("nested_blocksize", "nested_offset") if key in state]
    if sound and nested:
        offset = state.get("nested_offset")
        sound = (
            _natural(state.get("nested_blocksize"))
            and isinstance(offset, int | float)
            and math.isfinite(offset)
        )
    if not sound:
        raise CheckpointError(f"{name} in {info.file} describes no {quant_type} weight: {str(state)[:200]}")
    return state


def _natural(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


def parts(tensors: TensorFolder, linear: StoredLinear) -> Bnb4Weight:
    """The raw parts of an NF4 or FP4 linear (packed bytes, exact float32 absmax, block size, quant type)."""
    return Bnb4(linear.format).load(tensors, linear)
