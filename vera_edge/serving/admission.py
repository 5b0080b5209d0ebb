"""How many requests are in the server at once: one more is sent away, and told when to come again."""

from __future__ import annotations

import math
import time
from collections import deque

from vera_edge.serving.refusal import RefusedRequestError

_LONGEST_WAIT = 30  # seconds


class Admission:
    """Counts requests from when they are taken until their answer is read. For one thread."""

    def __init__(self, most: int) -> None:
        self._most, self.inside = most, 0
        self._seconds: deque[float] = deque(maxlen=16)

    def enter(self) -> AdmittedRequest:
        """A place; raises RefusedRequestError (429) with Retry-After when there is none."""
        if self.inside >= self._most:
            # A place is free after as long as an answer takes, more or less.
            mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
            wait = min(_LONGEST_WAIT, max(1, math.ceil(mean)))
            raise RefusedRequestError(
                429,
                f"{self._most} requests are being answered or wait already; come again in {wait} s",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self.inside += 1
        return AdmittedRequest(self)

    def _left(self, seconds: float) -> None:
        self.inside -= 1
        self._seconds.append(seconds)


class AdmittedRequest:
    """A request's place in the server, until `leave`."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission
        self._since = time.monotonic()

    def leave(self) -> None:
        """Give the place back; once is enough."""
        if self._admission is not None:
            self._admission._left(time.monotonic() - self._since)
        self._admission = None
