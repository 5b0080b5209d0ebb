"""The thread that generates all texts: new prompts chunk by chunk, and between chunks a step for every row.

So a long prompt doesn't hold up those who read already, and a request joins the batch as soon as its prompt
is in. Rows of different adapters step together where the graph's vectors have a batch axis, as those of our
exports do; in other graphs the rows of each adapter do, adapter after adapter, token by token.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial

from vera_edge.device.runtime.decoding import Decoder
from vera_edge.device.runtime.prompt_cache import PromptCache
from vera_edge.device.runtime.rows import bytes_per_token, takes_rows
from vera_edge.errors import BundleError, PlanError, VeraEdgeError
from vera_edge.memory import free_memory
from vera_edge.serving.job import Job
from vera_edge.serving.lanes import Alone, Lane, Prompt, Together, is_over
from vera_edge.serving.settings import LONGEST, Settings

_SHARE = 0.9  # of the free memory that the caches may take


class BatchEngine:
    """Generates the texts of jobs, at most `settings.rows` at once. context: tokens that a text may have."""

    def __init__(self, decoder: Decoder, settings: Settings, earlier: PromptCache | None = None) -> None:
        """earlier: what prompts began with before; None computes all of each.

        Raises PlanError when so many rows of such a length can't fit into memory.
        """
        self._decoder, self._settings = decoder, settings
        self._earlier = earlier or PromptCache(0)
        self.context = min(decoder.context, settings.context or LONGEST)
        self._check_memory()
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._ended = False
        self._prompts: deque[Prompt] = deque()
        self._lanes: dict[object, Lane] = {}
        self._thread = threading.Thread(target=self._run, name="vera-edge generation", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job behind those that wait. From any thread."""
        with self._wake:
            self._waiting.append(job)
            self._wake.notify()

    def stop(self) -> None:
        """End after the step that runs now; what isn't finished is dropped."""
        with self._wake:
            self._ended = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def running(self) -> int:
        """Jobs that hold a row now."""
        return len(self._prompts) + sum(len(lane.jobs) for lane in list(self._lanes.values()))

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._ended and not self._waiting and not self._prompts and not self._lanes:
                    self._wake.wait()
                if self._ended:
                    return
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                coming = [self._waiting.popleft() for _ in range(self._free_rows()) if self._waiting]
            for job in coming:
                self._guarded([job], partial(self._begin, job))
            self._feed_prompt()
            for key, lane in list(self._lanes.items()):
                if not self._guarded(lane.jobs, lane.step) or not lane.jobs:
                    del self._lanes[key]  # and its cache: memory goes back when nobody asks

    def _free_rows(self) -> int:
        return max(0, self._settings.rows - self.running)

    def _begin(self, job: Job) -> None:
        rope = self._decoder.rope
        alone = rope is not None and job.capacity > rope.length
        self._prompts.append(Prompt(self._decoder, job, alone, self._earlier))

    def _feed_prompt(self) -> None:
        """Feed one chunk of the prompt that came first."""
        self._prompts = deque(prompt for prompt in self._prompts if not prompt.job.cancelled)
        if self._prompts:
            prompt = self._prompts[0]
            if not self._guarded([prompt.job], lambda: self._advance(prompt)):
                self._prompts.remove(prompt)

    def _advance(self, prompt: Prompt) -> None:
        logits = prompt.feed()
        if logits is None:
            return
        token = prompt.job.take(logits)
        if not is_over(prompt.job):
            self._join(prompt, token)
        self._prompts.remove(prompt)

    def _join(self, prompt: Prompt, token: int) -> None:
        if prompt.alone:
            self._lanes[prompt.job] = Alone(prompt)
            return
        key = "rows" if takes_rows(self._decoder) else id(prompt.job.vectors)
        lane = self._lanes.get(key)
        if not isinstance(lane, Together):
            lane = Together(self._decoder, self.context, self._settings.rows, self._settings.varying)
            self._lanes[key] = lane
        lane.join(prompt, token)

    def _guarded(self, jobs: list[Job], work: Callable[[], object]) -> bool:
        """Do `work`; whether it went well. What it raises ends these jobs, and never the thread."""
        involved = list(jobs)
        try:
            work()
        except VeraEdgeError as cause:
            error: VeraEdgeError = cause
        except MemoryError:
            error = BundleError("memory ran out; try again later, or with a shorter text")
        except Exception:  # a bug: told to who runs the server, and to the client that it is one
            traceback.print_exc()
            error = BundleError("the server failed on this request; its log says how")
        else:
            return True
        for job in involved:
            if not is_over(job):
                job.fail(error)
        return False

    def _check_memory(self) -> None:
        needed = self._settings.rows * self.context * bytes_per_token(self._decoder) + self._earlier.limit
        free = free_memory()
        if free is not None and needed > free * _SHARE:
            raise PlanError(
                f"{self._settings.rows} rows of {self.context} tokens may take {needed / 1e6:.0f} MB and "
                f"there are {free / 1e6:.0f} MB for this process; ask for fewer rows or a shorter context"
            )
