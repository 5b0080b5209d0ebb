"""A float base's tensors as bitsandbytes and a dtype make them, computed when they are read.

Names, dtypes, shapes and their order are those of the folder that would be written, so that nothing which
reads a checkpoint can tell the difference. One layer at a time is in memory, for each thread that reads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge import formats
from vera_edge.arrays import Bytes, Float32
from vera_edge.base.trained_as.choice import LoadedTensors
from vera_edge.base.trained_as.config import TORCH_NAMES
from vera_edge.base.trained_as.spec import FOUR_BIT, TrainedAs
from vera_edge.errors import CheckpointError
from vera_edge.formats import StoredLinear, Weight, row_chunks
from vera_edge.formats.bnb4 import STORAGES, Bnb4
from vera_edge.formats.bnb8 import Int8
from vera_edge.formats.dense import DenseWeight, to_dtype
from vera_edge.storage.shards import Shards, nbytes
from vera_edge.storage.tensors import DTYPES, FLOATS, RawTensor, TensorFolder, TensorInfo

_STORED = {name: dtype for dtype, name in STORAGES.items()}


@dataclass(frozen=True)
class _Part:
    """A tensor of a quantized layer: `suffix` after the module's name."""

    module: str
    suffix: str


class LoadedFolder(TensorFolder):
    """The tensors of `source` as `spec` loads them, `choice` saying which of them are quantized.

    layout: name -> (dtype, shape) of all, in the order in which they're spread over files.
    """

    def __init__(self, source: TensorFolder, spec: TrainedAs, choice: LoadedTensors) -> None:
        self._source, self._spec, self._choice = source, spec, choice
        self._parts: dict[str, _Part] = {}
        self._held = threading.local()
        self.layout = layout = dict[str, tuple[str, tuple[int, ...]]]()
        for name, info in source.items():
            module = name.removesuffix(".weight")
            if module not in choice.quantized or module == name:
                layout[name] = (choice.dtypes.get(name, info.dtype), info.shape)
                continue
            for suffix, entry in self._format.layout(self._shape(module), self.options(module)).items():
                layout[module + suffix] = entry
                self._parts[module + suffix] = _Part(module, suffix)
        order = Shards(Path(), layout).in_order
        super().__init__({name: self._info(name, *layout[name]) for name in order}, source.files)

    @property
    def _format(self) -> Bnb4 | Int8:
        return Int8() if self._spec.format == "int8" else Bnb4(self._spec.format)

    def _shape(self, module: str) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self._source[f"{module}.weight"].shape
        return (columns, rows) if self._choice.quantized[module] else (rows, columns)

    def options(self, module: str) -> Mapping[str, Any]:
        """The options of the format under which a quantized layer is stored."""
        if self._spec.format not in FOUR_BIT:
            return self._format.options({})
        given = {"double_quant": self._spec.double_quant, "storage": _STORED[self._spec.storage]}
        given["dtype"] = TORCH_NAMES[self._choice.dtypes[f"{module}.weight"]]
        return self._format.options(given)

    def _info(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        part = self._parts.get(name)
        source = self._source[name if part is None else f"{part.module}.weight"]
        # It begins where what it is made of does, which is what may be fetched ahead.
        return TensorInfo(name, dtype, shape, source.file, source.start, source.start + nbytes(dtype, shape))

    def linears(self) -> Mapping[str, StoredLinear]:
        """The quantized layers, in the order of the folder."""
        modules = dict.fromkeys(part.module for name in self if (part := self._parts.get(name)))
        return {
            module: self._format.stored(module, self._shape(module), self.options(module))
            for module in modules
        }

    def floats(self) -> TensorFolder:
        """The tensors that aren't quantized, as a folder that only tells of them."""
        return TensorFolder(
            {name: info for name, info in self.items() if name not in self._parts}, self.files
        )

    def making(self, names: Iterable[str]) -> int:
        """Bytes held while these tensors are read, beside their own: floats, and the layer made of them."""
        total = 0
        for module in {part.module for name in names if (part := self._parts.get(name))}:
            made = self._format.layout(self._shape(module), self.options(module))
            total += self._source[f"{module}.weight"].nbytes + sum(nbytes(*entry) for entry in made.values())
        return total

    def read(self, name: str) -> RawTensor:
        """One tensor. Raises CheckpointError when what is quantized or cast isn't finite."""
        part = self._parts.get(name)
        if part is not None:
            return self._quantized(part.module).tensors()[part.suffix]
        return self._cast(name, self._source.read(name))

    def pieces(self, name: str) -> Iterator[Bytes]:
        """One tensor's bytes, piece by piece."""
        if name in self._parts:
            yield self.read(name).data
            return
        dtype = self._source[name].dtype
        for piece in self._source.pieces(name):
            values = RawTensor(dtype, (piece.size // DTYPES[dtype][0],), piece)
            yield self._cast(name, values).data

    def _cast(self, name: str, tensor: RawTensor) -> RawTensor:
        dtype = self[name].dtype
        if tensor.dtype == dtype or tensor.dtype not in FLOATS:
            return tensor
        values = tensor.float32()
        cast = to_dtype(values, dtype)
        self._check_range(name, values, cast.float32(), dtype)
        return cast

    def _quantized(self, module: str) -> Weight:
        if getattr(self._held, "module", None) != module:
            self._held.module = None  # both at once would be one too many
            self._held.weight = self._quantize(module)
            self._held.module = module
        weight: Weight = self._held.weight
        return weight

    def _quantize(self, module: str) -> Weight:
        name, shape = f"{module}.weight", self._shape(module)
        stored = DenseWeight(self._source.read(name), self._choice.quantized[module])
        rounder = formats.rounder(self._format, shape, self.options(module))
        for start, stop in row_chunks(shape, rounder.multiple):
            rows = stored.rows(start, stop)
            if not np.isfinite(rows).all():
                raise CheckpointError(
                    f"{name} in {self._source[name].file} holds NaN or infinite values, which can't be "
                    "quantized; copy or download the model again"
                )
            rounder.add(self._loaded(name, rows))
        return rounder.weight()

    def _loaded(self, name: str, rows: Float32) -> Float32:
        """Values in the dtype that they are quantized from: LLM.int8 takes float16, whatever was loaded."""
        now = self._source[name].dtype
        for dtype in (self._choice.dtypes[name], *(["F16"] if self._spec.format == "int8" else [])):
            if dtype not in ("F32", now):  # every value is one of float32
                loaded = to_dtype(rows, dtype).float32()
                self._check_range(name, rows, loaded, dtype)
                rows = loaded
            now = dtype
        return rows

    def _check_range(self, name: str, before: Float32, after: Float32, dtype: str) -> None:
        if not np.isfinite(after[np.isfinite(before)]).all():
            raise CheckpointError(
                f"{name} in {self._source[name].file} has values beyond the largest of {TORCH_NAMES[dtype]}, "
                "which it would be cast to; it can't have been loaded so"
            )
