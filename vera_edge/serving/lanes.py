"""Jobs that run: those that step together as rows of one batch, and those that can't share one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy.typing as npt

from vera_edge.device.runtime.decoding import Decoder, Steps
from vera_edge.device.runtime.prompt_cache import PromptCache
from vera_edge.device.runtime.rows import Rows
from vera_edge.serving.job import Job


class Prompt:
    """A job whose prompt is being fed, a chunk at a time, into a cache of its own."""

    def __init__(self, decoder: Decoder, job: Job, alone: bool, earlier: PromptCache) -> None:
        """alone: make the cache long enough for the whole text, which will stay in it. earlier: see there."""
        self.job, self.alone = job, alone
        self.cache = decoder.cache(job.capacity if alone else len(job.prompt))
        self.steps = Steps(decoder, self.cache, job.vectors, whole=len(job.prompt))
        self._earlier = earlier
        self._found = earlier.restore(self.steps, job.prompt)
        coming = job.prompt[self._found :]
        self._pieces: Iterator[npt.NDArray[Any]] = self.steps.pieces(coming)
        self._left = -(-len(coming) // decoder.prompt_chunk)

    def feed(self) -> npt.NDArray[Any] | None:
        """Feed the next chunk; the logits (vocab,) behind the whole prompt once it's in, None before."""
        logits = next(self._pieces)
        self._left -= 1
        if self._left:
            return None
        self._earlier.keep(self.steps, self.job.prompt, self._found)
        return logits


class Lane(Protocol):
    """Jobs that take their steps together."""

    jobs: list[Job]

    def step(self) -> None:
        """Feed each job the token it chose last and let it take the next; those that end are taken out."""


class Together:
    """Jobs in the rows of one batch."""

    def __init__(self, decoder: Decoder, capacity: int, most: int, varying: bool) -> None:
        self.jobs: list[Job] = []
        self._rows = Rows(decoder, capacity, most, varying)
        self._chosen: list[int] = []

    def join(self, prompt: Prompt, token: int) -> None:
        """Take over a job whose prompt is in, and who chose `token` behind it."""
        self._rows.join(prompt.cache, len(prompt.job.prompt), prompt.job.vectors)
        self.jobs.append(prompt.job)
        self._chosen.append(token)

    def step(self) -> None:
        self._drop()
        if not self.jobs:
            return
        logits = self._rows.feed(self._chosen)
        self._chosen = [job.take(row) for job, row in zip(self.jobs, logits, strict=True)]
        self._drop()

    def _drop(self) -> None:
        for place in reversed(range(len(self.jobs))):
            if is_over(self.jobs[place]):
                self._rows.leave(place)
                self.jobs[place], self._chosen[place] = self.jobs[-1], self._chosen[-1]
                del self.jobs[-1], self._chosen[-1]


class Alone:
    """A job whose rotary embedding depends on how long its own text is, in a batch of one."""

    def __init__(self, prompt: Prompt) -> None:
        self.jobs = [prompt.job]
        self._steps = prompt.steps

    def step(self) -> None:
        (job,) = self.jobs
        if not is_over(job):
            job.take(self._steps.append(job.seen))
        if is_over(job):
            self.jobs = []


def is_over(job: Job) -> bool:
    """Whether no more is wanted of a job."""
    return job.cancelled or job.finish is not None
