"""An exported decoder that doesn't fit in memory, run in parts: all windows through one, then the next.

ONNX Runtime holds an open graph twice: the file as it's mapped, and what it multiplies with in an order of
its own. Here that's so of one part at a time. What parts hand on is kept between them, each window's by
itself; a window is fed in the same pieces as `Session` feeds it, with a cache of the part's own layers. The
logits are those of the whole graph, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Array, Float32, Int64
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.device.runtime import generated, int8_products
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.decoding import ROPE_LENGTH, DecoderFacts
from vera_edge.device.runtime.graph import Graph, GraphPorts, GraphSettings, bind, first_line
from vera_edge.device.runtime.opened import Adaptable, check_kind, graph_bytes
from vera_edge.errors import BundleError
from vera_edge.measuring.graph_file import GraphFile
from vera_edge.measuring.graph_parts import ExportedPart, cut
from vera_edge.memory import free_memory
from vera_edge.progress import Progress, silent
from vera_edge.storage.spill import ROOM, KeptArrays, Room

COPIES = 2  # of the weights, in ONNX Runtime
_SHARE = 2  # a graph takes no more than this part of the memory, as a model in torch (`reference.room`)
_PARTS = 16  # a part takes no more than this part of it, if a layer doesn't
_KEPT = 8  # nor what is handed on, before it goes to the disk
_LOGITS = "logits"


def fits(manifest: Manifest, max_memory: int | None = None) -> bool:
    """Whether an export takes at most half of `max_memory` bytes, or of the memory that's free, in one graph.

    It does on systems that don't say how much is free.
    """
    limit = _limit(max_memory)
    return limit is None or COPIES * graph_bytes(manifest) <= limit // _SHARE


def _limit(max_memory: int | None) -> int | None:
    return min((limit for limit in (max_memory, free_memory()) if limit is not None), default=None)


@dataclass(frozen=True)
class PartedExport:
    """A Runner over an exported decoder in parts, with an adapter's `vectors` by the graph's inputs.

    exact_int8: see `Graph`. room: bytes of what parts hand on that stay in memory.
    """

    manifest: Manifest
    ports: GraphPorts
    facts: DecoderFacts
    parts: tuple[ExportedPart, ...]
    exact_int8: bool
    room: int
    vectors: Vectors = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: Path, adapter: str = "default", max_memory: int | None = None, most: int | None = None
    ) -> PartedExport:
        """Verify the bundle in `folder` and cut its graph; nothing of it is in memory until it runs.

        adapter: as in `Session.open`. most: bytes of a part's weights where a layer has no more; by default a
        sixteenth of `max_memory` bytes, or of what is free. Raises as `Session.open`, and BundleError when
        there is too little memory for its largest part.
        """
        manifest = bundle.verify(folder)
        check_kind(manifest, "decoder")
        graph = GraphFile.read(manifest.path(manifest.model))
        ports, limit = graph.ports(), _limit(max_memory)
        facts = DecoderFacts.read(manifest.folder, ports)
        if most is None:
            most = graph_bytes(manifest) if limit is None else limit // _PARTS
        parts = cut(graph, [(past.name, present.name) for past, present in facts.caches], most)
        _check_memory(folder, parts, limit)
        chosen = Adaptable(manifest, ports)
        chosen.swap(adapter)
        exact = int8_products.must_be_exact(manifest)
        room = ROOM if limit is None else min(ROOM, limit // _KEPT)
        return cls(manifest, ports, facts, tuple(parts), exact, room, chosen.vectors)

    @property
    def vocab_size(self) -> int:
        """How many tokens its logits are over."""
        return self.facts.vocab_size

    @property
    def layer_by_layer(self) -> bool:
        """True: its weights are read at every pass."""
        return True

    @property
    def note(self) -> str:
        """That it was run in parts, for a person to read."""
        size = graph_bytes(self.manifest) / 1e9
        return (
            f"the graph of {self.manifest.folder}, {size:,.1f} GB, was run in {len(self.parts)} parts, one "
            "after the other"
        )

    def without_adapter(self) -> PartedExport:
        """The base alone."""
        return replace(self, vectors={})

    def logits(self, tokens: Int64) -> Float32:
        """Teacher-forced logits (n, vocab_size) float32 of one sequence of n token ids."""
        return next(self.logits_of([tokens]))

    def logits_of(self, windows: Sequence[Int64]) -> Iterator[Float32]:
        """`logits` of each window, one at a time, in one pass over the weights."""
        return (found for (found,) in self.logits_together([self], windows))

    def logits_together(
        self,
        views: Sequence[PartedExport],
        windows: Sequence[Int64],
        first: Sequence[int | None] = (),
        progress: Progress = silent,
    ) -> Iterator[tuple[Float32, ...]]:
        """Of each window the logits with several adapters, for which the weights are read once.

        views: of one export. first: on how many of the windows each view is run, None or nothing for all;
        later tuples lack it. Raises BundleError when ONNX Runtime fails, OutputError when what parts hand on
        fills the disk of temporary files.
        """
        counts = [*first, *(None for _ in range(len(views) - len(first)))]
        bounded = [(view.vectors, count) for view, count in zip(views, counts, strict=True)]
        rows = [
            [_Run(self, vectors, tokens) for vectors, count in bounded if count is None or row < count]
            for row, tokens in enumerate(windows)
        ]
        yield from _through(self, rows, progress)

    def greedy_of(self, prompts: Sequence[Int64], count: int, ends: Sequence[int]) -> list[list[int]]:
        """The `count` tokens that follow each prompt, the likeliest each time, up to one of `ends`.

        Each token costs a pass over all weights, and all of the texts.
        """
        texts, going = list(prompts), list(range(len(prompts)))
        for _ in range(count):
            found = self.logits_of([texts[row] for row in going])
            for row, logits in zip(tuple(going), found, strict=True):
                texts[row] = np.append(texts[row], np.int64(logits[-1].argmax()))
            going = [row for row in going if int(texts[row][-1]) not in ends]
            if not going:
                break
        return [
            [int(token) for token in text[len(prompt) :]] for text, prompt in zip(texts, prompts, strict=True)
        ]

    def opened(self, part: ExportedPart) -> Graph:
        """A part in ONNX Runtime."""
        held = generated.in_memory(self.manifest, part.weights)
        return Graph(self.ports.path, GraphSettings(held=held, exact_int8=self.exact_int8), part.data)


def _check_memory(folder: Path, parts: Sequence[ExportedPart], limit: int | None) -> None:
    needed = COPIES * max(part.size for part in parts)
    if limit is not None and needed > limit:
        raise BundleError(
            f"{folder} has a layer, a head or a table that takes {needed / 1e6:,.1f} MB in ONNX Runtime, and "
            f"it may take {limit / 1e6:,.1f} MB; give it more (--max-memory), free some, or take a smaller "
            "bundle"
        )


@dataclass(frozen=True)
class _Run:
    """One window with one adapter."""

    export: PartedExport
    vectors: Vectors
    tokens: Int64

    @property
    def pieces(self) -> list[slice]:
        """What is fed at once."""
        size, count = self.export.facts.chunk, len(self.tokens)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def fed(self, piece: slice) -> dict[str, Array]:
        """The graph's own inputs for a piece, whatever a part reads of them."""
        found: dict[str, Array] = {
            "input_ids": self.tokens[None, piece],
            "attention_mask": np.ones((1, piece.stop), np.int64),
            "position_ids": np.arange(piece.start, piece.stop)[None],
        }
        if self.export.facts.rope is not None:
            found[ROPE_LENGTH] = np.array([len(self.tokens)])
        return found

    def through(self, graph: Graph, part: ExportedPart, kept: KeptArrays, key: Any) -> Iterator[list[Array]]:
        """What a part gives for each piece. kept: what it reads, by `key`, piece and name."""
        facts = self.export.facts
        own = replace(facts, caches=tuple(pair for pair in facts.caches if pair[0].name in graph.inputs))
        cache = own.cache(len(self.tokens))
        for number, piece in enumerate(self.pieces):
            given = {**self.fed(piece), **{name: kept[key, number, name] for name in part.reads}}
            yield _run(graph, own, cache, self.vectors, given)[-len(part.gives) :]


