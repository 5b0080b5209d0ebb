"""One unit of a merge as a worker does it: read, compute, write to its place, and say what it wrote."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy.typing as npt

from vera_edge import __version__
from vera_edge.adapters.adapter import WeightedAdapter
from vera_edge.adapters.projection import Projections
from vera_edge.arrays import Bytes
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.overlay import Overlay
from vera_edge.base.trained_as import TrainedAs
from vera_edge.formats import compiled
from vera_edge.merging.cutting import cut
from vera_edge.merging.journal import Done
from vera_edge.merging.units import Linear, MergeUnit
from vera_edge.plans.plan import Plan
from vera_edge.requantize import Codes
from vera_edge.requantize.gram import one_blas_thread
from vera_edge.storage.files import output_error, sha256_bytes
from vera_edge.storage.json_text import canonical_json
from vera_edge.storage.shards import Shards, nbytes
from vera_edge.storage.tensors import RawTensor, WitnessedFolder
from vera_edge.trained.trained_model import TrainedModel

COMPILED_FROM = (
    1 << 29
)  # weights for which loading numba, about a second and 150 MB (240 MB where it compiles), is worth it
_AHEAD = 1 << 28  # bytes of one tensor to fetch ahead; a longer one is read in order, which the system sees


@dataclass(frozen=True, eq=False)
class MergeJob:
    """A merge, as its workers need it. Pickled, it carries the base's path, and a worker opens that once.

    folder: where the shards are, made already. max_shard_bytes: as for `Shards`. ahead: how many units are
    at work at once, so that the one after them is fetched. may_compile: whether loops over the weights may be
    compiled where they are many enough. run: what a worker knows it by.
    """

    key: str
    plan: Plan
    model: TrainedModel
    requantized: Mapping[str, Codes]
    folder: Path
    max_shard_bytes: int
    ahead: int = 1
    may_compile: bool = True
    run: str = field(default_factory=lambda: uuid4().hex)

    @cached_property
    def _cut(self) -> tuple[list[MergeUnit], bool]:
        return cut(self.plan, self.model, self.requantized)

    @property
    def units(self) -> list[MergeUnit]:
        """The units, in the order in which the base's files hold what they read."""
        return self._cut[0]

    @property
    def untied(self) -> bool:
        """Whether the output head is untied from the embedding by this merge."""
        return self._cut[1]

    @cached_property
    def compiles(self) -> bool:
        """Whether its loops are compiled, where numba is installed: the bytes are the same."""
        changed = sum(math.prod(unit.step.shape) for unit in self.units if isinstance(unit, Linear))
        return self.may_compile and changed >= COMPILED_FROM

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
        checkpoint = self.model.checkpoint
        base = _Base(checkpoint.path.absolute(), checkpoint.trained_as, checkpoint.overlay)
        adapters = (self.model.adapters, self.model.projections)
        rest = (self.requantized, self.folder, self.max_shard_bytes, self.ahead, self.may_compile)
        return _reopen, (self.run, self.key, self.plan.to_dict(), base, adapters, rest)


class _Base(NamedTuple):
    """What opens a checkpoint again in another process."""

    path: Path
    trained_as: TrainedAs | None
    overlay: Overlay | None

    def open(self) -> Checkpoint:
        checkpoint = Checkpoint.open(self.path, self.trained_as)
        return checkpoint if self.overlay is None else checkpoint.overlaid(self.overlay)


_reopened: dict[str, MergeJob] = {}  # in a worker: the jobs it works on
_HELD = 64


def _reopen(
    run: str,
    key: str,
    plan: Mapping[str, Any],
    base: _Base,
    adapters: tuple[tuple[WeightedAdapter, ...], Projections | None],
    rest: tuple[Mapping[str, Codes], Path, int, int, bool],
) -> MergeJob:
    if run not in _reopened:
        while len(_reopened) >= _HELD:
            _reopened.pop(next(iter(_reopened)))
        _reopened[run] = MergeJob(key, Plan.from_dict(plan), TrainedModel(base.open(), *adapters), *rest)
    return _reopened[run]


