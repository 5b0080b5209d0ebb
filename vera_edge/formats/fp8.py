"""The fine-grained FP8 of transformers (DeepSeek-V3's): E4M3 weights with one scale for each block.

`weight` F8_E4M3 (out, in), `weight_scale_inv` (ceil(out / 128), ceil(in / 128)), or a single scale:
`w = weight * weight_scale_inv`, which the name notwithstanding is multiplied.
Source: https://arxiv.org/abs/2412.19437 section 3.3, and transformers' `finegrained_fp8` integration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import FormatError, PlanError
from vera_edge.formats import affine, checks, float8
from vera_edge.formats.weight import Layout, StoredLinear, row_chunks
from vera_edge.storage.tensors import RawTensor, TensorFolder

_SUFFIXES = {"weight": ".weight", "weight_scale_inv": ".weight_scale_inv"}


@dataclass(frozen=True)
class BlockFloat8:
    """An FP8 weight in memory: codes uint8 (out, in), scales float32 for each `block` (rows, columns) of
    it.
    """

    codes: Bytes
    dtype: str
    scales: Float32
    block: tuple[int, int]
    stored: Mapping[str, RawTensor]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def rows(self, start: int, stop: int) -> Float32:
        values = float8.decode(self.codes[start:stop], self.dtype)
        return _scaled(values, self.scales, self.block, start)

    def tensors(self) -> Mapping[str, RawTensor]:
        return self.stored


def _scaled(values: Float32, scales: Float32, block: tuple[int, int], start: int) -> Float32:
    """Multiply rows `start` and on by their blocks' scales, in place."""
    rows = np.arange(start, start + values.shape[0]) // block[0]
    for column in range(scales.shape[1]):
        part = values[:, column * block[1] : (column + 1) * block[1]]
        part *= scales[rows, column : column + 1]
    return values


def quantize_blocks(weight: Float32, block: tuple[int, int]) -> tuple[Bytes, Float32]:
    """Codes (out, in) and scales for each block: its largest magnitude becomes 448.

    Scales have 20 significant bits, so that every value is exact in float32.
    Raises PlanError on values that aren't finite.
    """
    out, inside = weight.shape
    codes = np.empty((out, inside), np.uint8)
    scales = np.empty((-(-out // block[0]), -(-inside // block[1])), np.float32)
    edges = np.arange(0, inside, block[1])
    for start, stop in row_chunks((out, inside), block[0]):
        part = weight[start:stop]
        if not np.isfinite(part).all():
            raise PlanError("a weight with NaN or infinite values can't be quantized to FP8")
        largest = np.maximum.reduceat(np.abs(part), edges, axis=1)
        largest = np.maximum.reduceat(largest, np.arange(0, stop - start, block[0]), axis=0)
        fitted = affine.keep_bits((largest / float8.MAX).astype(np.float32), 20)
        fitted = np.where(fitted < 2.0**-100, np.float32(1), fitted)
        scales[start // block[0] : start // block[0] + fitted.shape[0]] = fitted
        divisors = np.repeat(np.repeat(fitted, block[0], 0)[: stop - start], block[1], 1)[:, :inside]
        codes[start:stop] = float8.encode(part / divisors)
    return codes, scales


@dataclass(frozen=True)
class Fp8:
    """transformers' "fp8" method, read with any block size or one scale a tensor."""

    name: str = "fp8"

    quant_method = "fp8"
    skip_key = "modules_to_not_convert"  # of quantization_config: the modules left as they were

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        if checks.method(config) != self.quant_method:
            return {}
        block = _block_size(checks.quantization(config))
        modules = [
            name.removesuffix(".weight")
            for name, info in tensors.items()
            if name.endswith(".weight") and info.dtype in float8.TABLES
        ]
        return {module: _stored(tensors, module, block) for module in modules}

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> BlockFloat8:
        weight = tensors.read(linear.tensors["weight"])
        name = linear.tensors["weight_scale_inv"]
        scales = checks.finite(tensors, name)
        block = tuple(linear.params["block"] or linear.shape)
        scales = scales.reshape(-(-linear.out_features // block[0]), -1)
        stored = {".weight": weight, ".weight_scale_inv": tensors.read(name)}
        return BlockFloat8(weight.array(), weight.dtype, scales, (block[0], block[1]), stored)

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        return {"block": linear.params["block"]}

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """block: [rows, columns] that share a scale, [128, 128] unless told; null for the whole tensor."""
        block = checks.known_options(given, {"block": None}, self.name)["block"] if given else [128, 128]
        if block is not None and not _is_block(block):
            raise PlanError(f"option block of fp8 is {block!r}; give two positive numbers, or null")
        return {"block": None if block is None else list(block)}

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        block = options["block"]
        scales = () if block is None else (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        return {".weight": ("F8_E4M3", shape), ".weight_scale_inv": ("F32", scales)}

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> BlockFloat8:
        shape = (weight.shape[0], weight.shape[1])
        block = shape if options["block"] is None else (options["block"][0], options["block"][1])
        codes, scales = quantize_blocks(weight, block)
        stored = {
            ".weight": RawTensor.of(codes, "F8_E4M3"),
            ".weight_scale_inv": RawTensor.of(scales.reshape(()) if options["block"] is None else scales),
        }
        return BlockFloat8(codes, "F8_E4M3", scales, block, stored)

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": options["block"],
        }


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    )


def _block_size(found: Mapping[str, Any]) -> list[int] | None:
    block = found.get("weight_block_size", [128, 128])
    if block is not None and not _is_block(block):
        raise FormatError(f"weight_block_size of config.json is {block!r} where two positive numbers belong")
    if str(found.get("fmt", "e4m3")) != "e4m3":
        raise FormatError(f"FP8 format {found['fmt']!r} isn't known; save the model as e4m3")
    return None if block is None else list(block)


def _stored(tensors: TensorFolder, module: str, block: list[int] | None) -> StoredLinear:
    roles = checks.roles(tensors, module, "fp8", _SUFFIXES)
    out, inside = checks.matrix(tensors, roles["weight"])
    checks.expect(tensors, roles["weight"], {"F8_E4M3"}, (out, inside), "fp8")
    scales = tensors[roles["weight_scale_inv"]]
    if block is None:
        why, shape = "one scale for the tensor", scales.shape if scales.shape in ((), (1,), (1, 1)) else ()
    else:
        why, shape = f"blocks of {block[0]} x {block[1]}", (-(-out // block[0]), -(-inside // block[1]))
    checks.expect(tensors, roles["weight_scale_inv"], checks.SCALES, shape, why)
    if f"{module}.activation_scale" in tensors:
        roles["activation_scale"] = f"{module}.activation_scale"
    return StoredLinear(module, out, inside, "fp8", roles, {"block": block})
