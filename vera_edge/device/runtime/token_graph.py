"""A decoder's graph rewritten to read several tokens at once, each with the bits that it has alone.

Attention rounds otherwise for several tokens than for one, since other kernels run. So it is cut into nodes
of one token, one behind the other: each appends its key and value to the cache that the one before it left,
as outputs which are bound to the very same buffer. Products whose kernels round otherwise too are cut alike
(row_products.py), where they are few; all others run once for all tokens, which is what is gained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vera_edge.device.runtime import onnx_message as message
from vera_edge.device.runtime.onnx_file import (
    attributes,
    fields,
    initializer,
    opset,
    spans,
    text,
)
from vera_edge.device.runtime.row_products import BlockProduct, alike
from vera_edge.errors import PlanError

_GRAPH, _NODE, _INITIALIZER, _OUTPUT = 7, 1, 5, 12  # field numbers of ModelProto and GraphProto
_ATTENTION = "GroupQueryAttention"
_QUERY, _PAST, _LENGTHS, _POSITIONS, _BIAS = (0, 1, 2), (3, 4), (5, 6), 9, 10  # its inputs
_PRODUCTS = frozenset({"FusedMatMul", "MatMul", "MatMulNBits"})
_OPSET = 13  # since when Split takes sizes as an input
# The part of a graph's weights that products which are cut may have: each cut one is held once a token.
_MOST_CUT = 0.1


@dataclass(frozen=True)
class GraphNode:
    """A NodeProto: what it reads and gives, and its other fields as bytes."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: dict[str, int]
    rest: bytes

    @classmethod
    def of(cls, data: Any) -> GraphNode:
        """Read one."""
        texts: dict[int, list[str]] = {1: [], 2: [], 3: [""], 4: [""]}
        rest = b""
        for number, value, whole in spans(data):
            if number in texts:
                texts[number].append(text(value))
            if number > 3:
                rest += bytes(whole)
        names = (texts[4][-1], texts[3][-1], tuple(texts[1]), tuple(texts[2]))
        return cls(*names, attributes(data), rest)

    def with_names(self, suffix: str, inputs: dict[int, str], outputs: dict[int, str]) -> bytes:
        """The same with some inputs and outputs, by number, called otherwise."""
        made = b"".join(message.field(1, inputs.get(i, name)) for i, name in enumerate(self.inputs))
        made += b"".join(message.field(2, outputs.get(i, name)) for i, name in enumerate(self.outputs))
        return made + message.field(3, f"{self.name}/{suffix}") + self.rest

    def given(self, number: int) -> bool:
        """Whether it has this input."""
        return number < len(self.inputs) and bool(self.inputs[number])


def further(name: str, token: int) -> str:
    """What the output of a cache is called that holds `token` and those before it."""
    return f"{name}/token{token}"


def rewrite(model: Any, tokens: int, is_alike: Callable[[BlockProduct], bool] = alike) -> tuple[bytes, int]:
    """The model (bytes of a file) for exactly `tokens` tokens at a time, and bytes of weights that it copies.

    Raises PlanError when it can't be, or nothing would be gained; ValueError when it isn't a model.
    """
    if opset(model) < _OPSET:
        raise PlanError("tokens can't be looked ahead for in a graph of an opset before 13")
    made = bytearray()
    copied = 0
    for number, value, whole in spans(model):
        if number == _GRAPH:
            rewriting = _Rewriting(tokens, is_alike, _weights(value))
            made += message.field(_GRAPH, rewriting.graph(value))
            copied = rewriting.copied()
        else:
            made += whole
    return bytes(made), copied


def _weights(graph: Any) -> dict[str, int]:
    """Bytes of each initializer."""
    found = dict(initializer(value) for number, value in fields(graph) if number == _INITIALIZER)
    return {name: one.nbytes for name, one in found.items()}


