"""How much memory a merge takes, from its plan alone, and how many units fit in what it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vera_edge import formats
from vera_edge.engine import Engine
from vera_edge.errors import PlanError
from vera_edge.merge.units import Copy, Linear, Unit
from vera_edge.merge.work import Job
from vera_edge.shards import nbytes

_PROCESS = 96 << 20  # Python, numpy and what vera-edge imports, measured with some to spare
_PIECES = 24 << 20  # what is worked on piece by piece, a piece being 1 MiB of float32 (formats.CHUNK_VALUES)


@dataclass(frozen=True)
class Resources:
    """Where a merge runs. max_memory: bytes that its processes together may take; None for any."""

    engine: Engine
    max_memory: int | None = None

    @property
    def in_flight(self) -> int | None:
        """Units at once, at most; None when the cluster decides."""
        return None if self.engine.kind == "ray" else self.engine.workers


ONE_PROCESS = Resources(Engine())


def unit_peak(job: Job, unit: Unit) -> int:
    """Bytes a unit takes at its peak: what it reads, its float32 values, what it gives, and pieces."""
    sizes = [job.checkpoint.tensors[name].nbytes for name in unit.names]
    if isinstance(unit, Copy):
        return max(sizes, default=0) + _PIECES
    result = sum(nbytes(*entry) for entry in unit.layout.values())
    values = max(math.prod(shape) for _, shape in unit.layout.values())
    scaled = 0
    if isinstance(unit, Linear):
        values = math.prod(unit.step.shape)
        spec = job.projections.spec
        scaled = 4 * spec.rank * sum(unit.step.shape) if unit.step.action == "merge" else 0
        if hasattr(formats.get(unit.step.result), "pack"):
            scaled += 6 * values  # AWQ, the hungriest: codes, in the order it packs them, and what they mean
        if unit.step.module in job.requantized:
            scaled += 2 * values
    return sum(sizes) + 4 * values + 2 * result + scaled + _PIECES


def process_size(job: Job) -> int:
    """Bytes a process takes before it does a unit: the program, the projections and the adapters."""
    spec = job.projections.spec
    vectors = sum(
        pair.lambda_b.nbytes + pair.lambda_d.nbytes
        for adapter, _ in job.adapters
        for pair in adapter.vectors.values()
    )
    tensors = sum(
        tensor.data.nbytes for adapter, _ in job.adapters for tensor in adapter.modules_to_save.values()
    )
    return _PROCESS + 4 * spec.elements + vectors + tensors


def allowed_workers(job: Job, workers: int | None, max_memory: int | None) -> int | None:
    """How many of `workers` units may be at work at once, for all to fit in `max_memory` bytes; None for any.

    Raises PlanError when not even one fits.
    """
    if max_memory is None:
        return workers
    largest = max((unit_peak(job, unit) for unit in job.units), default=0)
    one, fixed = process_size(job) + largest, process_size(job)
    if one > max_memory:
        name = max(job.units, key=lambda unit: unit_peak(job, unit))
        raise PlanError(
            f"--max-memory allows {max_memory / 1e6:,.0f} MB, and {next(iter(name.layout))} alone takes "
            f"{one / 1e6:,.0f} MB; allow that much or choose a smaller format with --to"
        )
    # With several workers the process that leads them does no unit itself.
    fit = max(1, (max_memory - fixed) // one)
    return fit if workers is None else min(workers, fit)
