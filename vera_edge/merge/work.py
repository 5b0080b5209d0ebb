"""One unit of a merge as a worker does it: read, compute, write to its place, and say what it wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from vera_edge import __version__
from vera_edge.adapter import Adapter
from vera_edge.checkpoint import Checkpoint
from vera_edge.files import canonical_json, output_error, sha256_bytes
from vera_edge.merge.cutting import cut
from vera_edge.merge.journal import Done
from vera_edge.merge.units import Unit
from vera_edge.plan import Plan
from vera_edge.projection import Projections
from vera_edge.requantize import Codes
from vera_edge.requantize.gram import one_blas_thread
from vera_edge.shards import Shards, nbytes


@dataclass(frozen=True, eq=False)
class Job:
    """A merge, as its workers need it. Pickled, it carries the base's path, and a worker opens that once.

    folder: where the shards are, made already. max_shard_bytes: as for `Shards`.
    """

    key: str
    plan: Plan
    checkpoint: Checkpoint
    adapters: Sequence[tuple[Adapter, float]]
    projections: Projections
    requantized: Mapping[str, Codes]
    folder: Path
    max_shard_bytes: int

    @cached_property
    def _cut(self) -> tuple[list[Unit], bool]:
        return cut(self.plan, self.checkpoint, self.adapters, self.projections, self.requantized)

    @property
    def units(self) -> list[Unit]:
        """The units, in the order in which the base's files hold what they read."""
        return self._cut[0]

    @property
    def untied(self) -> bool:
        """Whether the output head is untied from the embedding by this merge."""
        return self._cut[1]

    @cached_property
    def shards(self) -> Shards:
        """The files to write."""
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        for unit in self.units:
            layout |= unit.layout
        return Shards(self.folder, layout, self.max_shard_bytes)

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes that each unit gives."""
        return [sum(nbytes(*entry) for entry in unit.layout.values()) for unit in self.units]

    def __reduce__(self) -> tuple[Any, ...]:
        facts = (self.plan.to_dict(), self.checkpoint.path.absolute(), self.adapters, self.projections)
        return _reopen, (self.key, *facts, self.requantized, self.folder, self.max_shard_bytes)


_reopened: dict[tuple[str, Path], Job] = {}  # in a worker: the job it works on, or did last


def _reopen(key: str, plan: Mapping[str, Any], base: Path, *facts: Any) -> Job:
    held = (key, facts[-2])
    if held not in _reopened:
        _reopened.clear()
        _reopened[held] = Job(key, Plan.from_dict(plan), Checkpoint.open(base), *facts)
    return _reopened[held]


def key_of(plan: Plan, checkpoint: Checkpoint, requantized: Mapping[str, Codes], max_shard_bytes: int) -> str:
    """Hex SHA-256 of all that decides the bytes: two merges of one key write the same.

    Reads the base (`Checkpoint.digest`) and the codes. The plan holds the adapters' digests and weights.
    """
    codes = {module: _codes_digest(requantized[module]) for module in requantized}
    facts = [plan.to_dict(), checkpoint.digest, codes, max_shard_bytes, __version__]
    return sha256_bytes(canonical_json(facts))


def _codes_digest(codes: Codes) -> str:
    arrays: list[npt.NDArray[Any] | None] = [codes.codes, codes.scales, codes.zeros]
    if codes.nested is not None:
        arrays += [codes.nested.codes, codes.nested.scales]
    parts = [None if array is None else sha256_bytes(array.tobytes()) for array in arrays]
    return sha256_bytes(canonical_json([*parts, codes.nested and float(codes.nested.offset)]))


def do_unit(job: Job, number: int) -> Done:
    """Do one unit and write what it gives. Safe to do again, and to be killed in.

    Raises as units do, and OutputError when the disk refuses.
    """
    _read_ahead(job, number + 1)
    digests, layer = {}, None
    with one_blas_thread():
        for result in job.units[number].run():
            for name, tensor in result.tensors.items():
                try:
                    job.shards.put(name, tensor)
                except OSError as cause:
                    raise output_error(job.folder, cause) from cause
                digests[name] = sha256_bytes(tensor.data.data)
            layer = result.layer or layer
    return Done(number, digest_of(digests), layer)


def is_there(job: Job, done: Done) -> bool:
    """Whether the files hold what a unit is said to have written."""
    names = job.units[done.unit].layout if done.unit < len(job.units) else {}
    try:
        return digest_of({name: job.shards.digest(name) for name in names}) == done.digest
    except OSError:
        return False


def digest_of(tensors: Mapping[str, str]) -> str:
    """Hex SHA-256 over tensors' names and the SHA-256 of their bytes."""
    return sha256_bytes(canonical_json(dict(tensors)))


def _read_ahead(job: Job, number: int) -> None:
    """Ask the system to fetch what a unit reads while another one computes."""
    if number >= len(job.units) or not hasattr(os, "posix_fadvise"):
        return
    for name in job.units[number].names:
        info = job.checkpoint.tensors[name]
        try:
            with info.file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # advice only: what is really wrong with the file, reading it will say
