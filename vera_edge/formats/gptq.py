"""GPTQ's storage: 2, 3, 4 or 8 bits, packed along the inputs, with or without act-order.

`qweight` int32 (in * bits / 32, out) and `qzeros` int32 (groups, out * bits / 32) hold codes lowest bit
first, `scales` (groups, out), `g_idx` int32 (in,) the group of each input:
`w[o, i] = scales[g, o] * (q[i, o] - z[g, o])`. Where the group size doesn't divide the inputs, the last group
is short.
Checkpoint format "gptq" (v1) stores each zero less one, "gptq_v2" as it is.
Source: Frantar et al., https://arxiv.org/abs/2210.17323; the packing is AutoGPTQ's and GPTQModel's
`QuantLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import CheckpointError, FormatError, PlanError
from vera_edge.formats import affine, bitpack, checks
from vera_edge.formats.affine import AffineParams, Integers
from vera_edge.formats.weight import Layout, StoredLinear
from vera_edge.storage.tensors import RawTensor, TensorFolder

_BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")
_DEFAULTS = {"bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "gptq"}
_SHORT = "short_group"  # option: the last group may be short, as it is where a base's was
_SUFFIXES = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}


@dataclass(frozen=True)
class GptqWeight:
    """A GPTQ weight in memory: scales and zeros (groups, out) as float32, index (in,) or None for plain
    order.
    """

    shape: tuple[int, int]
    bits: int
    qweight: npt.NDArray[np.int32]
    scales: Float32
    zeros: Float32
    index: npt.NDArray[np.int64] | None
    stored: Mapping[str, RawTensor]

    def rows(self, start: int, stop: int) -> Float32:
        codes = bitpack.unpack(self.qweight[:, start:stop].T, self.bits, self.shape[1])
        return affine.values(codes, self.scales[:, start:stop].T, self.zeros[:, start:stop].T, self.index)

    def tensors(self) -> Mapping[str, RawTensor]:
        return self.stored

    def integers(self) -> Integers:
        codes = bitpack.unpack(self.qweight.T, self.bits, self.shape[1])
        return Integers(self.bits, AffineParams(codes, self.scales.T, self.zeros.T), self.index)


@dataclass(frozen=True)
class Gptq:
    """GPTQ, written with as many bits as asked for, or `bits`."""

    name: str = "gptq"
    bits: int = 4

    quant_method = "gptq"
    block_key = "group_size"

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        if checks.method(config) != self.quant_method or self.name != "gptq":
            return {}
        settings = _settings(checks.quantization(config))
        modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return {module: _stored(tensors, module, settings) for module in modules}

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> GptqWeight:
        params, roles = linear.params, linear.tensors
        stored = {f".{role}": tensors.read(name) for role, name in roles.items()}
        scales = checks.finite(tensors, roles["scales"])
        zeros = _zeros(
            stored[".qzeros"].array(), params["bits"], linear.out_features, params["checkpoint_format"]
        )
        index = _index(tensors, linear)
        qweight = stored[".qweight"].array()
        return GptqWeight(linear.shape, params["bits"], qweight, scales, zeros, index, stored)

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        found = {key: linear.params[key] for key in _DEFAULTS}
        return found | ({_SHORT: True} if _is_short(linear.in_features, found["group_size"]) else {})

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """bits, group_size (-1: one group a row), sym, checkpoint_format ("gptq" or "gptq_v2").

        short_group: whether the last group may be short; few readers take that, so only a base that has it
        is written so.
        """
        found = checks.known_options(given, {**_DEFAULTS, "bits": self.bits, _SHORT: False}, self.name)
        if not found[_SHORT]:
            del found[_SHORT]
        if not checks.whole(found["bits"], _BITS) or found["checkpoint_format"] not in _VERSIONS:
            raise PlanError(
                f"{self.name} has 2, 3, 4 or 8 bits and checkpoint_format {' or '.join(_VERSIONS)}, not "
                f"{found['bits']} and {found['checkpoint_format']}"
            )
        return found

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        out, inside = shape
        bits, what = options["bits"], f"a linear of {out} x {inside} as {self.name}"
        count = _groups(inside, options, what)
        if out % 32 or inside % 32:
            raise PlanError(f"{what}: both sides must be multiples of 32; keep it in a float format")
        return {
            ".qweight": ("I32", (inside * bits // 32, out)),
            ".qzeros": ("I32", (count, out * bits // 32)),
            ".scales": ("F16", (count, out)),
            ".g_idx": ("I32", (inside,)),
        }

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> GptqWeight:
        count, size = _groups(weight.shape[1], options, self.name), options["group_size"]
        # Zeros at the end change no group's span.
        padded = np.pad(weight, [(0, 0), (0, count * size - weight.shape[1])]) if size > 0 else weight
        grid = affine.fit(
            padded, options["bits"], count, options["sym"], fp16=True, least_zero=_least_zero(options)
        )
        codes = np.ascontiguousarray(grid.codes[:, : weight.shape[1]])
        return self.pack(AffineParams(codes, grid.scales, grid.zeros), options)

    def integer_grid(self, options: Mapping[str, Any]) -> tuple[int, int, bool]:
        """Bits, group size (-1: the whole row) and whether it's symmetric: the grid `pack` takes codes of."""
        return options["bits"], options["group_size"], options["sym"]

    def least_zero(self, options: Mapping[str, Any]) -> int:
        """The least zero point that can be stored; see `_least_zero`."""
        return _least_zero(options)

    def pack(
        self, grid: AffineParams, options: Mapping[str, Any], index: npt.NDArray[Any] | None = None
    ) -> GptqWeight:
        """A weight from codes chosen elsewhere; index (in,): each input's group, when act-order permuted
        them.

        Scales are rounded to float16; zeros must be whole numbers from 0 (v1: 1) to `2 ** bits - 1`.
        """
        bits, inside = options["bits"], grid.codes.shape[1]
        least = _least_zero(options)
        zeros = np.ascontiguousarray(grid.zeros.T)
        if zeros.min() < least or zeros.max() >= 2**bits or (zeros != np.floor(zeros)).any():
            raise PlanError(f"zero points of {options['checkpoint_format']} are whole numbers from {least}")
        qweight = np.ascontiguousarray(bitpack.pack(grid.codes, bits).T)
        qzeros = bitpack.pack((zeros - least).astype(np.uint8), bits)
        scales = np.ascontiguousarray(grid.scales.T.astype(np.float16).astype(np.float32))
        plain = np.arange(inside) // (options["group_size"] if options["group_size"] > 0 else inside)
        used = plain if index is None else np.asarray(index)
        stored = {
            ".qweight": RawTensor.of(qweight),
            ".qzeros": RawTensor.of(qzeros),
            ".scales": RawTensor.of(scales.astype(np.float16)),
            ".g_idx": RawTensor.of(used.astype(np.int32)),
        }
        order = (
            used.astype(np.int64) if index is not None or _is_short(inside, options["group_size"]) else None
        )
        return GptqWeight((grid.codes.shape[0], inside), bits, qweight, scales, zeros, order, stored)

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"quant_method": "gptq", **{key: options[key] for key in _DEFAULTS}, "desc_act": False}