@dataclass
class _Rewriting:
    """A graph under change."""

    tokens: int
    is_alike: Callable[[BlockProduct], bool]
    weights: dict[str, int]  # bytes of what doesn't depend on the tokens
    cut: list[str] = field(default_factory=list)  # weights of products that were cut
    whole: list[str] = field(default_factory=list)  # and of those that weren't
    _parts: dict[str, list[str]] = field(default_factory=dict)
    _constants: dict[str, bytes] = field(default_factory=dict)
    _reshaped: set[str] = field(default_factory=set)

    def graph(self, graph: Any) -> bytes:
        made, outputs, caches = bytearray(), {}, set()
        for number, value, whole in spans(graph):
            if number != _NODE:
                made += whole
                if number == _OUTPUT:
                    outputs[next(text(part) for key, part in fields(value) if key == 1)] = value
                continue
            node = GraphNode.of(value)
            for one in self._nodes(node, bytes(value)):
                made += message.field(_NODE, one)
            caches |= set(node.outputs[1:3]) if node.op == _ATTENTION else set()
        if not caches or not caches <= set(outputs):
            raise PlanError("this graph has no GroupQueryAttention with a cache to look ahead with")
        self._check()
        made += b"".join(message.field(_INITIALIZER, one) for one in self._constants.values())
        for name in caches:
            rest = b"".join(bytes(whole) for number, _, whole in spans(outputs[name]) if number != 1)
            for token in range(self.tokens - 1):
                made += message.field(_OUTPUT, message.field(1, further(name, token)) + rest)
        return bytes(made)

    def copied(self) -> int:
        """Bytes that products which were cut take more than once."""
        return (self.tokens - 1) * sum(self.weights[name] for name in self.cut)

    def _nodes(self, node: GraphNode, data: bytes) -> Iterator[bytes]:
        if node.op == "Reshape":
            self._reshaped |= set(node.outputs)
        sizes = [self.weights.get(name) for name in node.inputs if name]
        if None not in sizes:  # as projections that all layers share are cut to their widths
            whole = max((size for size in sizes if size is not None), default=0)
            self.weights |= dict.fromkeys(node.outputs, whole // len(node.outputs))
        if node.op == _ATTENTION:
            yield from self._attention(node)
        elif self._is_cut(node):
            yield from self._product(node)
        else:
            yield data

    def _is_cut(self, node: GraphNode) -> bool:
        """Whether a product rounds a row otherwise beside others; notes its weight."""
        if node.op not in _PRODUCTS or node.inputs[1] not in self.weights:
            return False
        # Several rows for each token: it never runs with one row alone, and any two are alike.
        known = node.inputs[0] in self._reshaped or (
            node.op == "MatMulNBits" and not any(map(node.given, (4, 5))) and self.is_alike(_kind(node))
        )
        (self.whole if known else self.cut).append(node.inputs[1])
        return not known

    def _check(self) -> None:
        cut, whole = (sum(self.weights[name] for name in set(names)) for names in (self.cut, self.whole))
        if cut > _MOST_CUT * (cut + whole):
            raise PlanError(
                "looking ahead gains nothing here: this processor's kernels for such weights round several "
                "tokens at once otherwise than one, so that the text would be another one; int4 and int8 in "
                "blocks of 32 can be looked ahead with"
            )

    def _product(self, node: GraphNode) -> Iterator[bytes]:
        x, (y, *_) = node.inputs[0], node.outputs
        yield from self._split(x)
        given = self._parts[y] = [f"{y}/token{token}" for token in range(self.tokens)]
        for token, (part, out) in enumerate(zip(self._parts[x], given, strict=True)):
            yield node.with_names(f"token{token}", {0: part}, {0: out})
        yield message.node("Concat", given, y, {"axis": 1})

    def _attention(self, node: GraphNode) -> Iterator[bytes]:
        if node.given(_BIAS) or len(node.outputs) != 3:
            raise PlanError(f"{node.name} has more than attention has to do with to be looked ahead with")
        cut = [number for number in (*_QUERY, _POSITIONS) if node.given(number)]
        for number in cut:
            yield from self._split(node.inputs[number])
        lengths = {number: node.inputs[number] for number in _LENGTHS}
        for name in lengths.values():
            yield from self._shorter(name)
        y, last = node.outputs[0], self.tokens - 1
        given = self._parts[y] = [f"{y}/token{token}" for token in range(self.tokens)]
        for token in range(self.tokens):
            inputs = {number: self._parts[node.inputs[number]][token] for number in cut}
            inputs |= {number: self._parts[name][token] for number, name in lengths.items()}
            outputs = {0: given[token]}
            if token:
                inputs |= {
                    number: further(name, token - 1)
                    for number, name in zip(_PAST, node.outputs[1:], strict=True)
                }
            if token < last:
                outputs |= {1 + i: further(name, token) for i, name in enumerate(node.outputs[1:])}
            yield node.with_names(f"token{token}", inputs, outputs)
        yield message.node("Concat", given, y, {"axis": 1})

    def _split(self, name: str) -> Iterator[bytes]:
        """Cut (batch, tokens, ...) into tokens, once."""
        if name not in self._parts:
            self._parts[name] = [f"{name}/token{token}" for token in range(self.tokens)]
            ones = self._constant("ones", np.ones(self.tokens, np.int64))
            yield message.node("Split", [name, ones], self._parts[name], {"axis": 1})

    def _shorter(self, name: str) -> Iterator[bytes]:
        """A length of all tokens as the length up to each of them, once."""
        if name not in self._parts:
            self._parts[name] = [f"{name}/token{token}" for token in range(self.tokens)]
            for token, part in enumerate(self._parts[name]):
                behind = self.tokens - 1 - token
                less = self._constant(f"less{behind}", np.array(behind, np.int32))
                yield message.node("Sub", [name, less], part)

    def _constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        name = f"look_ahead/{name}"
        self._constants[name] = message.constant(name, value)
        return name


def _kind(node: GraphNode) -> BlockProduct:
    sizes = node.sizes
    return BlockProduct(
        sizes["K"], sizes["block_size"], sizes.get("bits", 4), sizes.get("accuracy_level", 0), node.given(3)
    )
