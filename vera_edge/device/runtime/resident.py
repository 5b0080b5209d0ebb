"""A branch's graph that one adapter lives in: its vectors lie in memory as the layers read them.

The pieces of its vectors (vector_pieces.py) are initializers of which ONNX Runtime reads our own memory, so
that another adapter moves in by a copy. What runs with other vectors, or with vectors that differ by row,
gives its pieces to each run; logits are the same bit for bit either way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vera_edge.arrays import Array
from vera_edge.device.runtime import onnx_message as message
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.graph import USUAL, Graph, GraphSettings, bind
from vera_edge.device.runtime.vector_pieces import cut
from vera_edge.errors import PlanError


class ResidentGraph(Graph):
    """A graph with an adapter that lives in it; none at first. Safe for several threads, as `Graph` is."""

    def __init__(self, path: Path, settings: GraphSettings = USUAL) -> None:
        """Arguments and what it raises: as of `Graph`; PlanError where ONNX Runtime copies initializers."""
        if not reads_in_place():
            raise PlanError(
                f"onnxruntime {onnxruntime.__version__} copies what is written for a resident adapter; open "
                "the bundle without one"
            )
        rewritten = settings.rewritten
        made = cut(path, memoryview(path.read_bytes() if rewritten is None else rewritten.model))
        self._places = {name: piece.zeros() for name, piece in made.pieces.items()}
        super().__init__(path, settings, made.model, self._places)
        ports = {**self.options, **self.vectors}
        self.vectors, self._pieces = made.vectors, made.pieces
        self._ports = {name: ports.pop(name) for name in made.pieces}
        self.options = ports
        self._resident: Vectors | None = None
        self._reading, self._coming = 0, False
        self._turn = threading.Condition()

    @classmethod
    def beside(cls, graph: Graph) -> ResidentGraph:
        """The same graph opened once more; weights that were made in memory are shared."""
        return cls(graph.path, replace(graph.settings, pack_at_once=False))

    def put(self, vectors: Vectors) -> None:
        """Let these vectors (one row each) live here from the next run on; waits for those that run now."""
        with self._turn:
            self._turn.wait_for(lambda: not self._coming)
            self._coming = True
            self._turn.wait_for(lambda: not self._reading)
            for name, place in self._places.items():
                place[...] = self._pieces[name].of(vectors)
            self._resident, self._coming = vectors, False
            self._turn.notify_all()

    def runner(self, binding: Any, vectors: Mapping[str, Array]) -> Callable[[], None]:
        """As `Graph.runner`; vectors are the resident ones where they are the very object that was put."""
        return _Run(self, binding, vectors)

    @contextmanager
    def reading(self, vectors: Vectors) -> Iterator[bool]:
        """Whether these vectors live here, and stay meanwhile."""
        with self._turn:
            self._turn.wait_for(lambda: not self._coming)
            here = self._resident is vectors
            self._reading += here
        try:
            yield here
        finally:
            with self._turn:
                self._reading -= here
                self._turn.notify_all()

    def feed(self, binding: Any, vectors: Vectors) -> list[Array]:
        """Bind the pieces of vectors (rows, ...): arrays that have to live as long as the binding."""
        arrays = {name: piece.of(vectors) for name, piece in self._pieces.items()}
        for name, array in arrays.items():
            bind(binding, self._ports[name], array)
        return list(arrays.values())


@dataclass
class _Run:
    """Runs a binding with these vectors: where they live, or else from arrays of its own."""

    graph: ResidentGraph
    binding: Any
    vectors: Vectors
    _arrays: list[Array] = field(default_factory=list)

    def __call__(self) -> None:
        if self._arrays:
            self.graph.session.run_with_iobinding(self.binding)
            return
        with self.graph.reading(self.vectors) as here:
            if here:
                self.graph.session.run_with_iobinding(self.binding)
                return
        self._arrays = self.graph.feed(self.binding, self.vectors)
        self.graph.session.run_with_iobinding(self.binding)


@cache
def reads_in_place() -> bool:
    """Whether ONNX Runtime reads initializers that are handed over where they lie: a graph shows it."""
    place, size = np.zeros(256, np.float32), 256
    graph = message.field(1, message.node("Mul", ["x", "w"], "y")) + message.field(2, "probe")
    graph += message.field(5, message.constant("w", place))
    for name in ("x", "w"):
        graph += message.field(11, message.port(name, message.FLOAT, (size,)))
    graph += message.field(12, message.port("y", message.FLOAT, (size,)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    value = onnxruntime.OrtValue.ortvalue_from_numpy(place)
    options.add_initializer("w", value)
    model = message.model(graph, {"": 13})
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for number in (2.0, 3.0):
        place[...] = number
        (found,) = session.run(None, {"x": np.ones(size, np.float32)})
        if (found != number).any():
            return False
    return True
