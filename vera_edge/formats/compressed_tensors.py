"""The integer and FP8 formats of compressed-tensors (llm-compressor, vLLM).

"pack-quantized": `weight_packed` int32 (out, in * bits / 32), `weight_shape` int64 (2,), and when asymmetric
`weight_zero_point` int32 (out * bits / 32, groups), all codes offset by `2 ** (bits - 1)`, lowest bit first.
"int-quantized", "float-quantized", "naive-quantized": `weight` int8 or E4M3 (out, in), `weight_zero_point`
int8 or a wider integer, one for each scale; some write it so for packed weights too. `weight_scale` is one
for the tensor, each output, group of inputs, or block; `w = scale * (q - zero)`.
Source: https://github.com/vllm-project/compressed-tensors, `compressors` and `quantization/lifecycle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import CheckpointError, PlanError
from vera_edge.formats import affine, bitpack, checks, ct_schemes
from vera_edge.formats.affine import AffineParams, Integers
from vera_edge.formats.ct_schemes import Scheme
from vera_edge.formats.fp8 import BlockFloat8, quantize_blocks
from vera_edge.formats.weight import Layout, StoredLinear, Weight
from vera_edge.storage.tensors import RawTensor, TensorFolder

_PACKED = ("weight_packed", "weight_shape")
_ZERO_DTYPES = frozenset({"I8", "U8", "I16", "I32", "I64"})


@dataclass(frozen=True)
class IntegerWeight:
    """An integer weight in memory: scales and zeros float32 (out, groups), zeros None when symmetric.

    codes: int8 (out, in), or packed int32 words when `bits` is given. index (in,): None for plain order.
    """

    shape: tuple[int, int]
    codes: npt.NDArray[Any]
    bits: int | None
    scales: Float32
    zeros: Float32 | None
    index: npt.NDArray[np.int64] | None
    stored: Mapping[str, RawTensor]

    def rows(self, start: int, stop: int) -> Float32:
        codes = self.codes[start:stop]
        if self.bits is not None:
            codes = bitpack.unpack(codes, self.bits, self.shape[1]).astype(np.int16) - (1 << self.bits - 1)
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return affine.values(codes, self.scales[start:stop], zeros, self.index)

    def tensors(self) -> Mapping[str, RawTensor]:
        return self.stored

    def integers(self) -> Integers:
        bits = self.bits or 8
        half = 1 << bits - 1
        if self.bits is None:
            codes = (self.codes.astype(np.int16) + half).astype(np.uint8)
        else:
            codes = bitpack.unpack(self.codes, bits, self.shape[1])
        zeros = np.zeros_like(self.scales) if self.zeros is None else self.zeros
        return Integers(bits, AffineParams(codes, self.scales, zeros + np.float32(half)), self.index)


@dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors; `preset` is the scheme it writes, by compressed-tensors' own name."""

    name: str = "compressed-tensors"
    preset: str = "W4A16"

    quant_method = "compressed-tensors"
    block_key = "group_size"
    skip_key = "ignore"  # of quantization_config: the modules left as they were

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        if checks.method(config) != self.quant_method or self.name != self.quant_method:
            return {}
        schemes = ct_schemes.read(checks.quantization(config))
        found = {}
        for name, info in tensors.items():
            module, _, last = name.rpartition(".")
            if last == "weight_packed" or (last == "weight" and info.dtype in ("I8", "F8_E4M3")):
                found[module] = _stored(tensors, module, ct_schemes.scheme_of(module, schemes))
        return found

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What the base rounds beside its weights, which isn't reproduced."""
        return ct_schemes.notes(checks.quantization(config))

    def rounds_weights(self, config: Mapping[str, Any]) -> bool:
        """Whether any config group is about weights; others are about activations or the KV cache."""
        return bool(ct_schemes.read(checks.quantization(config)))

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> Weight:
        scheme, roles = Scheme(**linear.params), linear.tensors
        stored = {f".{role}": tensors.read(name) for role, name in roles.items()}
        scales = checks.finite(tensors, roles["weight_scale"])
        if scheme.kind == "float":
            block = scheme.block_of(linear.shape)
            scales = scales.reshape(-(-linear.out_features // block[0]), -1)
            weight = stored[".weight"]
            return BlockFloat8(weight.array(), weight.dtype, scales, block, stored)
        scales = _spread(scales, linear.out_features)
        zeros = _zeros(tensors, roles, stored, scheme, scales.shape)
        index = _index(tensors, linear, scales.shape[1]) if "weight_g_idx" in roles else None
        codes = stored[".weight_packed" if scheme.packed else ".weight"].array()
        bits = scheme.bits if scheme.packed else None
        return IntegerWeight(linear.shape, codes, bits, scales, zeros, index, stored)

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        preset = ct_schemes.preset_of(Scheme(**linear.params))
        return {"preset": preset, "group_size": linear.params["group_size"] or 128}

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """preset (W4A16, W4A16_ASYM, W8A16, W8A8, FP8_DYNAMIC), group_size where the preset has groups."""
        found = checks.known_options(given, {"preset": self.preset, "group_size": 128}, self.name)
        ct_schemes.preset(found)
        return found

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        scheme, (out, inside) = ct_schemes.preset(options), shape
        what = f"a linear of {out} x {inside} as {options['preset']}"
        groups = checks.groups(inside, scheme.group_size or -1, what, PlanError)
        if not scheme.packed:
            dtype = "I8" if scheme.kind == "int" else "F8_E4M3"
            return {".weight": (dtype, shape), ".weight_scale": ("F32", (out, groups))}
        layout: dict[str, tuple[str, tuple[int, ...]]] = {
            ".weight_packed": ("I32", (out, -(-inside * scheme.bits // 32))),
            ".weight_scale": ("F16", (out, groups)),
            ".weight_shape": ("I64", (2,)),
        }
        if not scheme.symmetric:
            layout[".weight_zero_point"] = ("I32", (-(-out * scheme.bits // 32), groups))
        return layout

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> Weight:
        shape, scheme = (weight.shape[0], weight.shape[1]), ct_schemes.preset(options)
        if scheme.kind == "float":
            codes, scales = quantize_blocks(weight, (1, shape[1]))
            stored = {".weight": RawTensor.of(codes, "F8_E4M3"), ".weight_scale": RawTensor.of(scales)}
            return BlockFloat8(codes, "F8_E4M3", scales, (1, shape[1]), stored)
        groups = checks.groups(shape[1], scheme.group_size or -1, options["preset"], PlanError)
        grid = affine.fit(weight, scheme.bits, groups, scheme.symmetric, fp16=scheme.packed)
        return self.pack(grid, options)

    def integer_grid(self, options: Mapping[str, Any]) -> tuple[int, int, bool] | None:
        """Bits, group size (-1: the whole row) and whether it's symmetric; None for FP8."""
        scheme = ct_schemes.preset(options)
        return (scheme.bits, scheme.group_size or -1, scheme.symmetric) if scheme.kind == "int" else None

    def pack(self, grid: AffineParams, options: Mapping[str, Any]) -> IntegerWeight:
        """A weight from codes chosen elsewhere; scales of packed presets are rounded to float16."""
        scheme, shape = ct_schemes.preset(options), (grid.codes.shape[0], grid.codes.shape[1])
        half = 1 << scheme.bits - 1
        zeros = None if scheme.symmetric else grid.zeros - np.float32(half)
        if scheme.symmetric and (grid.zeros != half).any():
            raise PlanError(f"zero points of the symmetric {options['preset']} are {half}")
        if not scheme.packed:
            codes = (grid.codes.astype(np.int16) - half).astype(np.int8)
            stored = {".weight": RawTensor.of(codes), ".weight_scale": RawTensor.of(grid.scales)}
            return IntegerWeight(shape, codes, None, grid.scales, zeros, None, stored)
        words = bitpack.pack(grid.codes, scheme.bits)
        rounded = grid.scales.astype(np.float16)
        stored = {
            ".weight_packed": RawTensor.of(words),
            ".weight_scale": RawTensor.of(rounded),
            ".weight_shape": RawTensor.of(np.array(shape, np.int64)),
        }
        if not scheme.symmetric:
            packed = bitpack.pack(np.ascontiguousarray(grid.zeros.T.astype(np.uint8)), scheme.bits)
            stored[".weight_zero_point"] = RawTensor.of(np.ascontiguousarray(packed.T))
        return IntegerWeight(shape, words, scheme.bits, rounded.astype(np.float32), zeros, None, stored)

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return ct_schemes.quantization_config(options)


def _stored(tensors: TensorFolder, module: str, scheme: Scheme) -> StoredLinear:
    names = [*(_PACKED if scheme.packed else ["weight"]), "weight_scale"]
    if not scheme.symmetric:
        names.append("weight_zero_point")
    roles = checks.roles(
        tensors, module, f"{scheme.format} of compressed-tensors", {n: f".{n}" for n in names}
    )
    out, inside = checks.matrix(tensors, roles["weight_packed" if scheme.packed else "weight"])
    if scheme.packed:
        inside = _packed_inside(tensors, module, roles, scheme, out)
    else:
        dtype = "I8" if scheme.kind == "int" else "F8_E4M3"
        checks.expect(tensors, roles["weight"], {dtype}, (out, inside), scheme.format)
    shape = _scale_shape(tensors, roles["weight_scale"], scheme, module, (out, inside))
    checks.expect(tensors, roles["weight_scale"], checks.SCALES, shape, scheme.described)
    zero_points = f"{module}.weight_zero_point"
    if scheme.kind == "int" and zero_points in tensors:  # zeros throughout, where the scheme is symmetric
        roles["weight_zero_point"] = zero_points
        packed = (-(-out * scheme.bits // 32), shape[-1] if shape else 1)
        if scheme.packed and tensors[zero_points].shape not in (shape, (*shape, 1)):
            checks.expect(tensors, zero_points, {"I32"}, packed, scheme.described)
        else:
            checks.expect(tensors, zero_points, _ZERO_DTYPES, shape, scheme.described)
    if f"{module}.weight_g_idx" in tensors:
        roles["weight_g_idx"] = f"{module}.weight_g_idx"
        checks.expect(tensors, roles["weight_g_idx"], {"I32", "I64"}, (inside,), "the number of inputs")
    for extra in ("input_scale", "input_zero_point", "output_scale", "output_zero_point"):
        if (
            f"{module}.{extra}" in tensors
        ):  # activations' own, which go when the weight is no longer quantized
            roles[extra] = f"{module}.{extra}"
    return StoredLinear(module, out, inside, "compressed-tensors", roles, scheme.to_dict())


def _packed_inside(
    tensors: TensorFolder, module: str, roles: Mapping[str, str], scheme: Scheme, out: int
) -> int:
    """in_features of a packed weight, which its weight_shape tells."""
    name = roles["weight_shape"]
    checks.expect(tensors, name, {"I64", "I32"}, (2,), "a matrix")
    rows, inside = (int(size) for size in tensors.read(name).array())
    words = tensors[roles["weight_packed"]].shape[1]
    if rows != out or not 0 < inside < 1 << 40 or -(-inside * scheme.bits // 32) != words:
        raise CheckpointError(
            f"{name} says {module} is {rows} x {inside}, but its packed weight has {out} rows of {words} "
            f"words of {scheme.bits}-bit codes"
        )
    checks.expect(tensors, roles["weight_packed"], {"I32"}, (out, words), scheme.described)
    return inside


def _scale_shape(
    tensors: TensorFolder, name: str, scheme: Scheme, module: str, shape: tuple[int, int]
) -> tuple[int, ...]:
    """The shape that the scales must have."""
    out, inside = shape
    if scheme.strategy == "tensor":
        given = tensors[name].shape
        return given if given in ((), (1,), (1, 1)) else (1,)
    if scheme.strategy == "block":
        block = scheme.block_of(shape)
        return (-(-out // block[0]), -(-inside // block[1]))
    if scheme.strategy == "channel":
        return (out,) if tensors[name].shape == (out,) else (out, 1)
    return (out, checks.groups(inside, scheme.group_size, module))


def _spread(scales: Float32, out: int) -> Float32:
    """Scales as (out, groups), one for the whole tensor repeated."""
    if scales.size == 1:
        return np.full((out, 1), scales.reshape(()), np.float32)
    return scales.reshape(out, -1)


def _zeros(
    tensors: TensorFolder,
    roles: Mapping[str, str],
    stored: Mapping[str, RawTensor],
    scheme: Scheme,
    shape: tuple[int, ...],
) -> Float32 | None:
    """Zero points (out, groups) as float32 in the signed codes' range, None when symmetric."""
    if "weight_zero_point" not in roles:
        return None
    name, zeros = roles["weight_zero_point"], stored[".weight_zero_point"].array()
    half = 1 << scheme.bits - 1
    if scheme.packed and zeros.shape != tensors[roles["weight_scale"]].shape:
        zeros = bitpack.unpack(np.ascontiguousarray(zeros.T), scheme.bits, shape[0]).T.astype(np.int16) - half
    if zeros.min() < -half or zeros.max() >= half:
        raise CheckpointError(
            f"{name} in {tensors[name].file} holds {zeros.min()} to {zeros.max()}, and {scheme.bits} bits "
            f"reach from {-half} to {half - 1}; the checkpoint is damaged"
        )
    if scheme.symmetric and zeros.any():
        raise CheckpointError(
            f"{name} in {tensors[name].file} holds zero points other than 0, and config.json says symmetric; "
            "one of the two belongs to another model"
        )
    return None if scheme.symmetric else _spread(zeros.astype(np.float32), shape[0])


def _index(tensors: TensorFolder, linear: StoredLinear, groups: int) -> npt.NDArray[np.int64] | None:
    """The group of each input with activation ordering; None for -1 throughout, which means plain order."""
    name = linear.tensors["weight_g_idx"]
    index = tensors.read(name).array().astype(np.int64)
    if (index == -1).all():
        return None
    if index.min() < 0 or index.max() >= groups:
        raise CheckpointError(f"{name} names a group outside 0 to {groups - 1}; the checkpoint is damaged")
    return index
