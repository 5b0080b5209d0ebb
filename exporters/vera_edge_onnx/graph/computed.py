"""Float weights of a graph that are computed whenever they're read, and never all in memory.

On disk such a graph has nothing in their place, and a file beside it says whose rows they are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from vera_edge.arrays import Float32
from vera_edge.merging.computed import ComputedTensors, Rows
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge_onnx.graph.parts import Part


class ComputedWeight(ir.LazyTensor):
    """Rows of a model's matrices below each other as an initializer, transposed where a MatMul reads them.

    parts: of `source`'s tensors, by their names less ".weight". shape: of the initializer.
    """

    def __init__(
        self, source: ComputedTensors, parts: Sequence[Part], transposed: bool, name: str | None
    ) -> None:
        self.source, self.parts, self.transposed = source, tuple(parts), transposed
        width = source.width(f"{self.parts[0].module}.weight")
        self.matrix_shape = (sum(part.size for part in self.parts), width)
        shape = self.matrix_shape[::-1] if transposed else self.matrix_shape
        super().__init__(self._computed, ir.DataType.FLOAT, ir.Shape(shape), name=name)

    def matrix(self) -> Float32:
        """All rows, (rows, columns)."""
        whole = np.empty(self.matrix_shape, np.float32)
        for start, rows in self.pieces():
            whole[start : start + len(rows)] = rows
        return whole

    def pieces(self) -> Iterator[Rows]:
        """The rows in ranges that cover them all, in any order: where each begins, and (rows, columns).

        A piece is written over by the next.
        """
        places: dict[str, list[tuple[int, Part]]] = {}
        at = 0
        for part in self.parts:
            places.setdefault(part.module, []).append((at, part))
            at += part.size
        for module, wanted in places.items():
            for start, rows in self.source.rows(f"{module}.weight"):
                for at, part in wanted:
                    first, stop = max(start, part.start), min(start + len(rows), part.stop)
                    if first < stop:
                        yield at + first - part.start, rows[first - start : stop - start]

    def _computed(self) -> ir.TensorProtocol:
        whole = self.matrix()
        return ir.Tensor(whole.T if self.transposed else whole, name=self.name)

    def numpy(self) -> Any:
        """The initializer's value."""
        whole = self.matrix()
        return whole.T if self.transposed else whole

    def tofile(self, file: Any) -> None:
        """Write the bytes without the whole in memory, where `file` can be written anywhere."""
        if not isinstance(file, io.BufferedIOBase | io.RawIOBase) or not file.seekable():
            file.write(self.tobytes())
            return
        start, (count, width) = file.tell(), self.matrix_shape
        for first, rows in self.pieces():
            if not self.transposed:
                file.seek(start + 4 * first * width)
                file.write(np.ascontiguousarray(rows).data)
                continue
            for column, values in enumerate(np.ascontiguousarray(rows.T)):
                file.seek(start + 4 * (column * count + first))
                file.write(values.data)
        file.seek(start + 4 * count * width)


def joined(weights: Sequence[ir.TensorProtocol], name: str) -> ComputedWeight | None:
    """Weights (in, out) of MatMuls side by side as one; None when one isn't computed."""
    computed = [weight for weight in weights if isinstance(weight, ComputedWeight) and weight.transposed]
    if len(computed) < len(weights):
        return None
    parts = [part for weight in computed for part in weight.parts]
    return ComputedWeight(computed[0].source, parts, True, name)


def nothing(name: str | None) -> ir.TensorProtocol:
    """What stands for a computed weight in a graph on disk."""
    return ir.Tensor(np.empty(0, np.float32), name=name)


def put_in(model: ir.Model, weights: Mapping[str, ComputedWeight]) -> None:
    """Give initializers, by name, their weights."""
    for name, weight in weights.items():
        value = model.graph.initializers[name]
        value.const_value, value.shape = weight, ir.Shape(weight.shape.numpy())


def rows_file(graph: str) -> str:
    """What the file beside a graph is called, which is written last."""
    return f"{graph}.rows"


def save(model: ir.Model, path: Path) -> None:
    """Write a graph, what's computed left out; weights that lie in files of the same folder stay there."""
    with _left_out(model) as rows:
        ir.save(model, path)
    write_atomic(path.with_name(rows_file(path.name)), rows)


def load(path: Path, source: ComputedTensors) -> ir.Model:
    """A graph that `save` wrote, its weights those of `source`."""
    model = ir.load(path)
    _fill(model, path.with_name(rows_file(path.name)).read_bytes(), source)
    return model


@dataclass(frozen=True)
class Outline:
    """A graph whose computed weights are left out, in memory: as ONNX, and whose rows they are."""

    graph: bytes
    rows: bytes

    @classmethod
    def of(cls, model: ir.Model) -> Outline:
        with _left_out(model) as rows:
            return cls(ir.to_proto(model).SerializeToString(), rows)

    def filled(self, source: ComputedTensors) -> ir.Model:
        """The graph anew, its weights those of `source`, whose matrices have the same names and shapes."""
        model = ir.from_proto(onnx.ModelProto.FromString(self.graph))
        _fill(model, self.rows, source)
        return model


@contextmanager
def _left_out(model: ir.Model) -> Iterator[bytes]:
    """Take what's computed out of a graph while it lasts; gives whose rows it is, as JSON."""
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ComputedWeight)
    }
    for name in weights:
        model.graph.initializers[name].const_value = nothing(name)
    try:
        yield canonical_json(
            {
                name: [weight.transposed, [astuple(part) for part in weight.parts]]
                for name, weight in weights.items()
            }
        )
    finally:
        put_in(model, weights)


def _fill(model: ir.Model, rows: bytes, source: ComputedTensors) -> None:
    weights = {
        name: ComputedWeight(source, [Part(*part) for part in parts], transposed, name)
        for name, (transposed, parts) in json.loads(rows).items()
    }
    put_in(model, weights)
