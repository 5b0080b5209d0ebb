"""bitsandbytes' LLM.int8 weights: int8 rows, each with the absolute maximum it was scaled by (SCB).

A value is `code * SCB[row] / 127`. Source: Dettmers et al., LLM.int8(), https://arxiv.org/abs/2208.07339,
and bitsandbytes' `int8_vectorwise_quant` / `int8_vectorwise_dequant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import CheckpointError, FormatError, PlanError
from vera_edge.formats.weight import Layout, StoredLinear, row_chunks
from vera_edge.storage.tensors import FLOATS, RawTensor, TensorFolder

# The factor bitsandbytes multiplies by; not the float32 nearest to 1 / 127 by division, hence spelled out.
_ONE_127TH = np.float32(7.874015718698502e-3)


@dataclass(frozen=True)
class Int8Weight:
    """An LLM.int8 weight in memory: int8 `codes` (out, in), float32 `scales` (out,)."""

    codes: npt.NDArray[np.int8]
    scales: Float32

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def rows(self, start: int, stop: int) -> Float32:
        values = self.codes[start:stop].astype(np.float32)
        values *= self.scales[start:stop, None]
        values *= _ONE_127TH
        return values

    def tensors(self) -> Mapping[str, RawTensor]:
        return {
            ".weight": RawTensor.of(self.codes),
            ".SCB": RawTensor.of(self.scales),
            ".weight_format": RawTensor("U8", (), np.zeros(1, np.uint8)),  # 0: row-major
        }


@dataclass(frozen=True)
class Int8:
    """LLM.int8."""

    name: str = "int8"

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        modules = [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]
        return {module: self._stored(tensors, module) for module in modules}

    def _stored(self, tensors: TensorFolder, module: str) -> StoredLinear:
        roles = {"weight": f"{module}.weight", "SCB": f"{module}.SCB"}
        if f"{module}.weight_format" in tensors:
            roles["weight_format"] = f"{module}.weight_format"
        weight, scales = tensors.get(roles["weight"]), tensors[roles["SCB"]]
        if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{scales.file} holds {scales.name} but no int8 {roles['weight']} beside it"
            )
        rows, columns = weight.shape
        if scales.dtype not in FLOATS or scales.shape not in ((rows,), (rows, 1), (1, rows)):
            raise CheckpointError(
                f"{scales.name} in {scales.file} has shape {list(scales.shape)} of {scales.dtype}; the int8 "
                f"weight beside it needs {rows} floats"
            )
        return StoredLinear(module, rows, columns, self.name, roles)

    def stored(self, module: str, shape: tuple[int, int], options: Mapping[str, Any]) -> StoredLinear:
        """A linear of this shape (out, in) as it lies in a checkpoint."""
        roles = {role: f"{module}.{role}" for role in ("weight", "SCB", "weight_format")}
        return StoredLinear(module, *shape, self.name, roles)

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> Int8Weight:
        roles = linear.tensors
        if "weight_format" in roles and tensors.read(roles["weight_format"]).data.any():
            raise FormatError(
                f"{roles['weight']} is stored in a GPU tile order; save the model with bitsandbytes 0.45 or "
                "later, which stores rows"
            )
        scales = tensors.float32(roles["SCB"]).reshape(-1)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{roles['SCB']} holds NaN or infinite scales; the checkpoint is damaged")
        return Int8Weight(tensors.read(roles["weight"]).array(), scales)

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        return {}

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if given:
            raise PlanError(f"{self.name} takes no option {sorted(given)[0]!r}")
        return {}

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        return {".weight": ("I8", shape), ".SCB": ("F32", (shape[0],)), ".weight_format": ("U8", ())}

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> Int8Weight:
        shape = (weight.shape[0], weight.shape[1])
        rounded = self.rounder(shape, options)
        for start, stop in row_chunks(shape):
            rounded.add(weight[start:stop])
        return rounded.weight()

    def rounder(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Int8Rounder:
        return Int8Rounder(shape)

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
        }


class Int8Rounder:
    """Rounds a weight piece by piece; see `formats.Rounder`."""

    multiple = 1

    def __init__(self, shape: tuple[int, int]) -> None:
        self._codes = np.empty(shape, np.int8)
        self._scales = np.empty(shape[0], np.float32)
        self._done = 0

    def add(self, rows: Float32) -> None:
        start, self._done = self._done, self._done + len(rows)
        absmax = np.abs(rows).max(axis=1)
        # torch divides a number by a tensor so: by the reciprocal, which halves may be rounded otherwise by.
        factors = np.reciprocal(np.where(absmax == 0, np.float32(1), absmax)) * np.float32(127)
        self._scales[start : self._done] = absmax
        self._codes[start : self._done] = np.rint(rows * factors[:, None]).astype(np.int8)

    def weight(self) -> Int8Weight:
        return Int8Weight(self._codes, self._scales)
