"""Unquantized weights: fp32, fp16, bf16; as nn.Linear stores them (out, in) or as Conv1D does (in, out)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import PlanError
from vera_edge.formats import compiled
from vera_edge.formats.weight import CHUNK_VALUES, Layout, StoredLinear, Weight, add_values
from vera_edge.storage.tensors import RawTensor, TensorFolder, float32_to_bf16

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

# transformers' Conv1D keeps its weight as (in, out). Only these families use it, under these names.
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})
_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_EMBEDDING_NAMES = frozenset(
    {"wte", "wpe", "shared", "tokens_embed", "positions_embed", "relative_attention_bias"}
)


def is_embedding(module: str) -> bool:
    """Whether a module with a 2-D weight is a lookup table and not a linear, by its name."""
    last = module.rsplit(".", 1)[-1]
    return last in _EMBEDDING_NAMES or "embed" in last.replace("embed_out", "")


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _model_types(value)


def is_conv1d(module: str, tensors: TensorFolder, config: Mapping[str, Any]) -> bool:
    """Whether a dense weight is stored as (in, out): its bias tells where it can, else its family does."""
    rows, columns = tensors[f"{module}.weight"].shape
    bias = tensors.get(f"{module}.bias")
    if bias is not None and rows != columns and bias.shape in ((rows,), (columns,)):
        return bias.shape == (columns,)
    return is_conv1d_module(module, config)


def is_conv1d_module(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the model's family makes this module a Conv1D."""
    in_family = not _CONV1D_FAMILIES.isdisjoint(_model_types(config))
    return in_family and module.rsplit(".", 1)[-1] in _CONV1D_NAMES


@dataclass(frozen=True)
class DenseWeight:
    """A float weight in memory; `data` in its stored orientation."""

    data: RawTensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.data.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def rows(self, start: int, stop: int) -> Float32:
        values = self.data.array()
        part = values[:, start:stop].T if self.transposed else values[start:stop]
        return RawTensor.of(part, self.data.dtype).float32()

    def add_to(self, rows: Float32, start: int) -> bool:
        """See `weight.add_rows`."""
        bits = self.bfloat16(start, start + len(rows))
        if bits is None or not compiled.takes(bits, rows):
            return add_values(rows, self.rows(start, start + len(rows)))
        return bool(compiled.bfloat16().add(bits, rows.reshape(-1)) < compiled.INFINITE)

    def bfloat16(self, start: int, stop: int) -> npt.NDArray[np.uint16] | None:
        """The bits of rows, flat; None where they aren't bfloat16 and in order."""
        if self.data.dtype != "BF16" or self.transposed:
            return None
        bits: npt.NDArray[np.uint16] = self.data.array()[start:stop].reshape(-1)
        return bits

    def tensors(self) -> Mapping[str, RawTensor]:
        return {".weight": self.data}


@dataclass(frozen=True)
class Dense:
    """fp32, fp16 or bf16."""

    name: str

    @property
    def dtype(self) -> str:
        return DTYPES[self.name]

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        found = {}
        for name, info in tensors.items():
            module, _, last = name.rpartition(".")
            if not module or last != "weight" or len(info.shape) != 2:
                continue
            if info.dtype != self.dtype or is_embedding(module):
                continue
            if f"{module}.weight.absmax" in tensors:  # bitsandbytes 4-bit, packed in a float dtype
                continue
            transposed = is_conv1d(module, tensors, config)
            out, inside = reversed(info.shape) if transposed else info.shape
            found[module] = StoredLinear(module, out, inside, self.name, {"weight": name}, {}, transposed)
        return found

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> DenseWeight:
        return DenseWeight(tensors.read(linear.tensors["weight"]), linear.transposed)

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        return {"transposed": linear.transposed}

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if unknown := sorted(set(given) - {"transposed"}):
            raise PlanError(f"{self.name} takes no option {unknown[0]!r}")
        return {"transposed": bool(given.get("transposed", False))}

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        return {".weight": (self.dtype, shape[::-1] if options.get("transposed") else shape)}

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> DenseWeight:
        transposed = bool(options.get("transposed"))
        return DenseWeight(to_dtype(weight.T if transposed else weight, self.dtype), transposed)

    def rounder(self, shape: tuple[int, int], options: Mapping[str, Any]) -> DenseRounder:
        return DenseRounder(self.dtype, shape, bool(options.get("transposed")))

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return None


class DenseRounder:
    """Rounds a weight piece by piece; see `formats.Rounder`."""

    multiple = 1

    def __init__(self, dtype: str, shape: tuple[int, int], transposed: bool) -> None:
        self._dtype, self._transposed, self._done = dtype, transposed, 0
        self._result = np.empty(shape[::-1] if transposed else shape, _NUMPY[dtype])

    def add_sum(self, base: Weight, start: int, rows: Float32) -> bool | None:
        """See `weight.round_sum`."""
        if self._dtype != "BF16" or self._transposed or not isinstance(base, DenseWeight):
            return None
        bits, result = base.bfloat16(start, start + len(rows)), self._result[self._done :][: len(rows)]
        if bits is None or not compiled.takes(bits, rows, result):
            return None
        merge = compiled.bfloat16().merge
        self._done += len(rows)
        return bool(merge(bits, rows.reshape(-1), result.reshape(-1)) < compiled.INFINITE)

    def add(self, rows: Float32) -> None:
        stop = self._done + len(rows)
        part = self._result[:, self._done : stop] if self._transposed else self._result[self._done : stop]
        _round_into(part, rows.T if self._transposed else rows, self._dtype)
        self._done = stop

    def weight(self) -> DenseWeight:
        return DenseWeight(RawTensor.of(self._result, self._dtype), self._transposed)


_NUMPY: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def to_dtype(values: Float32, dtype: str) -> RawTensor:
    """Round float32 values to F32, F16 or BF16, to nearest with ties to even; fp16 overflow becomes inf."""
    result = np.empty(values.shape, _NUMPY[dtype])
    _round_into(result, values, dtype)
    return RawTensor.of(result, dtype)


def _round_into(result: npt.NDArray[Any], values: Float32, dtype: str) -> None:
    if dtype == "BF16" and compiled.takes(result, values):
        compiled.bfloat16().nearest(values.reshape(-1), result.reshape(-1))
        return
    rows = values.shape[0] if values.ndim else 1
    step = max(1, CHUNK_VALUES * rows // max(1, values.size))
    pieces = [slice(start, start + step) for start in range(0, rows, step)] if values.ndim else [...]
    with np.errstate(over="ignore"):
        for piece in pieces:
            result[piece] = float32_to_bf16(values[piece]) if dtype == "BF16" else values[piece]
