"""Where work runs: in this process, in several, or on a Ray cluster, with the same results from each.

A piece of work is a top-level function and one picklable argument. It must write whole outputs or none, and
be safe to run again: that is what makes a lost worker a matter of time, not of data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal, TypeVar, get_args

from vera_edge.errors import PlanError, VeraEdgeError

T = TypeVar("T")
R = TypeVar("R")
Kind = Literal["local", "ray"]
_TRIES = 3


@dataclass(frozen=True)
class Engine:
    """`kind`: "local" or "ray". `workers`: processes at once (local); 1 works in this process.

    `address`: of a Ray cluster that exists; None starts one on this machine for the time of the work.

    Raises PlanError when the kind isn't known or `workers` isn't positive.
    """

    kind: str = "local"
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PlanError(f"engine {self.kind!r} isn't known; choose from {', '.join(get_args(Kind))}")
        if self.workers < 1:
            raise PlanError(f"{self.workers} workers can't work; give 1 or more")

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """`work(item)` for every item; yields (index, result) as they finish, in any order.

        An error that `work` raises passes through and ends the rest. A worker that dies is replaced and its
        item done again, up to three times; then VeraEdgeError.
        """
        if self.kind == "ray":
            return _on_ray(work, items, self.address)
        if self.workers == 1 or len(items) < 2:
            return ((index, work(item)) for index, item in enumerate(items))
        return _in_processes(work, items, self.workers)


def _in_processes(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    waiting = list(range(len(items)))
    for _ in range(_TRIES):
        # Forking a process that has threads (BLAS, ONNX Runtime) can hang the child.
        with ProcessPoolExecutor(min(workers, len(waiting)), mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(work, items[index]): index for index in waiting}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    waiting.remove(futures[future])
                    yield futures[future], result
            except BrokenProcessPool:
                continue
        return
    raise VeraEdgeError(f"a worker process died {_TRIES} times over; is the machine short of memory?")


def _on_ray(work: Callable[[T], R], items: Sequence[T], address: str | None) -> Iterator[tuple[int, R]]:
    import ray

    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except ConnectionError as cause:
            raise PlanError(f"no Ray cluster answers at {address}: {cause}") from None
    try:
        yield from _collect(ray, work, items)
    finally:
        if started:
            ray.shutdown()


def _collect(ray: Any, work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    remote = ray.remote(max_retries=_TRIES)(work)
    waiting = {remote.remote(item): index for index, item in enumerate(items)}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        for reference in done:
            index = waiting.pop(reference)
            try:
                yield index, ray.get(reference)
            except ray.exceptions.RayTaskError as cause:
                if isinstance(cause.cause, VeraEdgeError):
                    raise cause.cause from None
                raise
            except ray.exceptions.RayError as cause:
                raise VeraEdgeError(f"the Ray cluster lost item {index} for good: {cause}") from None
