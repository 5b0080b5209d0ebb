"""Finds the linear layers of a float graph: which MatMul holds which rows of which module's weight.

Of a graph drawn from a skeleton that's known beforehand. Another's are found by content, not by name: an
exporter may pack q, k and v into one MatMul, or take a packed gate_up weight apart, and its names change
between versions. Every row of a MatMul's weight is looked up among the rows of the checkpoint's own weights,
so a site is exactly what it is taken for or it isn't a site at all. Names only decide between equal rows, of
weights that are tied or still zeros.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vera_edge.arrays import Float32
from vera_edge.errors import TargetError
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.parts import Part, put_together

_WORD = re.compile(r"[./]")
# The orders in which layers are packed into one product.
_PACKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)
_LAYER = re.compile(r"(?:^|[./])(?:layers?|h|blocks?)\.(\d+)[./]")


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
    rows = _Rows({}, {})
    taken: dict[str, npt.NDArray[np.bool_]] = {}
    current: str | None = None
    for node in _matmuls(model):
        layer = _layer(node.name or "")
        if layer != current:
            current = layer
            rows = _Rows({module: read(module) for module in by_layer.get(layer, ())}, taken)
        weight = _weight(node)
        parts = rows.parts(weight, node.name or "")
        if parts is not None:
            name = (node.name or "").removesuffix("/MatMul")
            found.append(Site(name, node, parts, weight.shape[1]))
    return tuple(found)


def of_skeleton(model: ir.Model, shapes: Mapping[str, tuple[int, int]]) -> tuple[Site, ...]:
    """The linear layers of a graph whose weights are computed when they're read, and name their rows."""
    found: list[Site] = []
    for node in _matmuls(model):
        value = node.inputs[1]
        weight = value.const_value if value is not None else None
        if isinstance(weight, ComputedWeight) and all(part.module in shapes for part in weight.parts):
            name = (node.name or "").removesuffix("/MatMul")
            found.append(Site(name, node, put_together(weight.parts), weight.matrix_shape[1]))
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


class _Rows:
    """The rows of one layer's modules, by content. taken: those that sites have, kept here."""

    def __init__(self, weights: Mapping[str, Float32], taken: dict[str, npt.NDArray[np.bool_]]) -> None:
        self._taken = taken
        self._numbers: dict[bytes, int] = {}  # of each row's content
        self._modules = {
            module: np.array(
                [self._numbers.setdefault(_key(row), len(self._numbers)) for row in weight], np.int64
            )
            for module, weight in weights.items()
        }
        self._within: dict[int, set[str]] = {}
        for module, rows in self._modules.items():
            for row in np.unique(rows):
                self._within.setdefault(int(row), set()).add(module)
            taken.setdefault(module, np.zeros(len(rows), bool))

    def parts(self, weight: Float32, name: str) -> tuple[Part, ...] | None:
        """What a MatMul's weight (out, in) is made of; None when a row of it is no module's."""
        rows = np.array([self._numbers.get(_key(row), -1) for row in np.ascontiguousarray(weight)], np.int64)
        if not len(rows) or rows.min() < 0:
            return None
        words, parts, at = set(_WORD.split(name)), list[Part](), 0
        while at < len(rows):
            part = max(self._candidates(rows[at:]), key=lambda part: self._rank(part, words))
            self._taken[part.module][part.start : part.stop] = True
            last = parts[-1] if parts else None
            if last is not None and (last.module, last.stop) == (part.module, part.start):
                parts[-1] = Part(last.module, last.start, part.stop)
            else:
                parts.append(part)
            at += part.size
        return tuple(parts)

    def _candidates(self, rows: npt.NDArray[np.int64]) -> Iterator[Part]:
        """For each module with such a row: as many rows from there on as are equal, taken ones too."""
        for module in self._modules:
            if module not in self._within[int(rows[0])]:
                continue
            own = self._modules[module]
            places = np.flatnonzero(own == rows[0])
            free = places[~self._taken[module][places]]
            for start in {int(places[0]), int(free[0] if len(free) else places[0])}:
                most = min(len(own) - start, len(rows))
                other = np.flatnonzero(own[start : start + most] != rows[:most])
                yield Part(module, start, start + (int(other[0]) if len(other) else most))

    def _rank(self, part: Part, words: set[str]) -> tuple[bool, int, int, int, int]:
        """How likely a candidate is it: free rows first, then many, then those of a module of that name."""
        free = not self._taken[part.module][part.start : part.stop].any()
        inner = _WORD.split(_LAYER.split(f"{part.module}.")[-1])
        order = next((order.index(word) for order in _PACKED for word in inner if word in order), 0)
        return free, part.size, len(words & set(inner)), -order, -part.start
