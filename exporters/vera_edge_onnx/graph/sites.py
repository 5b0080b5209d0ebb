"""Finds the linear layers of a float graph: which MatMul holds which rows of which module's weight.

Found by content, not by name: an exporter may pack q, k and v into one MatMul, or take a packed gate_up
weight apart, and its names change between versions. Every row of a MatMul's weight is looked up among the
rows of the checkpoint's own weights, so a site is exactly what it is taken for or it isn't a site at all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vera_edge.errors import TargetError
from vera_edge.storage.tensors import Float32

_LAYER = re.compile(r"(?:^|[./])(?:layers?|h|blocks?)\.(\d+)[./]")


@dataclass(frozen=True)
class Part:
    """Consecutive output columns of a MatMul: rows `start` to `stop` of a module's weight (out, in)."""

    module: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Site:
    """One MatMul of the float graph, whose weight (in, out) is made of the given parts, in column order."""

    name: str
    node: ir.Node
    parts: tuple[Part, ...]
    in_features: int

    @property
    def out_features(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def weight_name(self) -> str:
        """What the initializers of the stored weight begin with."""
        return f"{self.name.lstrip('/').replace('/', '.')}.weight"

    @property
    def input(self) -> ir.Value:
        """What the layer reads, (..., in_features)."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> Float32:
        """The weight in nn.Linear's orientation, (out_features, in_features)."""
        return _weight(self.node)


def find(
    model: ir.Model, shapes: Mapping[str, tuple[int, int]], read: Callable[[str], Float32]
) -> tuple[Site, ...]:
    """The linear layers of `model` among `shapes` (module -> (out, in)); `read` gives a module's weight.

    A MatMul whose weight isn't found whole is left alone: a tied lm_head, a constant of the graph.
    """
    found: list[Site] = []
    by_layer: dict[str, list[str]] = {}
    for module in shapes:
        by_layer.setdefault(_layer(module), []).append(module)
    rows: dict[bytes, list[tuple[str, int]]] = {}
    current: str | None = None
    for node in _matmuls(model):
        layer = _layer(node.name or "")
        if layer != current:
            current, rows = layer, _index(by_layer.get(layer, ()), read)
        weight = _weight(node)
        parts = _parts(weight, rows)
        if parts is not None:
            name = (node.name or "").removesuffix("/MatMul")
            found.append(Site(name, node, parts, weight.shape[1]))
    return tuple(found)


def check_covered(sites: Iterable[Site], shapes: Mapping[str, tuple[int, int]], what: str) -> None:
    """Raise TargetError unless the sites hold every row of every module in `shapes`, once."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for site in sites:
        for part in site.parts:
            rows.setdefault(part.module, []).append((part.start, part.stop))
    for module, (out, _) in shapes.items():
        end = 0
        for start, stop in sorted(rows.get(module, [])):
            end = stop if start == end else -1
        if end != out:
            raise TargetError(
                f"{module} is {what}, but isn't a plain matrix product of the exported graph; "
                "merge the adapter instead (vera-edge merge) or leave that module out"
            )


def _matmuls(model: ir.Model) -> Iterator[ir.Node]:
    for node in model.graph:
        if node.op_type == "MatMul" and node.domain == "" and node.inputs[1] is not None:
            tensor = node.inputs[1].const_value
            if tensor is not None and len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT:
                yield node


def _weight(node: ir.Node) -> Float32:
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    weight: Float32 = value.const_value.numpy().T
    return weight


def _layer(name: str) -> str:
    match = _LAYER.search(name)
    return match[1] if match else ""


def _key(row: Float32) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _index(modules: Iterable[str], read: Callable[[str], Float32]) -> dict[bytes, list[tuple[str, int]]]:
    rows: dict[bytes, list[tuple[str, int]]] = {}
    for module in modules:
        for number, row in enumerate(read(module)):
            rows.setdefault(_key(row), []).append((module, number))
    return rows


def _parts(weight: Float32, rows: Mapping[bytes, list[tuple[str, int]]]) -> tuple[Part, ...] | None:
    parts: list[Part] = []
    for row in np.ascontiguousarray(weight):
        places = rows.get(_key(row))
        if not places:
            return None
        # Equal rows (all zeros, say) are told apart by their neighbours: go on where the last row ended.
        if parts and (parts[-1].module, parts[-1].stop) in places:
            last = parts[-1]
            parts[-1] = Part(last.module, last.start, last.stop + 1)
        else:
            module, number = min(places, key=lambda place: place[1])
            parts.append(Part(module, number, number + 1))
    return tuple(parts)
