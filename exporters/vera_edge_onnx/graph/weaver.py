"""Edits an ONNX graph in place: new initializers, new nodes, a node's output taken over by another value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from vera_edge.errors import TargetError
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.spool import Spool

MICROSOFT = "com.microsoft"
# Bytes of an initializer that lies in the graph itself: shape inference wants the values of the likes of
# Slice's ends, and reads no data file for them.
INLINE = 64
Dimension = int | str | None


@dataclass(frozen=True)
class Range:
    """Bytes that an initializer shares: those of the initializer `source`, from `offset` on."""

    source: str
    offset: int = 0


@dataclass
class Weaver:
    """A graph under change. `shared` says which initializers lie within another one's bytes.

    spool: where initializers go at once; without one they stay in memory.
    """

    model: ir.Model
    spool: Spool | None = None
    shared: dict[str, Range] = field(default_factory=dict)
    _rows: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)

    def initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """The initializer `name`, made of `array` when it isn't there yet."""
        known = self.model.graph.initializers.get(name)
        if known is not None:
            return known
        if self.spool is not None and array.nbytes > INLINE and array.dtype != np.int64:
            return self._register(name, self.spool.keep(name, array))
        return self._register(name, ir.tensor(np.asarray(array, order="C"), name=name))  # a scalar stays one

    def as_factor(self, name: str, weight: ir.TensorProtocol, transposed: bool) -> ir.Value:
        """A matrix as an initializer, `transposed` or as it is; one that is computed stays so."""
        if name not in self.model.graph.initializers and isinstance(weight, ComputedWeight):
            turned = weight.transposed != transposed
            return self._register(name, ComputedWeight(weight.source, weight.parts, turned, name))
        matrix = weight.numpy()
        return self.initializer(name, matrix.T if transposed else matrix)

    def alias(self, name: str, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The initializer `name`, with the bytes of another one in another shape."""
        tensor = value.const_value
        assert tensor is not None
        if not isinstance(tensor, ir.ExternalTensor):
            return self._register(name, ir.tensor(tensor.numpy().reshape(shape), name=name))
        place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
        same = ir.ExternalTensor(*place, shape=ir.Shape(shape), name=name, base_dir=tensor.base_dir)
        return self._register(name, same)

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.model.graph.register_initializer(value)
        return value

    def overridable(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """An initializer that is a graph input too: a default that a run, or an adapter, may replace."""
        if any(value.name == name for value in self.model.graph.inputs):
            return self.model.graph.initializers[name]
        if name in self.model.graph.initializers:
            raise TargetError(f"the graph has a weight called {name} already; rename the adapter's module")
        value = self.initializer(name, array)
        self.model.graph.inputs.append(value)
        return value

    def rows(
        self, name: str, matrix: npt.NDArray[Any], rows: tuple[int, int], overridable: bool = False
    ) -> ir.Value:
        """Rows `start` to `stop` of a matrix as an initializer; `finish` stores overlapping ones once."""
        start, stop = rows
        self._rows.setdefault(name, {})[rows] = matrix[:1].nbytes
        make = self.overridable if overridable else self.initializer
        return make(f"{name}[{start}:{stop}]", matrix[start:stop])

    def _share_rows(self) -> None:
        """Let every range of rows that lies within another one of the same matrix share its bytes."""
        for name, ranges in self._rows.items():
            outer = (0, 0)
            for start, stop in sorted(ranges, key=lambda rows: (rows[0], -rows[1])):
                if stop <= outer[1]:
                    offset = (start - outer[0]) * ranges[start, stop]
                    self.shared[f"{name}[{start}:{stop}]"] = Range(f"{name}[{outer[0]}:{outer[1]}]", offset)
                else:
                    outer = (start, stop)

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Sequence[Dimension],
        *,
        before: ir.Node,
        domain: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output of the given shape, inserted ahead of `before`; returns its output."""
        made = {f"{name}/output_0": (shape, dtype)}
        return self.outputs(op, inputs, name, made, before=before, domain=domain, **attributes)[0]

    def outputs(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        outputs: Mapping[str, tuple[Sequence[Dimension], ir.DataType]],
        *,
        before: ir.Node,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node, inserted ahead of `before`; returns its outputs: name -> shape and type, in their order."""
        self.model.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(op, inputs, attributes, domain=domain, name=name, num_outputs=len(outputs))
        for value, (called, (shape, dtype)) in zip(node.outputs, outputs.items(), strict=True):
            value.name, value.shape, value.type = called, ir.Shape(shape), ir.TensorType(dtype)
        self.model.graph.insert_before(before, node)
        return list(node.outputs)

    def split(
        self, value: ir.Value, sizes: Sequence[int], node: str, names: Sequence[str], *, before: ir.Node
    ) -> list[ir.Value]:
        """Pieces of the given sizes along the last axis, called `names`, cut by a node called `node`."""
        ends = self.initializer(f"{node}.sizes", np.array(sizes, np.int64))
        assert value.dtype is not None
        pieces = {
            name: ((*leading(value), size), value.dtype) for name, size in zip(names, sizes, strict=True)
        }
        return self.outputs("Split", [value, ends], node, pieces, before=before, axis=-1)

    def take_over(self, old: ir.Node, new: ir.Value) -> None:
        """Let `new` stand, under the old name, wherever the single output of `old` stood; remove `old`."""
        output = old.outputs[0]
        name, shape = output.name, output.shape
        output.name = f"{name}/replaced"
        output.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, new.shape = name, shape
        self.model.graph.remove(old, safe=True)

    def narrow_weight(self, node: ir.Node) -> None:
        """Store the weight of a MatMul as float16."""
        weight = node.inputs[1]
        assert weight is not None
        self.narrow(weight, node)

    def narrow(self, value: ir.Value, before: ir.Node) -> None:
        """Store a float32 initializer as float16; it is widened when a runtime loads the graph."""
        tensor = value.const_value
        assert value.name is not None and tensor is not None
        if isinstance(tensor, ComputedWeight):
            narrowed = np.empty(tensor.matrix_shape, np.float16)
            for start, rows in tensor.pieces():
                narrowed[start : start + len(rows)] = rows
            array = narrowed.T if tensor.transposed else narrowed
        else:
            array = tensor.numpy()
        value.replace_all_uses_with(self.widened(value.name, array, before))

    def widened(self, name: str, array: npt.NDArray[Any], before: ir.Node) -> ir.Value:
        """An array that is stored as float16 and given as float32."""
        stored = self.initializer(f"{name}.fp16", array.astype(np.float16, copy=False))
        return self.node("Cast", [stored], f"{name}/Cast", array.shape, before=before, to=ir.DataType.FLOAT)

    def finish(self) -> dict[str, Range]:
        """Remove what nothing uses any more, sort, and say which initializers share whose bytes."""
        self._share_rows()
        common.RemoveUnusedNodesPass()(self.model)
        self.model.graph.sort()
        initializers = self.model.graph.initializers
        return {name: place for name, place in self.shared.items() if name in initializers}


def leading(value: ir.Value) -> tuple[Dimension, ...]:
    """All dimensions of `value` but the last."""
    shape = value.shape
    if shape is None:
        return ("batch_size", "sequence_length")
    return tuple(size if isinstance(size, int) else size.value for size in shape[:-1])
