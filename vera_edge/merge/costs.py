"""What a merge will read and write, and about how long it takes: from the plan, and one unit tried."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from vera_edge.adapter import Adapter
from vera_edge.checkpoint import Checkpoint
from vera_edge.files import sha256_bytes
from vera_edge.merge.memory import process_size, unit_peak
from vera_edge.merge.units import Copy, Unit
from vera_edge.merge.work import Job
from vera_edge.plan import Plan
from vera_edge.projection import Projections
from vera_edge.requantize.gram import one_blas_thread
from vera_edge.shards import MAX_SHARD_BYTES


@dataclass(frozen=True)
class Estimate:
    """reads, writes: bytes. memory: bytes of one process at its peak, as `--max-memory` counts them.

    seconds: for one process on this machine, by the time that one layer took, rounded to nearest; calibration
    and waiting for a disk slower than the processor come on top.
    """

    reads: int
    writes: int
    memory: int
    seconds: float


def estimate(
    plan: Plan,
    checkpoint: Checkpoint,
    adapters: tuple[tuple[Adapter, float], ...],
    projections: Projections,
) -> Estimate:
    """Estimate the merge that `plan` says; computes one layer of middling size and writes nothing."""
    job = Job("", plan, checkpoint, adapters, projections, {}, Path(), MAX_SHARD_BYTES)
    base = sum(info.nbytes for info in checkpoint.tensors.values())
    read = {id(unit): sum(checkpoint.tensors[name].nbytes for name in unit.names) for unit in job.units}
    computed = sorted((unit for unit in job.units if not isinstance(unit, Copy)), key=lambda u: read[id(u)])
    copied = base + sum(read[id(unit)] for unit in job.units if isinstance(unit, Copy))
    seconds = 0.0
    if computed:
        sample = computed[len(computed) // 2]
        share = sum(read[id(unit)] for unit in computed) / max(1, read[id(sample)])
        seconds += _time(sample) * share
        largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
        begun = time.perf_counter()
        sha256_bytes(checkpoint.tensors.read(largest.name).data.data)
        seconds += (time.perf_counter() - begun) * copied / max(1, largest.nbytes)
    return Estimate(
        reads=base + sum(read.values()),
        writes=job.shards.total,
        memory=process_size(job) + max((unit_peak(job, unit) for unit in job.units), default=0),
        seconds=seconds,
    )


def _time(unit: Unit) -> float:
    begun = time.perf_counter()
    with one_blas_thread():
        for result in unit.run():
            for tensor in result.tensors.values():
                sha256_bytes(tensor.data.data)
    return time.perf_counter() - begun
