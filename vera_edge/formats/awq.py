"""AWQ's GEMM storage: 4 bits, eight outputs to a word in interleaved order, with zero points.

`qweight` int32 (in, out / 8), `qzeros` int32 (in / group, out / 8), `scales` (in / group, out);
`w[o, i] = scales[g, o] * (q[i, o] - z[g, o])`. The nibbles of a word, lowest first, are outputs
0, 2, 4, 6, 1, 3, 5, 7.
Source: Lin et al., https://arxiv.org/abs/2306.00978; the packing is AutoAWQ's `WQLinear_GEMM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import FormatError, PlanError
from vera_edge.formats import affine, bitpack, checks
from vera_edge.formats.affine import AffineParams, Integers
from vera_edge.formats.weight import Layout, StoredLinear
from vera_edge.storage.tensors import RawTensor, TensorFolder

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_WIDTH = 8  # outputs in a word
_SUFFIXES = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}


def _unpack(words: npt.NDArray[np.int32]) -> Bytes:
    """(rows, n) words -> (rows, 8 n) codes in the outputs' order."""
    nibbles = bitpack.unpack(words, 4, words.shape[1] * _WIDTH).reshape(words.shape[0], -1, _WIDTH)
    codes = np.empty_like(nibbles)
    codes[:, :, _ORDER] = nibbles
    return codes.reshape(words.shape[0], -1)


def _pack(codes: Bytes) -> npt.NDArray[np.int32]:
    """The inverse of `_unpack`."""
    ordered = codes.reshape(codes.shape[0], -1, _WIDTH)[:, :, _ORDER]
    return bitpack.pack(ordered.reshape(codes.shape), 4)


@dataclass(frozen=True)
class AwqWeight:
    """An AWQ weight in memory: qweight int32 (in, out / 8), scales and zeros (groups, out) as float32."""

    shape: tuple[int, int]
    qweight: npt.NDArray[np.int32]
    scales: Float32
    zeros: Float32
    stored: Mapping[str, RawTensor]

    def rows(self, start: int, stop: int) -> Float32:
        first, last = start // _WIDTH, -(-stop // _WIDTH)
        codes = _unpack(self.qweight[:, first:last]).T
        codes = codes[start - first * _WIDTH : stop - first * _WIDTH]
        return affine.values(codes, self.scales[:, start:stop].T, self.zeros[:, start:stop].T)

    def tensors(self) -> Mapping[str, RawTensor]:
        return self.stored

    def integers(self) -> Integers:
        return Integers(4, AffineParams(_unpack(self.qweight).T, self.scales.T, self.zeros.T))


@dataclass(frozen=True)
class Awq:
    """AWQ, GEMM version, 4 bits."""

    name: str = "awq"

    quant_method = "awq"
    block_key = "group_size"
    skip_key = "modules_to_not_convert"  # of quantization_config: the modules left as they were

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        if checks.method(config) != self.quant_method:
            return {}
        group = _group_size(checks.quantization(config))
        modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return {module: _stored(tensors, module, group) for module in modules}

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> AwqWeight:
        stored = {f".{role}": tensors.read(name) for role, name in linear.tensors.items()}
        scales = checks.finite(tensors, linear.tensors["scales"])
        zeros = _unpack(stored[".qzeros"].array()).astype(np.float32)
        return AwqWeight(linear.shape, stored[".qweight"].array(), scales, zeros, stored)

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        return {"group_size": linear.params["group_size"]}

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """group_size: inputs that share a scale, -1 for all of a row."""
        return checks.known_options(given, {"group_size": 128}, self.name)

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        out, inside = shape
        what = f"a linear of {out} x {inside} as {self.name}"
        count = checks.groups(inside, options["group_size"], what, PlanError)
        if out % _WIDTH:
            raise PlanError(f"{what}: its outputs must be a multiple of 8; keep it in a float format")
        return {
            ".qweight": ("I32", (inside, out // _WIDTH)),
            ".qzeros": ("I32", (count, out // _WIDTH)),
            ".scales": ("F16", (count, out)),
        }

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> AwqWeight:
        count = checks.groups(weight.shape[1], options["group_size"], self.name, PlanError)
        return self.pack(affine.fit(weight, 4, count, symmetric=False, fp16=True), options)

    def integer_grid(self, options: Mapping[str, Any]) -> tuple[int, int, bool]:
        """Bits, group size (-1: the whole row) and whether it's symmetric: the grid `pack` takes codes of."""
        return 4, options["group_size"], False

    def pack(self, grid: AffineParams, options: Mapping[str, Any]) -> AwqWeight:
        """A weight from codes chosen elsewhere; scales are rounded to float16, zeros whole, from 0 to 15."""
        zeros = np.ascontiguousarray(grid.zeros.T)
        scales = np.ascontiguousarray(grid.scales.T.astype(np.float16).astype(np.float32))
        if zeros.min() < 0 or zeros.max() > 15 or (zeros != np.floor(zeros)).any():
            raise PlanError("zero points of awq are whole numbers from 0 to 15")
        qweight = _pack(np.ascontiguousarray(grid.codes.T))
        stored = {
            ".qweight": RawTensor.of(qweight),
            ".qzeros": RawTensor.of(_pack(zeros.astype(np.uint8))),
            ".scales": RawTensor.of(scales.astype(np.float16)),
        }
        return AwqWeight((grid.codes.shape[0], grid.codes.shape[1]), qweight, scales, zeros, stored)

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": options["group_size"],
            "zero_point": True,
        }


def _group_size(found: Mapping[str, Any]) -> Any:
    named = (found.get("version"), found.get("checkpoint_format"), found.get("format"), "gemm")
    version = str(next(name for name in named if name)).lower()
    if version != "gemm":
        raise FormatError(f"AWQ version {version!r} isn't known; save the model as AWQ gemm")
    bits = found.get("bits", found.get("w_bit", 4))
    if not checks.whole(bits, (4,)) or not found.get("zero_point", True):
        raise FormatError(
            f"AWQ with {bits!r} bits and zero_point={found.get('zero_point', True)} isn't known"
        )
    return found.get("group_size", found.get("q_group_size", 128))


def _stored(tensors: TensorFolder, module: str, group: Any) -> StoredLinear:
    roles = checks.roles(tensors, module, "awq", _SUFFIXES)
    inside, words = checks.matrix(tensors, roles["qweight"])
    count, out = checks.groups(inside, group, module), words * _WIDTH
    why = f"4 bits in groups of {group}"
    checks.expect(tensors, roles["qweight"], {"I32"}, (inside, words), why)
    checks.expect(tensors, roles["qzeros"], {"I32"}, (count, words), why)
    checks.expect(tensors, roles["scales"], checks.SCALES, (count, out), why)
    return StoredLinear(module, out, inside, "awq", roles, {"group_size": group})
