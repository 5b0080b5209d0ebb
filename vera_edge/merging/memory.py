"""How much memory a merge takes, from its plan alone, and how many units fit in what it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vera_edge import formats
from vera_edge.errors import PlanError
from vera_edge.merging.delta import piece_rows
from vera_edge.merging.measure import measured_rows
from vera_edge.merging.units import Linear, MergeUnit
from vera_edge.merging.work import MergeJob
from vera_edge.parallel import Engine
from vera_edge.storage.shards import nbytes

_PROCESS = 96 << 20  # Python, numpy and what vera-edge imports, measured with some to spare
_COMPILER = 240 << 20  # numba and LLVM while they compile, alike
_PIECES = 16 << 20  # what is worked on piece by piece (formats.CHUNK_VALUES)
ROOM = 1 << 30


@dataclass(frozen=True)
class Resources:
    """Where a merge runs. max_memory: bytes that it may take, on all of its machines; None for no limit."""

    engine: Engine
    max_memory: int | None = None

    @property
    def in_flight(self) -> int | None:
        """Units at once, at most; None when the cluster decides."""
        return None if self.engine.kind == "ray" else self.engine.workers


ONE_PROCESS = Resources(Engine())


def may_compile(resources: Resources) -> bool:
    """Whether the memory that is allowed is no less than a merge takes by itself, so that the compiler of its
    loops, which only saves time, has room in it."""
    return resources.max_memory is None or resources.max_memory >= ROOM


def unit_peak(job: MergeJob, unit: MergeUnit) -> int:
    """Bytes a unit takes at its peak: what it reads, what it gives, and pieces."""
    making = job.model.checkpoint.making(unit.names)
    if not isinstance(unit, Linear):
        return (
            making + _PIECES + sum(tensor.data.nbytes for tensor in [getattr(unit, "tensor", None)] if tensor)
        )
    stored = sum(job.model.checkpoint.tensors[name].nbytes for name in unit.names)
    result = sum(nbytes(*entry) for entry in unit.layout.values())
    step, values = unit.step, math.prod(unit.step.shape)
    measured = sum(stop - start for start, stop in measured_rows(step.shape).items())
    taken = stored + result + 4 * (measured + piece_rows(step.shape, 1)) * step.shape[1]
    if step.action == "merge":
        taken += 4 * max((adapter.rank for adapter, _ in job.model.adapters), default=0) * step.shape[1]
        if not all(adapter.adds for adapter, _ in job.model.adapters):
            taken += 12 * values  # the base's weight and the merged one, and what PEFT's layer makes between
    if step.module in job.requantized:
        taken += 3 * values
    elif not hasattr(formats.get(step.result), "rounder"):
        taken += 4 * values
        if hasattr(formats.get(step.result), "pack"):
            taken += 6 * values  # AWQ, the hungriest: codes, in the order it packs them, and what they mean
    return making + taken + _PIECES


def process_size(job: MergeJob) -> int:
    """Bytes a process takes before it does a unit: the program, the projections and the adapters."""
    projections = job.model.projections
    shared = 0 if projections is None else 4 * projections.spec.elements
    vectors = sum(change.nbytes for adapter, _ in job.model.adapters for change in adapter.vectors.values())
    tensors = sum(
        tensor.data.nbytes for adapter, _ in job.model.adapters for tensor in adapter.modules_to_save.values()
    )
    program = _PROCESS + (_COMPILER if job.compiles else 0)
    return program + shared + vectors + tensors


def allowed_workers(jobs: Sequence[MergeJob], resources: Resources) -> int | None:
    """How many units may be at work at once, for all to fit in the memory that is allowed; None for any.

    Where nothing is said of memory, workers of this process take no more than `ROOM`, if they are several.
    Raises PlanError when not even one unit fits.
    """
    workers, limit = resources.in_flight, resources.max_memory
    if limit is None and workers is None:
        return None
    fixed = max(process_size(job) for job in jobs)
    largest, name = max((unit_peak(job, unit), next(iter(unit.layout))) for job in jobs for unit in job.units)
    if limit is not None and fixed + largest > limit:
        raise PlanError(
            f"--max-memory allows {limit / 1e6:,.0f} MB, and {name} alone takes "
            f"{(fixed + largest) / 1e6:,.0f} MB; allow that much or choose a smaller format with --to"
        )
    each = largest if resources.engine.kind == "local" else fixed + largest
    fit = max(1, ((ROOM if limit is None else limit) - fixed) // each)
    return fit if workers is None else min(workers, fit)