def key_of(plan: Plan, requantized: Mapping[str, Codes], max_shard_bytes: int) -> str:
    """Hex SHA-256 of what decides the bytes, but for the base's own: two merges of one key and one base
    write the same.

    The plan holds the digests of the base's layout and of the adapters, and their weights. Reads the codes.
    """
    codes = {module: _codes_digest(requantized[module]) for module in requantized}
    return sha256_bytes(canonical_json([plan.to_dict(), codes, max_shard_bytes, __version__]))


def _codes_digest(codes: Codes) -> str:
    arrays: list[npt.NDArray[Any] | None] = [codes.codes, codes.scales, codes.zeros]
    if codes.nested is not None:
        arrays += [codes.nested.codes, codes.nested.scales]
    parts = [None if array is None else sha256_bytes(array.tobytes()) for array in arrays]
    return sha256_bytes(canonical_json([*parts, codes.nested and float(codes.nested.offset)]))


class _Written:
    """Puts tensors in their place in the shards; `checksums` is the CRC-32 of each.

    It tells a run that goes on from here what didn't reach the disk, and nothing else: no digest, which takes
    more than twice the time.
    """

    def __init__(self, job: MergeJob) -> None:
        self._job = job
        self.checksums: dict[str, int] = {}

    def put(self, name: str, tensor: RawTensor) -> None:
        """A whole tensor."""
        self._job.shards.check(name, tensor)
        self.stream(name, [tensor.data])

    def stream(self, name: str, pieces: Iterable[Bytes]) -> None:
        """A tensor piece by piece."""
        state = offset = 0
        for piece in pieces:
            try:
                self._job.shards.put_bytes(name, offset, piece)
            except OSError as cause:
                raise output_error(self._job.folder, cause) from cause
            state = zlib.crc32(piece.data, state)
            offset += piece.size
        if offset != nbytes(*self._job.shards.layout[name]):
            raise ValueError(f"{name} has fewer bytes than were announced")
        self.checksums[name] = state


def do_unit(job: MergeJob, number: int) -> Done:
    """Do one unit and write what it gives. Safe to do again, to be killed in, and beside others in threads.

    Raises as units do, and OutputError when the disk refuses.
    """
    if job.compiles:
        compiled.start()
    _read_ahead(job, number + job.ahead)
    read, written = WitnessedFolder(job.model.checkpoint.tensors), _Written(job)
    with one_blas_thread():
        layer = job.units[number].run(read, written)
    for name in job.units[number].names:
        if name not in read.digests:  # a part that was read when the base was opened
            read.read(name)
    return Done(number, digest_of(written.checksums), read.digests, layer)


def is_there(job: MergeJob, done: Done) -> bool:
    """Whether the files hold what a unit is said to have written, made of what the base holds now."""
    unit = job.units[done.unit] if done.unit < len(job.units) else None
    if unit is None or set(done.read) != set(unit.names):
        return False
    try:
        written = digest_of({name: job.shards.checksum(name) for name in unit.layout})
    except OSError:
        return False
    return written == done.digest and job.model.checkpoint.tensor_digests(done.read) == done.read


def digest_of(tensors: Mapping[str, int]) -> str:
    """Hex SHA-256 over tensors' names and the CRC-32 of their bytes."""
    return sha256_bytes(canonical_json(dict(tensors)))


def _read_ahead(job: MergeJob, number: int) -> None:
    """Ask the system to fetch what a unit reads while another one computes."""
    if number >= len(job.units) or not hasattr(os, "posix_fadvise"):
        return
    for name in job.units[number].names:
        info = job.model.checkpoint.tensors[name]
        try:
            with info.file.open("rb") as stream:
                os.posix_fadvise(
                    stream.fileno(), info.start, min(info.nbytes, _AHEAD), os.POSIX_FADV_WILLNEED
                )
        except OSError:
            return  # advice only: what is really wrong with the file, reading it will say
