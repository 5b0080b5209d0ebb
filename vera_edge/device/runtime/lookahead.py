"""Several tokens in one step, where what was said before tells what may come; the text stays the same.

Tokens that may follow (ngrams.py) are fed along with the last one, through a graph that gives each the logits
it has alone (token_graph.py). While the tokens that are then chosen are the ones that were fed, their logits
are there already; with the first other one the cache is cut back to what the text holds. So greedy text and
drawn text are bit for bit what they are without.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vera_edge.arrays import Array, Tokens
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.decoding import Decoder, Steps
from vera_edge.device.runtime.four_bit_graph import Rewritten
from vera_edge.device.runtime.graph import Graph
from vera_edge.device.runtime.ngrams import EarlierTokens
from vera_edge.device.runtime.token_graph import further, rewrite
from vera_edge.errors import BundleError, DataError, PlanError
from vera_edge.memory import free_memory

MOST = 16  # tokens that may be looked ahead for
_BEFORE, _ROUNDS = 8, 3  # tokens before those that are compared, and how often they are timed
_MEMORY = 0.1  # how much the last proposal counts in the mean of those before


@dataclass(frozen=True)
class Lookahead:
    """A decoder for `tokens` + 1 tokens a step. cost: of such a step, in steps of one token."""

    decoder: Decoder
    tokens: int
    cost: float

    @classmethod
    def open(cls, plain: Decoder, tokens: int) -> Lookahead:
        """Open a decoder's graph a second time, and hold it against the first.

        Raises DataError for a number that can't be, PlanError when logits would be others or there is too
        little memory.
        """
        check(tokens)
        graph = plain.graph
        try:
            model, copied = rewrite(_model(graph), tokens + 1)
        except ValueError as cause:
            raise BundleError(
                f"{graph.path} isn't an ONNX graph ({cause}); export the bundle again"
            ) from None
        _check_memory(graph, copied)
        held = {} if graph.rewritten is None else graph.rewritten.held
        rewritten = Rewritten(model, held, 0, 0.0)
        settings = replace(graph.settings, rewritten=rewritten, pack_at_once=False, cut_logits=False)
        opened = Graph(graph.path, settings)
        ports = tuple(
            tuple(opened.outputs[further(present.name, token)] for token in range(tokens))
            for _, present in plain.caches
        )
        decoder = replace(plain, graph=opened, further=ports, cuts_logits=False)
        return cls(decoder, tokens, _cost(plain, decoder, tokens + 1))


def check(tokens: int) -> None:
    """Raise DataError for a number of tokens that can't be looked ahead for."""
    if not 0 <= tokens <= MOST:
        raise DataError(f"speculate is {tokens}; it must be from 0, for none, to {MOST} tokens")


class SpeculativeSteps:
    """Appends to the single row of `steps` as it does itself. Not for several threads at once.

    fed: tokens that were looked ahead for, and kept: those of them that came. steps: runs of either graph.
    """

    def __init__(self, steps: Steps, ahead: Lookahead) -> None:
        self._plain, self._ahead = steps, ahead
        self._many = steps.beside(ahead.decoder)
        self._earlier = EarlierTokens()
        self._coming: list[int] = []  # tokens that were fed, and aren't chosen yet
        self._logits: list[Array] = []  # behind each of them
        self._length = 0  # tokens of the text that the cache holds rightly
        self._shadow: tuple[int, list[int]] | None = None
        # Of a proposal, how many tokens came, in the mean of late; at first as many as pay for it.
        self._mean = ahead.cost - 1
        self.fed = self.kept = self.steps = 0

    def append(self, text: Tokens) -> Array:
        """Logits (vocab,) behind `text` (n,), which is that of the last call and one more token."""
        if self._coming and self._coming[0] == text[-1]:
            self.kept += 1
            del self._coming[0]
            return self._logits.pop(0)
        self._coming, self._logits = [], []
        self.steps += 1
        self._learn(text)
        proposal = self._earlier.next(text, self._ahead.tokens)
        if proposal and self._shadow is None:
            self._shadow = len(text), proposal
        fits = len(text) + len(proposal) <= self._plain.capacity
        if not (proposal and fits and 1 + self._mean >= self._ahead.cost):
            self._plain.cut(len(text) - 1)
            return self._plain.append(text)
        self._many.cut(len(text) - 1)
        first, *self._logits = self._many.feed(np.array([[text[-1], *proposal]], np.int64))[0]
        self._coming = list(proposal)
        self.fed += len(proposal)
        return first

    def _learn(self, text: Tokens) -> None:
        """Note how much of an earlier proposal came, also of one that wasn't fed."""
        if self._shadow is None:
            return
        start, proposal = self._shadow
        came = text[start : start + len(proposal)].tolist()
        right = next((i for i, (a, b) in enumerate(zip(came, proposal, strict=False)) if a != b), len(came))
        if right == len(came) < len(proposal):
            return  # not known yet
        self._mean += _MEMORY * (right - self._mean)
        self._shadow = None


def _model(graph: Graph) -> memoryview:
    return memoryview(graph.rewritten.model if graph.rewritten else graph.path.read_bytes())


def _check_memory(graph: Graph, copied: int) -> None:
    """ONNX Runtime packs the weights of a second graph a second time."""
    needed = sum(path.stat().st_size for path in _weights(graph.path)) + copied
    if graph.rewritten is not None:
        needed += sum(array.nbytes for array in graph.rewritten.held.values())
    free = free_memory()
    if free is not None and needed > free:
        raise PlanError(
            f"looking ahead takes a second graph of about {needed / 1e6:.1f} MB, and this process may take "
            f"{free / 1e6:.1f} MB of memory; generate without"
        )


def _weights(path: Path) -> Sequence[Path]:
    return [file for file in path.parent.iterdir() if file.name.startswith(path.name) and file != path]


def _cost(plain: Decoder, ahead: Decoder, tokens: int) -> float:
    """Steps of one token that a step of `tokens` takes, in processor time, which others' work leaves alone.

    Raises PlanError unless their logits are the same.
    """
    size = _BEFORE + tokens
    text = (np.arange(size, dtype=np.int64) * 7919 + 13) % plain.vocab_size
    vectors = _vectors(plain.graph)
    one = Steps(plain, plain.cache(size), vectors)
    one.prefill(text[:_BEFORE])
    many = one.beside(ahead)
    seconds = np.empty((2, _ROUNDS))
    for number in range(_ROUNDS):
        one.cut(_BEFORE)
        begun = time.process_time()
        alone = np.stack([one.feed(text[None, i : i + 1])[0, 0].copy() for i in range(_BEFORE, size)])
        seconds[0, number] = (time.process_time() - begun) / tokens
        cache = [array.copy() for array in one.cache]
        many.cut(_BEFORE)
        begun = time.process_time()
        logits = many.feed(text[None, _BEFORE:])[0]
        seconds[1, number] = time.process_time() - begun
        same = all(map(np.array_equal, one.cache, cache)) and np.array_equal(logits, alone)
        if not same:
            raise PlanError(
                "this model's kernels round several tokens at once otherwise than one on this processor, so "
                "that looking ahead would change the text; generate without"
            )
    least = seconds.min(axis=1)
    return float(least[1] / least[0])


def _vectors(graph: Graph) -> Vectors:
    """Values that let every product of a branch show what it rounds."""
    draw = np.random.default_rng(0)
    shapes = {
        name: [size if isinstance(size, int) else 1 for size in port.shape]
        for name, port in graph.vectors.items()
    }
    return {
        name: (draw.standard_normal(shape) * 0.1).astype(graph.vectors[name].dtype)
        for name, shape in shapes.items()
    }
