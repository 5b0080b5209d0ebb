"""Streaming generation: one prompt in, pieces of text out, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.device.adapters import Vectors
from vera_edge.device.chat import Text, TextStream
from vera_edge.device.decoding import Decoder, Steps
from vera_edge.device.sampling import Sampler, Sampling
from vera_edge.errors import DataError

Tokens = npt.NDArray[np.int64]


@dataclass
class Timing:
    """Seconds since the generation began, by the monotonic clock: `first` token, then `end`."""

    first: float = 0.0
    end: float = 0.0


class Generation:
    """An iterator of text pieces; while and after it runs it tells what was generated.

    prompt: the prompt's token ids (n,). tokens: ids generated so far. finish: None while it runs, then "end"
    (the model ended the text), "stop" (a stop string) or "length" (max_tokens or the context is used up).
    """

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        prompt: Tokens,
        vectors: Vectors,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        if len(prompt) >= decoder.context:
            raise DataError(
                f"the prompt is {len(prompt)} tokens long and the context holds {decoder.context}; shorten it"
            )
        self.prompt = prompt
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.timing = Timing()
        self._chosen = 0
        self._decoder, self._text, self._stop = decoder, text, stop
        self._capacity = min(decoder.context, len(prompt) + max_tokens)
        self._sampler = Sampler(sampling)
        self._vectors = vectors
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def summary(self) -> dict[str, Any]:
        """For JSON: counts, how it finished, seconds to the first token, tokens per second after it."""
        later = self.timing.end - self.timing.first
        return {
            "prompt_tokens": len(self.prompt),
            "tokens": [int(token) for token in self.tokens],
            "finish": self.finish,
            "first_token_seconds": round(self.timing.first, 4),
            "tokens_per_second": round((self._chosen - 1) / later, 2) if later > 0 else None,
        }

    def _run(self) -> Iterator[str]:
        stream, gate = TextStream(self._text), StopGate(self._stop)
        for token in self._choose():
            piece = gate.push(stream.push(token))
            if gate.closed:
                self.finish = "stop"
            if piece:
                yield piece
            if gate.closed:
                return
        if piece := gate.push(stream.flush()):
            yield piece
        if not gate.closed and (piece := gate.flush()):
            yield piece
        if gate.closed:
            self.finish = "stop"

    def _choose(self) -> Iterator[int]:
        """The chosen tokens, without the one that ends the text."""
        began = time.monotonic()
        steps = Steps(self._decoder, self._decoder.cache(self._capacity), self._vectors)
        seen = np.empty(self._capacity, np.int64)
        length = len(self.prompt)
        seen[:length] = self.prompt
        logits = steps.prefill(self.prompt) if length < self._capacity else None
        while logits is not None:
            chosen = self._sampler.pick(logits, seen[:length])
            self.timing.end = time.monotonic() - began
            self.timing.first = self.timing.first or self.timing.end
            self._chosen += 1
            if chosen in self._decoder.ends:
                self.finish = "end"
                return
            self.tokens.append(chosen)
            seen[length] = chosen
            length += 1
            yield chosen
            logits = steps.append(seen[:length]) if length < self._capacity else None
        self.finish = "length"


class StopGate:
    """Lets text through up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.closed = False

    def push(self, piece: str) -> str:
        """What may be shown now that `piece` came; after a stop string `closed` is true."""
        if self.closed or not piece:
            return ""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.closed = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