def _is_short(inside: int, size: int) -> bool:
    """Whether groups of this size leave a short one at the end."""
    return size > 0 and inside % size != 0


def _groups(inside: int, options: Mapping[str, Any], what: str) -> int:
    """How many groups a row is written in; raises PlanError when one would be short and mayn't be."""
    size = options["group_size"]
    if options.get(_SHORT) and type(size) is int and size > 0:
        return -(-inside // size)
    return checks.groups(inside, size, what, PlanError)


def _least_zero(options: Mapping[str, Any]) -> int:
    """v1 would store a zero point of 0 as -1, which its readers take in different ways."""
    return 1 if options["checkpoint_format"] == "gptq" else 0


def _settings(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """bits, group_size and version of a quantization_config, each one that is known."""
    version = str(found.get("checkpoint_format") or found.get("format") or "gptq")
    if version not in _VERSIONS or found.get("is_marlin_format"):
        raise FormatError(
            f"GPTQ checkpoint format {'marlin' if found.get('is_marlin_format') else version!r} isn't known; "
            f"save the model as {' or '.join(_VERSIONS)}"
        )
    if not checks.whole(found.get("bits"), _BITS):
        raise FormatError(f"GPTQ with {found.get('bits')!r} bits isn't known; it has 2, 3, 4 or 8")
    if found.get("pack_dtype") not in (None, "int32") or found.get("planar"):
        raise FormatError(
            "this GPTQ checkpoint is packed in another way than in 32-bit words, code after code"
        )
    return {
        "bits": found["bits"],
        "group_size": found.get("group_size", -1),
        "checkpoint_format": version,
        "sym": bool(found.get("sym", True)),
        "desc_act": bool(found.get("desc_act", False)),
        "dynamic": bool(found.get("dynamic")),
    }


def _stored(tensors: TensorFolder, module: str, settings: Mapping[str, Any]) -> StoredLinear:
    roles = checks.roles(tensors, module, "gptq", _SUFFIXES)
    words, out = checks.matrix(tensors, roles["qweight"])
    bits, group = settings["bits"], settings["group_size"]
    inside = words * 32 // bits
    if f"{module}.g_idx" in tensors:
        roles["g_idx"] = f"{module}.g_idx"
        inside = tensors[roles["g_idx"]].shape[0] if tensors[roles["g_idx"]].shape else 0
        checks.expect(tensors, roles["g_idx"], {"I32"}, (inside,), "g_idx")
        if settings["dynamic"] and inside and words * 32 % inside == 0:  # rules may give modules other widths
            bits = words * 32 // inside
            group = _group_of(inside, group, checks.matrix(tensors, roles["scales"])[0])
    elif settings["desc_act"]:
        raise CheckpointError(
            f"{module} is stored as gptq with act-order, but its tensor {module}.g_idx is missing"
        )
    if bits not in _BITS or inside * bits != words * 32:
        raise CheckpointError(
            f"{roles['qweight']} has {words} rows of 32 bits, which isn't {inside} inputs of {bits} bits; "
            "the config is another model's"
        )
    count, why = checks.groups(inside, group, module, short=True), f"{bits} bits in groups of {group}"
    checks.expect(tensors, roles["qweight"], {"I32"}, (words, out), why)
    checks.expect(tensors, roles["scales"], checks.SCALES, (count, out), why)
    checks.expect(tensors, roles["qzeros"], {"I32"}, (count, -(-out * bits // 32)), why)
    kept = ("checkpoint_format", "sym", "desc_act")
    params = {"bits": bits, "group_size": group, **{key: settings[key] for key in kept}}
    return StoredLinear(module, out, inside, "gptq", roles, params)


def _group_of(inside: int, group: Any, rows: int) -> int:
    """The group size that a module's rows of scales tell: the config's where it fits, else an even one."""
    even = [inside // rows] if inside % rows == 0 else []
    sizes = (group, *even, *(1 << power for power in range(12, 3, -1)))
    fits = (size for size in sizes if type(size) is int and size > 0 and -(-inside // size) == rows)
    return next(fits, inside)


def _zeros(packed: npt.NDArray[np.int32], bits: int, out: int, version: str) -> Float32:
    """Zero points (groups, out) as float32; v1 stores them less one.

    A v1 zero point of 0 borrowed from the next field of its word when it was written: adding the ones back
    to the whole word undoes that, and equals `code + 1` for all others. 3-bit fields run over words: each by
    itself there.
    """
    if version == "gptq_v2":
        return bitpack.unpack(packed, bits, out).astype(np.float32)
    if bits == 3:
        return ((bitpack.unpack(packed, bits, out) + 1) & 7).astype(np.float32)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return bitpack.unpack(packed.view(np.uint32) + ones, bits, out).astype(np.float32)


def _index(tensors: TensorFolder, linear: StoredLinear) -> npt.NDArray[np.int64] | None:
    """The group of each input, None when all are of one size and lie in order."""
    count, size = tensors[linear.tensors["scales"]].shape[0], linear.params["group_size"]
    plain = np.arange(linear.in_features) // (size if size > 0 else linear.in_features)
    short = _is_short(linear.in_features, size)
    if "g_idx" not in linear.tensors:
        return plain if short else None
    name = linear.tensors["g_idx"]
    index = tensors.read(name).array().astype(np.int64)
    if index.min() < 0 or index.max() >= count:
        raise CheckpointError(
            f"{name} in {tensors[name].file} names group {index.min() if index.min() < 0 else index.max()} "
            f"where there are {count}; the checkpoint is damaged"
        )
    return index if short or not np.array_equal(index, plain) else None
