"""What a merge will read and write, and about how long it takes: from the plan, and one unit tried."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vera_edge.arrays import Bytes
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.merging.memory import process_size, unit_peak
from vera_edge.merging.units import Linear, MergeUnit
from vera_edge.merging.work import MergeJob
from vera_edge.plans.plan import Plan
from vera_edge.requantize.gram import one_blas_thread
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.shards import MAX_SHARD_BYTES
from vera_edge.storage.tensors import RawTensor, WitnessedFolder
from vera_edge.trained.trained_model import TrainedModel


@dataclass(frozen=True)
class MergeCost:
    """reads, writes: bytes. memory: bytes of one process at its peak, as `--max-memory` counts them.

    seconds: for one process on this machine, by the time that one layer took, rounded to nearest; calibration
    and waiting for a disk slower than the processor come on top.
    """

    reads: int
    writes: int
    memory: int
    seconds: float


def estimate(plan: Plan, model: TrainedModel) -> MergeCost:
    """Estimate the merge that `plan` says; computes one layer of middling size and writes nothing."""
    job = MergeJob("", plan, model, {}, Path(), MAX_SHARD_BYTES)
    checkpoint = model.checkpoint
    read = {id(unit): sum(checkpoint.tensors[name].nbytes for name in unit.names) for unit in job.units}
    computed = sorted((unit for unit in job.units if isinstance(unit, Linear)), key=lambda u: read[id(u)])
    others = sum(read[id(unit)] for unit in job.units if not isinstance(unit, Linear))
    seconds = 0.0
    if computed:
        sample = computed[len(computed) // 2]
        seconds += _time(sample, checkpoint) * sum(read[id(unit)] for unit in computed) / read[id(sample)]
    if others:
        seconds += _copying_time(checkpoint) * others
    return MergeCost(
        reads=sum(read.values()),
        writes=job.shards.total,
        memory=process_size(job) + max((unit_peak(job, unit) for unit in job.units), default=0),
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Nowhere:
    """Takes digests of what a unit gives, which is part of the work, and forgets it."""

    def put(self, name: str, tensor: RawTensor) -> None:
        sha256_bytes(tensor.data.data)

    def stream(self, name: str, pieces: Iterable[Bytes]) -> None:
        for piece in pieces:
            sha256_bytes(piece.data)


def _time(unit: MergeUnit, checkpoint: Checkpoint) -> float:
    begun = time.perf_counter()
    with one_blas_thread():
        unit.run(WitnessedFolder(checkpoint.tensors), _Nowhere())
    return time.perf_counter() - begun


def _copying_time(checkpoint: Checkpoint) -> float:
    """Seconds for each byte that is copied, by the first piece of the longest tensor."""
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
    begun = time.perf_counter()
    piece = next(iter(checkpoint.tensors.pieces(largest.name)))
    sha256_bytes(piece.data)
    sha256_bytes(piece.data)
    return (time.perf_counter() - begun) / max(1, piece.size)
