"""Several texts at once: each row its own prompt and, where the graph allows, its own adapter.

Prompts are fed row by row into the row's part of one cache, so none is padded; then all rows step together,
but for those whose rotary embedding would be another one alone: they follow each other.
A row of a quantized model may round differently than alone, since other kernels run for several rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Tokens
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.decoding import Decoder, Steps
from vera_edge.device.runtime.graph import Graph
from vera_edge.device.runtime.prompt_cache import PromptCache
from vera_edge.device.runtime.sampling import Sampler, Sampling
from vera_edge.device.runtime.stopping import StoppedText, stop_strings
from vera_edge.errors import DataError, MismatchError


class Batch:
    """An iterator of (row, text piece) until every row has ended.

    tokens: the ids generated so far, a list per row. finish: None, "end", "stop" or "length", per row.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: BundleText,
        prompts: Sequence[Tokens],
        vectors: Sequence[Vectors],
        sampling: Sampling,
        max_tokens: int,
        stop: str | Sequence[str] = (),
        earlier: PromptCache | None = None,
    ) -> None:
        """earlier: what prompts began with before; None computes all of each."""
        stacked(decoder.graph, vectors)  # refuses what can't be combined before any work is done
        longest = max((len(prompt) for prompt in prompts), default=0)
        if not 0 < longest < decoder.context:
            raise DataError(
                f"the longest of {len(prompts)} prompts has {longest} tokens; {decoder.context} fit"
            )
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.finish: list[str | None] = [None for _ in prompts]
        self._decoder, self._text, self._prompts = decoder, text, prompts
        self._vectors, self._earlier = vectors, earlier or PromptCache(0)
        stops = stop_strings(stop)
        self._outputs = [StoppedText(text, stops) for _ in prompts]
        self._limit = min(max_tokens, decoder.context - longest)
        self._capacity = longest + self._limit
        # A seed of its own for each row, drawn from the one that was given.
        seeds = np.random.SeedSequence(sampling.seed).generate_state(len(prompts), np.uint64)
        self._samplers = [Sampler(sampling.seeded(int(seed))) for seed in seeds]
        self._pieces = self._run()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        return next(self._pieces)

    def _run(self) -> Iterator[tuple[int, str]]:
        rows = list(range(len(self._prompts)))
        rope = self._decoder.rope
        together = rope is None or self._capacity <= rope.length
        for group in [rows] if together else [[row] for row in rows]:
            yield from self._run_rows(group)
        self.finish = [finish or "length" for finish in self.finish]

    def _run_rows(self, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        cache = self._decoder.cache(self._capacity, len(rows))
        logits = np.empty((len(rows), self._decoder.vocab_size), np.float32)
        for place, row in enumerate(rows) if self._limit > 0 else ():
            part = [array[place : place + 1] for array in cache]
            steps = Steps(self._decoder, part, self._vectors[row])
            _, logits[place] = self._earlier.prefill(steps, self._prompts[row])
        lengths = [len(self._prompts[row]) for row in rows]
        vectors = stacked(self._decoder.graph, [self._vectors[row] for row in rows])
        steps = Steps(self._decoder, cache, vectors, lengths)
        chosen = np.zeros((len(rows), 1), np.int64)
        for _ in range(self._limit):
            for place, row in enumerate(rows):
                if self.finish[row] is None and (piece := self._next(row, logits[place], chosen[place])):
                    yield row, piece
            if all(self.finish[row] for row in rows):
                break
            if len(rows) == 1:
                logits[0] = steps.append(self._seen(rows[0]))
                continue
            logits = steps.feed(chosen)[:, 0]
            # A row that has ended is fed along, always into the same place behind its text.
            steps.lengths -= np.array([self.finish[row] is not None for row in rows], np.int64)

    def _seen(self, row: int) -> Tokens:
        return np.append(self._prompts[row], np.array(self.tokens[row], np.int64))

    def _next(self, row: int, logits: npt.NDArray[np.float32], chosen: Tokens) -> str:
        """Pick the row's next token, put it into `chosen`, and return the text that may be shown now."""
        token = self._samplers[row].pick(logits, self._seen(row))
        chosen[0] = token
        output = self._outputs[row]
        if token in self._decoder.ends:
            self.finish[row] = "end"
            return output.end(token)
        self.tokens[row].append(token)
        piece = output.push(token)
        if not output.stopped and len(self.tokens[row]) == self._limit:
            self.finish[row] = "length"
            piece += output.end()
        if output.stopped:
            self.finish[row] = "stop"
        return piece


def stacked(graph: Graph, rows: Sequence[Vectors]) -> Vectors:
    """The rows' vectors as the graph takes them: one set when all are equal, else along the batch axis.

    Raises MismatchError when they differ and the graph's vectors have no batch axis.
    """
    if all(row is rows[0] for row in rows):
        return rows[0]
    fixed = [name for name, port in graph.vectors.items() if isinstance(port.shape[0], int)]
    if fixed:
        raise MismatchError(
            f"{graph.path} takes one adapter for all rows; one per row needs a batch axis on its vectors"
        )
    zeros = {
        name: np.zeros([size if isinstance(size, int) else 1 for size in port.shape], port.dtype)
        for name, port in graph.vectors.items()
    }
    return {name: np.concatenate([row.get(name, zeros[name]) for row in rows]) for name in zeros}
