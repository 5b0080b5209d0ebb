"""Streaming generation: one prompt in, pieces of text out, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_edge.arrays import Tokens
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.decoding import Decoder, Steps
from vera_edge.device.runtime.sampling import Sampler, Sampling
from vera_edge.device.runtime.stopping import StoppedText, stop_strings
from vera_edge.errors import DataError


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
        text: BundleText,
        prompt: Tokens,
        vectors: Vectors,
        sampling: Sampling,
        max_tokens: int,
        stop: str | Sequence[str] = (),
    ) -> None:
        if len(prompt) >= decoder.context:
            raise DataError(
                f"the prompt is {len(prompt)} tokens long and the context holds {decoder.context}; shorten it"
            )
        self.prompt = prompt
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._end: int | None = None  # the token that ended the text
        self.timing = Timing()
        self._chosen = 0
        self._decoder, self._text, self._stop = decoder, text, stop_strings(stop)
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
        output = StoppedText(self._text, self._stop)
        for token in self._choose():
            piece = output.push(token)
            if output.stopped:
                self.finish = "stop"
            if piece:
                yield piece
            if output.stopped:
                return
        piece = output.end(self._end)
        if output.stopped and self.finish != "end":
            self.finish = "stop"
        if piece:
            yield piece

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
                self._end, self.finish = chosen, "end"
                return
            self.tokens.append(chosen)
            seen[length] = chosen
            length += 1
            yield chosen
            logits = steps.append(seen[:length]) if length < self._capacity else None
        self.finish = "length"
