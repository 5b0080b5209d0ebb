"""The float32 model that a plan gives, as tensors that are computed when they're read: nothing is written.

Who needs a model's weights one after the other (an exporter) pays for one of them. The values are those of
`executor.write` with the plan's own formats, bit for bit: the same units compute them, in the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vera_edge import formats
from vera_edge.arrays import Bytes, Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.formats import StoredLinear
from vera_edge.merging.config import merged_config
from vera_edge.merging.cutting import cut
from vera_edge.merging.delta import merged_rows
from vera_edge.merging.executor import check_plan
from vera_edge.merging.units import Cast, Copy, Linear, MergeUnit, Place, copied
from vera_edge.plans.plan import Plan
from vera_edge.requantize.gram import one_blas_thread
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import settings_json
from vera_edge.storage.shards import nbytes
from vera_edge.storage.tensors import RawTensor, TensorFolder, TensorInfo
from vera_edge.trained.trained_model import TrainedModel

Rows = tuple[int, Float32]


class ComputedTensors(TensorFolder):
    """The tensors that a merge in float32 would write, computed each time that they are read.

    plan: a merge of `model` whose linears all become fp32. Raises PlanError for any other.
    """

    def __init__(self, plan: Plan, model: TrainedModel) -> None:
        check_plan(plan, model)
        if any(step.result != "fp32" for step in plan.steps):
            raise ValueError("only a merge in float32 is computed as it's read")
        self._checkpoint = model.checkpoint
        units, self.untied = cut(plan, model, {})
        self._units: dict[str, MergeUnit] = {name: unit for unit in units for name in unit.layout}
        infos = {
            name: TensorInfo(name, dtype, shape, model.checkpoint.path, 0, nbytes(dtype, shape))
            for unit in units
            for name, (dtype, shape) in unit.layout.items()
        }
        super().__init__(infos, model.checkpoint.stored.files)
        self.config = merged_config(plan, model.checkpoint, self.untied)
        self.linears: Mapping[str, StoredLinear] = formats.find_linears(self, self.config)

    def read(self, name: str) -> RawTensor:
        """The bytes of one tensor. Raises as the units of a merge do."""
        info, at = self[name], 0
        data = np.empty(info.nbytes, np.uint8)
        unit = self._units[name]
        if isinstance(unit, Linear):
            whole = data.view(np.float32).reshape(info.shape)
            whole = whole.T if unit.step.options.get("transposed") else whole
            for start, rows in self.rows(name):
                whole[start : start + len(rows)] = rows
            return RawTensor(info.dtype, info.shape, data)
        for piece in self.pieces(name):
            data[at : at + piece.size] = piece
            at += piece.size
        return RawTensor(info.dtype, info.shape, data)

    def pieces(self, name: str) -> Iterator[Bytes]:
        """The bytes of one tensor, piece by piece; those of a linear that is computed all at once."""
        unit, tensors = self._units[name], self._checkpoint.tensors
        if isinstance(unit, Copy):
            return copied(tensors, name)
        if isinstance(unit, Cast):
            return unit.pieces(tensors)
        if isinstance(unit, Place):
            return iter([unit.cast().data])
        return iter([self.read(name).data])

    def rows(self, name: str) -> Iterator[Rows]:
        """A float32 matrix's rows, piece by piece: the first row's number, and (rows, columns).

        Of a linear's weight as nn.Linear has it, however it's stored. A piece is written over by the next.
        Raises as the units of a merge do.
        """
        unit = self._units[name]
        if isinstance(unit, Linear):
            return _on_one_thread(self._merged(unit))
        return self._turned(name) if self._is_transposed(name) else self._table(name)

    def width(self, name: str) -> int:
        """How many columns `rows` have."""
        return self[name].shape[0 if self._is_transposed(name) else 1]

    def _is_transposed(self, name: str) -> bool:
        linear = self.linears.get(name.removesuffix(".weight"))
        return linear is not None and linear.transposed

    def _merged(self, unit: Linear) -> Iterator[Rows]:
        base = formats.load(self._checkpoint.tensors, self._checkpoint.linear(unit.step.module))
        yield from merged_rows(unit.step.module, base, unit.delta())

    def _turned(self, name: str) -> Iterator[Rows]:
        """Rows of a weight that is stored as (in, out) and isn't changed."""
        yield 0, self.float32(name).T

    def _table(self, name: str) -> Iterator[Rows]:
        """Rows out of bytes whose pieces end anywhere."""
        width, start, kept = 4 * self[name].shape[1], 0, np.empty(0, np.uint8)
        for piece in self.pieces(name):
            data = np.concatenate([kept, piece]) if kept.size else piece
            count = data.size // width
            kept = data[count * width :].copy()
            if count:
                yield start, data[: count * width].view(np.float32).reshape(count, -1)
            start += count


def _on_one_thread(pieces: Iterator[Rows]) -> Iterator[Rows]:
    """`pieces`, each computed by BLAS on one thread, as a merge computes it."""
    while True:
        with one_blas_thread():
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def open_computed(plan: Plan, model: TrainedModel, folder: Path) -> Checkpoint:
    """The checkpoint that a merge in float32 would write to `folder`, which gets all files but the weights.

    Its tensors are `ComputedTensors`. Raises as a merge does, when it's planned or when a tensor is read.
    """
    tensors = ComputedTensors(plan, model)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", settings_json(tensors.config))
    model.checkpoint.files.copy(folder)
    return Checkpoint(folder, tensors.config, tensors, tensors.linears)
