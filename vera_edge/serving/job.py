"""One text being generated: logits in, the next token out, and the pieces of its answer as they are whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Tokens
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.chat import BundleText, TextStream
from vera_edge.device.runtime.decoding import Decoder
from vera_edge.device.runtime.log_probabilities import TokenChoice, choice
from vera_edge.device.runtime.sampling import Sampler, Sampling
from vera_edge.device.runtime.stopping import StoppedText
from vera_edge.errors import VeraEdgeError


@dataclass(frozen=True)
class AnswerPiece:
    """What may be shown since the last piece. tokens: those it ends with, where probabilities were asked for.

    finish: None while more comes, then "end", "stop" or "length". generated: tokens so far.
    """

    text: str
    tokens: tuple[TokenChoice, ...] = ()
    finish: str | None = None
    generated: int = 0


Deliver = Callable[[AnswerPiece | VeraEdgeError], None]


class Job:
    """A prompt, how to go on with it, and what came so far.

    prompt: token ids (n,). limit: tokens to generate at most. deliver: given each piece, the last of which
    has a `finish`, or the error that ended it; called in the engine's thread. cancelled: set by whoever no
    longer wants the answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: BundleText,
        prompt: Tokens,
        vectors: Vectors,
        sampling: Sampling,
        limit: int,
        stop: tuple[str, ...],
        logprobs: int | None,
        deliver: Deliver,
    ) -> None:
        self.prompt, self.vectors, self.limit, self.deliver = prompt, vectors, limit, deliver
        self.cancelled = False
        self.finish: str | None = None
        self._ends, self._logprobs = decoder.ends, logprobs
        self._sampler, self._output = Sampler(sampling), StoppedText(text, stop)
        self._seen = np.concatenate([prompt, np.zeros(limit, np.int64)])
        self._generated = 0
        # The text as it were without stop strings: it tells which tokens lie before one.
        self._plain = TextStream(text)
        self._untold: list[tuple[int, TokenChoice]] = []  # where its text begins, in characters of all
        self._written = self._shown = 0  # characters of the text of all tokens, and of what was delivered

    @property
    def capacity(self) -> int:
        """Tokens that prompt and answer may take."""
        return len(self.prompt) + self.limit

    @property
    def seen(self) -> Tokens:
        """The tokens of the prompt and of the answer so far."""
        return self._seen[: len(self.prompt) + self._generated]

    def take(self, logits: npt.NDArray[Any]) -> int:
        """Choose the next token of logits (vocab,) and deliver what can be shown; `finish` tells the end.

        What goes wrong with this text ends this job alone.
        """
        try:
            return self._take(logits)
        except VeraEdgeError as error:
            self.fail(error)
            return 0

    def fail(self, error: VeraEdgeError) -> None:
        """Deliver an error as the last that comes."""
        self.cancelled = True
        self.deliver(error)

    def _take(self, logits: npt.NDArray[Any]) -> int:
        token = self._sampler.pick(logits, self.seen)
        if token in self._ends:
            text = self._output.end(token)
            self._deliver(text, "end")
            return token
        self._seen[len(self.prompt) + self._generated] = token
        self._generated += 1
        self._note(logits, token)
        text = self._output.push(token)
        finish = "stop" if self._output.stopped else None
        if finish is None and self._generated == self.limit:
            text += self._output.end()
            finish = "stop" if self._output.stopped else "length"
        self._deliver(text, finish)
        return token

    def _note(self, logits: npt.NDArray[Any], token: int) -> None:
        """Keep the token's probability until its text is shown."""
        if self._logprobs is not None:
            self._untold.append((self._written, choice(logits, token, self._logprobs)))
            self._written += len(self._plain.push(token))

    def _deliver(self, text: str, finish: str | None) -> None:
        self.finish = finish
        if not text and finish is None:
            return
        self._shown += len(text)
        # A token is told with the text it begins. What stands in the stop string isn't part of the answer.
        cut = finish is None or self._output.stopped
        told = [each for each in self._untold if not cut or each[0] < self._shown]
        self._untold = self._untold[len(told) :]
        self.deliver(AnswerPiece(text, tuple(each for _, each in told), finish, self._generated))
