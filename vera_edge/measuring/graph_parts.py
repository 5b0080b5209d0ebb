"""Cuts a decoder's graph into parts that run one after the other: embeddings, groups of layers, the head.

A layer ends where least is handed on between two reads of the cache. What doesn't depend on the text
(constants, rows of a shared matrix, an adapter's vectors taken apart) is in every part that reads it, so that
ONNX Runtime computes it beforehand as it does in the whole graph. A part's weights stay where they are: it
names the same places of the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from vera_edge.device.runtime import onnx_message as message
from vera_edge.errors import BundleError
from vera_edge.measuring.graph_file import GRAPH, INITIALIZER, INPUT, NAME, NODE, OUTPUT, VALUE, GraphFile


@dataclass(frozen=True)
class ExportedPart:
    """Some nodes as a model of their own. reads: values of earlier parts; gives: to later ones, or outputs.

    weights: the names of its initializers, `size` bytes of them. data: a ModelProto, whose files lie beside
    the whole graph's.
    """

    data: bytes
    weights: frozenset[str]
    size: int
    reads: frozenset[str]
    gives: tuple[str, ...]


def cut(graph: GraphFile, caches: Sequence[tuple[str, str]], most: int) -> list[ExportedPart]:
    """The parts of a graph, with at most `most` bytes of weights where a layer, or the head, has no more.

    caches: by layer, the names of inputs and outputs that hold what it has read. Raises BundleError for a
    graph that can't be cut.
    """
    found = _Cutting(graph, caches)
    bounds, groups = found.bounds(), list[list[int]]()
    for start, stop in pairwise(bounds):
        if groups and found.size(groups[-1][0], stop) <= most:
            groups[-1][1] = stop
        else:
            groups.append([start, stop])
    return [found.part(start, stop) for start, stop in groups]


class _Cutting:
    """What of a graph depends on its text, in the graph's order, and how long each value is needed."""

    def __init__(self, graph: GraphFile, caches: Sequence[tuple[str, str]]) -> None:
        self._graph, self._presents = graph, {present for _, present in caches}
        self._pasts = {past for past, _ in caches}
        known = {*graph.inputs, *graph.weights}
        self._texts: list[int] = []  # nodes that depend on the text
        self._made: dict[str, int] = {}  # in which of `_texts` a value is made
        self._others: dict[str, int] = {}  # values that don't depend on it: the node that makes each
        self._beside: list[frozenset[int]] = []  # by node, those that don't and that it needs
        for index, node in enumerate(graph.nodes):
            if unknown := next((name for name in node.reads if name not in known), None):
                raise BundleError(f"{graph.path} reads {unknown!r} before it's made; export the bundle again")
            known.update(node.gives)
            direct = {self._others[name] for name in node.reads if name in self._others}
            self._beside.append(frozenset(direct).union(*(self._beside[other] for other in direct)))
            if any(name in self._made or self._is_fed(name) for name in node.reads):
                self._made |= dict.fromkeys(node.gives, len(self._texts))
                self._texts.append(index)
            else:
                self._others |= dict.fromkeys(node.gives, index)
        self._last = {name: place for place, index in enumerate(self._texts) for name in self._reads(index)}
        self._last |= {name: len(self._texts) for name in graph.outputs if name not in self._presents}
        if shared := self._presents & self._last.keys():
            raise BundleError(f"{graph.path} reads {min(shared)!r}, a cache that it gives; it can't be cut")

    def bounds(self) -> list[int]:
        """Where parts may begin and end, as places in `_texts`."""
        count = len(self._texts)
        costs, floats = self._handed_on()
        reads = sorted(
            place for place, index in enumerate(self._texts) if self._pasts & {*self._reads(index)}
        )
        if not reads:
            raise BundleError(f"{self._graph.path} reads no cache; export the bundle again")
        spans = [
            [place for place in range(1, reads[0] + 1) if floats[place]],
            *(range(one + 1, other + 1) for one, other in pairwise(reads)),
            range(reads[-1] + 1, count),
        ]
        chosen = (min(reversed(span), key=lambda place: costs[place]) for span in spans if len(span))
        return [0, *chosen, count]

    def size(self, start: int, stop: int) -> int:
        """Bytes of the weights of these places."""
        return sum(self._graph.weights[name].size for name in self._weights(self._nodes(start, stop)))

    def part(self, start: int, stop: int) -> ExportedPart:
        """These places as a part."""
        graph, nodes = self._graph, self._nodes(start, stop)
        made = dict.fromkeys(name for index in nodes for name in graph.nodes[index].gives)
        read = dict.fromkeys(name for index in nodes for name in self._reads(index) if name not in made)
        weights = self._weights(nodes)
        reads = [name for name in read if name in self._made]
        gives = [name for name in made if name in self._made and self._last.get(name, -1) >= stop]
        presents = [name for name in made if name in self._presents]
        body = b"".join(message.field(NODE, bytes(graph.nodes[index].data)) for index in nodes)
        body += message.field(NAME, "part")
        body += _values(graph, INPUT, (name for name in read if name in graph.inputs or name in self._made))
        body += _values(graph, OUTPUT, dict.fromkeys([*presents, *gives]))
        inner = (name for name in made if name in graph.values and name not in gives and name not in presents)
        body += _values(graph, VALUE, inner)
        for name in sorted(weights):
            body += message.field(INITIALIZER, bytes(graph.weights[name].data))
        size = sum(graph.weights[name].size for name in weights)
        data = graph.rest + message.field(GRAPH, body)
        return ExportedPart(data, frozenset(weights), size, frozenset(reads), tuple(gives))

    def _handed_on(self) -> tuple[list[int], list[int]]:
        """Before each place, and at the end: bytes of a token's values that are made and needed still; and
        how many of them are floats."""
        costs, floats = [0] * (len(self._texts) + 2), [0] * (len(self._texts) + 2)
        for name, place in self._made.items():
            last, value = self._last.get(name, place), self._graph.values.get(name)
            if last > place and value is not None:
                costs[place + 1] += value.bytes_of_one
                costs[last + 1] -= value.bytes_of_one
                floats[place + 1] += value.is_float
                floats[last + 1] -= value.is_float
        return list(accumulate(costs)), list(accumulate(floats))

    def _is_fed(self, name: str) -> bool:
        return name in self._graph.inputs and name not in self._graph.weights

    def _reads(self, index: int) -> tuple[str, ...]:
        return self._graph.nodes[index].reads

    def _nodes(self, start: int, stop: int) -> list[int]:
        """The nodes of these places and what they need besides, in the graph's order."""
        own = self._texts[start:stop]
        return sorted({*own, *(other for index in own for other in self._beside[index])})

    def _weights(self, nodes: Iterable[int]) -> set[str]:
        return {name for index in nodes for name in self._reads(index) if name in self._graph.weights}


def _values(graph: GraphFile, field: int, names: Iterable[str]) -> bytes:
    """Values of a graph as its inputs, outputs or what is between. Raises BundleError for an unknown one."""
    values: Mapping[str, object] = graph.values
    made = bytearray()
    for name in names:
        if name not in values:
            raise BundleError(f"{graph.path} doesn't say of what type {name!r} is; export the bundle again")
        made += message.field(field, bytes(graph.values[name].data))
    return bytes(made)