def _run(
    graph: Graph, facts: DecoderFacts, cache: Sequence[Array], vectors: Vectors, given: dict[str, Array]
) -> list[Array]:
    binding, alive = graph.binding(), []
    for (past, present), array in zip(facts.caches, cache, strict=True):
        bind(binding, past, array)
        bind(binding, present, array, output=True)
    for name, array in {**vectors, **given}.items():
        port = graph.inputs.get(name) or graph.options.get(name) or graph.vectors.get(name)
        if port is not None:
            alive.append(np.asarray(array, port.dtype, order="C"))
            bind(binding, port, alive[-1])
    for name in graph.outputs:
        if name not in {present.name for _, present in facts.caches}:
            binding.bind_output(name, "cpu")
    try:
        graph.session.run_with_iobinding(binding)
    except Exception as cause:  # onnxruntime's classes share no base but Exception
        raise BundleError(f"ONNX Runtime fails on {graph.path}: {first_line(cause)}") from None
    return [value.numpy() for value in binding.get_outputs()[len(cache) :]]


def _through(
    export: PartedExport, rows: Sequence[Sequence[_Run]], progress: Progress
) -> Iterator[tuple[Float32, ...]]:
    """The logits of each row's runs, all of which go through a part before the next is opened."""
    kept, parts = KeptArrays(Room(export.room)), export.parts
    last_use = {name: number for number, part in enumerate(parts) for name in part.reads}
    for number, part in enumerate(parts):
        progress("running the export part by part", number, len(parts))
        graph = export.opened(part)
        over = [name for name in part.reads if last_use[name] == number]
        for row, runs in enumerate(rows):
            found = []
            for place, run in enumerate(runs):
                logits = np.empty((len(run.tokens), export.vocab_size), np.float32)
                made = run.through(graph, part, kept, (row, place))
                for index, (piece, values) in enumerate(zip(run.pieces, made, strict=True)):
                    for name, array in zip(part.gives, values, strict=True):
                        if name == _LOGITS:
                            logits[piece] = array[0]
                        else:
                            kept[(row, place), index, name] = array
                    for name in over:
                        kept.drop(((row, place), index, name))
                found.append(logits)
                del logits
            if number + 1 == len(parts):
                yield tuple(found)
            del found
        del graph
