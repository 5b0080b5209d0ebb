"""A float graph that can be run: whole where it's small, else a part at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from vera_edge.arrays import Array
from vera_edge_onnx.graph import segments
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.segments import Values, run_parts
from vera_edge_onnx.sessions import Feeds, opened, run, save

Dimension = int | str | None


@dataclass(frozen=True)
class GraphSignature:
    """inputs: the shapes of those that must be fed. overridable: those that have a value of their own."""

    inputs: Mapping[str, Sequence[Dimension]]
    overridable: frozenset[str]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, graph: ir.Model) -> GraphSignature:
        needed = {
            value.name: [size if isinstance(size, int) else size.value for size in value.shape or ()]
            for value in graph.graph.inputs
            if value.name and value.const_value is None
        }
        optional = {
            value.name for value in graph.graph.inputs if value.name and value.const_value is not None
        }
        return cls(needed, frozenset(optional), tuple(value.name or "" for value in graph.graph.outputs))


class Running(Protocol):
    """A graph that is open."""

    @property
    def signature(self) -> GraphSignature: ...

    def run_chains(
        self, chains: Sequence[Sequence[Feeds]], handed_on: Mapping[str, str], names: Collection[str]
    ) -> Iterator[list[Values]]:
        """As `segments.run_parts`. Raises TargetError when ONNX Runtime fails."""


@dataclass(frozen=True)
class Whole:
    """In one ONNX Runtime session."""

    session: Any
    signature: GraphSignature

    def run_chains(
        self, chains: Sequence[Sequence[Feeds]], handed_on: Mapping[str, str], names: Collection[str]
    ) -> Iterator[list[Values]]:
        asked = sorted({*names, *handed_on.values()})
        for chain in chains:
            found: list[Values] = []
            before: dict[str, Array] = {}
            for feeds in chain:
                given = {**feeds, **{past: before[now] for past, now in handed_on.items() if now in before}}
                before = dict(zip(asked, run(self.session, asked, given), strict=True))
                found.append({name: before[name] for name in names})
            yield found


@dataclass(frozen=True)
class InParts:
    """With the weights of one part in memory. folder: to write to."""

    graph: ir.Model
    signature: GraphSignature
    folder: Path

    def run_chains(
        self, chains: Sequence[Sequence[Feeds]], handed_on: Mapping[str, str], names: Collection[str]
    ) -> Iterator[list[Values]]:
        wanted = frozenset({*names, *handed_on.values()})
        parts = segments.cut(self.graph, self.folder, segments.MOST, wanted)
        return run_parts(parts, chains, handed_on, names)


def opened_graph(graph: ir.Model, path: Path, more: Collection[str] = ()) -> Running:
    """The graph, ready to run. path: for what ONNX Runtime reads. more: values to give beside the outputs.

    Raises TargetError when ONNX Runtime refuses it.
    """
    signature = GraphSignature.of(graph)
    weights = (value.const_value for value in graph.graph.initializers.values())
    if sum(weight.nbytes for weight in weights if isinstance(weight, ComputedWeight)) > segments.MOST:
        return InParts(graph, signature, path.parent)
    copy = graph
    if more:
        copy = graph.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        given = {value.name for value in copy.graph.outputs}
        copy.graph.outputs.extend(values[name] for name in sorted(more) if name not in given)
    return Whole(opened(save(copy, path)), signature)
