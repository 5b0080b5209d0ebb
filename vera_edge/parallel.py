"""Where work runs: in this process, in several, or on a Ray cluster, with the same results from each.

A piece of work is a top-level function and one picklable argument. It must write whole outputs or none, and
be safe to run again: that is what makes a lost worker a matter of time, not of data.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, Literal, TypeVar, get_args

from vera_edge import import_path
from vera_edge.errors import PlanError, VeraEdgeError, WorkerError

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
EngineKind = Literal["local", "ray"]
_TRIES = 3


@dataclass(frozen=True)
class Engine:
    """`kind`: "local" or "ray". `workers`: processes or threads at once (local); 1 is this one.

    `address`: of a Ray cluster that exists; None starts one on this machine for the time of the work.

    Raises PlanError when the kind isn't known, `workers` isn't positive, or the address isn't for the kind.
    """

    kind: str = "local"
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(EngineKind):
            raise PlanError(
                f"engine {self.kind!r} isn't known; choose from {', '.join(get_args(EngineKind))}"
            )
        if self.workers < 1:
            raise PlanError(f"{self.workers} workers can't work; give 1 or more")
        if self.address is not None and self.kind != "ray":
            raise PlanError(f"{self.address} is a Ray cluster's address; it needs --engine ray")

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Generator[tuple[int, R]]:
        """`work(item)` for every item; see `map_with`."""
        return self.map_with(_alone, work, items)

    def map_with(
        self,
        work: Callable[[S, T], R],
        shared: S,
        items: Sequence[T],
        in_flight: int | None = None,
        threads: bool = False,
        whole_machine: bool = False,
    ) -> Generator[tuple[int, R]]:
        """`work(shared, item)` for every item; yields (index, result) as they finish, in any order.

        shared: sent to each worker once. in_flight: items at once, at most, on a cluster as well.
        whole_machine: on a cluster an item has as many cores as its smallest machine has, for work that
        takes all cores and much memory by itself.
        threads: local workers are threads of this process, for work that numpy and the disk do.
        An error that `work` raises passes through and ends the rest. A worker that dies is replaced and its
        item done again, up to three times; then WorkerError. Workers don't outlive this process.
        """
        if self.kind == "ray":
            return _on_ray(work, shared, items, self.address, in_flight, whole_machine)
        workers = min(self.workers, len(items), in_flight or self.workers)
        if workers <= 1:
            return ((index, work(shared, item)) for index, item in enumerate(items))
        return (_in_threads if threads else _in_processes)(work, shared, items, workers)


def _alone(work: Callable[[T], R], item: T) -> R:
    return work(item)


_held: list[Any] = []  # in a worker process: what all of its items share


def _start_worker(shared: Any) -> None:
    _held[:] = [shared]
    # An interrupt is the parent's to handle; a parent that is killed would leave its workers behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(work: Callable[[Any, T], R], item: T) -> R:
    return work(_held[0], item)


def _in_processes(
    work: Callable[[S, T], R], shared: S, items: Sequence[T], workers: int
) -> Generator[tuple[int, R]]:
    waiting = list(range(len(items)))
    for _ in range(_TRIES):
        # Forking a process that has threads (BLAS, ONNX Runtime) can hang the child.
        pool = ProcessPoolExecutor(
            min(workers, len(waiting)), get_context("spawn"), initializer=_start_worker, initargs=(shared,)
        )
        try:
            with _safe_children():  # which start here
                futures = {pool.submit(_call, work, items[index]): index for index in waiting}
            for future in as_completed(futures):
                result = future.result()
                waiting.remove(futures[future])
                yield futures[future], result
        except BrokenProcessPool:
            continue
        finally:
            pool.shutdown(cancel_futures=True)
        return
    raise WorkerError(f"a worker process died {_TRIES} times over; is the machine short of memory?")


@contextmanager
def _safe_children() -> Iterator[None]:
    """Let Python processes that start meanwhile import nothing from the folder that they start in."""
    added = import_path.child_environment()
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _in_threads(
    work: Callable[[S, T], R], shared: S, items: Sequence[T], workers: int
) -> Generator[tuple[int, R]]:
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(work, shared, item): index for index, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _on_ray(
    work: Callable[[S, T], R],
    shared: S,
    items: Sequence[T],
    address: str | None,
    in_flight: int | None,
    whole_machine: bool,
) -> Generator[tuple[int, R]]:
    try:
        import ray
    except ImportError:
        raise PlanError("the Ray engine needs the package ray; install vera-edge[ray]") from None

    with ExitStack() as held:
        if not ray.is_initialized():
            _start_ray(ray, address, held.enter_context(tempfile.TemporaryDirectory(prefix="vera-edge-ray-")))
            held.callback(ray.shutdown)
        cores = _fewest_cores(ray) if whole_machine else 1
        remote = ray.remote(max_retries=_TRIES, num_cpus=cores)(work)
        yield from _collect(ray, remote, shared, items, in_flight or len(items))


def _fewest_cores(ray: Any) -> int:
    """Cores of the cluster's smallest machine that has any to give: a task of so many runs on every one."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min((count for count in cores if count), default=1)


def _start_ray(ray: Any, address: str | None, empty: str) -> None:
    """Join the cluster at `address`, or start one. Ray's workers import from the folder it is started in
    before any other: an `empty` one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _safe_children(), chdir(empty):
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except ConnectionError as cause:
        raise PlanError(f"no Ray cluster answers at {address}: {cause}") from None


def _collect(
    ray: Any, remote: Any, shared: S, items: Sequence[T], in_flight: int
) -> Generator[tuple[int, Any]]:
    """The results of `remote`, a Ray function."""
    common = ray.put(shared)
    left = iter(enumerate(items))
    waiting: dict[Any, int] = {}
    while True:
        for index, item in islice(left, in_flight - len(waiting)):
            waiting[remote.remote(common, item)] = index
        if not waiting:
            return
        done, _ = ray.wait(list(waiting), num_returns=1)
        for reference in done:
            index = waiting.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as cause:
                if isinstance(cause.cause, VeraEdgeError):
                    raise cause.cause from None
                raise
            except ray.exceptions.RayError as cause:
                raise WorkerError(f"the Ray cluster lost item {index} for good: {cause}") from None
            yield index, result
