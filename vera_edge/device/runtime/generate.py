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
from vera_edge.device.runtime.lookahead import Lookahead, SpeculativeSteps
from vera_edge.device.runtime.prompt_cache import PromptCache
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

    prompt: the prompt's token ids (n,). reused: how many of them needn't be computed. tokens: ids generated
    so far. finish: None while it runs, then "end" (the model ended the text), "stop" (a stop string) or
    "length" (max_tokens or the context is used up).
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
        ahead: Lookahead | None = None,
        earlier: PromptCache | None = None,
    ) -> None:
        """ahead: what reads several tokens a step where the text repeats itself; None reads one.

        earlier: what prompts began with before; None computes all of each.
        """
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
        if ahead is not None and decoder.rope is not None and self._capacity > decoder.rope.length:
            raise DataError(
                f"this model rotates texts of more than {decoder.rope.length} tokens otherwise, and can't "
                "look ahead in them; ask for fewer tokens, or for no speculation"
            )
        self._ahead, self._earlier = ahead, earlier or PromptCache(0)
        self.reused = 0
        self._speculative: SpeculativeSteps | None = None
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
        ahead = self._speculative
        speculation = {} if ahead is None else {"fed": ahead.fed, "kept": ahead.kept, "steps": ahead.steps}
        return {
            "prompt_tokens": len(self.prompt),
            "tokens": [int(token) for token in self.tokens],
            "finish": self.finish,
            "first_token_seconds": round(self.timing.first, 4),
            "tokens_per_second": round((self._chosen - 1) / later, 2) if later > 0 else None,
            **({"reused_tokens": self.reused} if self.reused else {}),
            **({"speculation": speculation} if speculation else {}),
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
        # Tokens that are looked ahead for lie behind the text's own end, too.
        room = min(self._decoder.context, self._capacity + (self._ahead.tokens if self._ahead else 0))
        steps = Steps(self._decoder, self._decoder.cache(room), self._vectors)
        append = steps.append
        if self._ahead is not None:
            self._speculative = SpeculativeSteps(steps, self._ahead)
            append = self._speculative.append
        seen = np.empty(self._capacity, np.int64)
        length = len(self.prompt)
        seen[:length] = self.prompt
        logits = None
        if length < self._capacity:
            self.reused, logits = self._earlier.prefill(steps, self.prompt)
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
            logits = append(seen[:length]) if length < self._capacity else None
        self.finish = "length"
