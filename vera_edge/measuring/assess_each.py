"""Drift of many artefacts: here beside each other, or each by itself on any machine of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vera_edge.measuring.assess import DriftRequest, assess_any, assess_together
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport
from vera_edge.parallel import Engine
from vera_edge.progress import Progress, silent
from vera_edge.text import windows


def assess_several(
    request: DriftRequest, artefacts: Sequence[Path], engine: Engine, progress: Progress = silent
) -> Sequence[DriftReport | EncoderReport]:
    """The reports of artefacts of one model, in their order; `request.candidate` is any of them.

    Here the reference is run once for all. On a cluster every artefact is a task that runs the reference too,
    so that a machine that is lost costs its own alone. The reports are the same.
    """
    if engine.kind != "ray":
        return assess_together(request, artefacts, progress)
    requests, found = [replace(request, candidate=path) for path in artefacts], {}
    progress("measuring on the cluster", 0, len(requests))
    for index, report in assess_each(requests, engine):
        found[index] = report
        progress("measuring on the cluster", len(found), len(requests))
    return [found[index] for index in range(len(requests))]


def assess_each(
    requests: Sequence[DriftRequest], engine: Engine | None = None
) -> Iterator[tuple[int, DriftReport | EncoderReport]]:
    """`assess_any` of every request; yields (index, report) as they are measured, in any order.

    A worker that dies costs its own measurement, which is done again. On a cluster the folders lie on a disk
    that all machines share, and each measurement has a machine for itself. Raises as `assess_any` does for
    the first request that is at fault.
    """
    absolute = [_absolute(request) for request in requests]  # a worker may stand elsewhere
    return (engine or Engine()).map_with(_assess, None, absolute, whole_machine=True)


def _assess(shared: None, request: DriftRequest) -> DriftReport | EncoderReport:
    return assess_any(request)


def _absolute(request: DriftRequest) -> DriftRequest:
    def whole(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    data = request.data
    return replace(
        request,
        data=data if data == windows.BUILT_IN else str(Path(data).absolute()),
        reference=request.reference.absolute(),
        candidate=request.candidate.absolute(),
        base=whole(request.base),
        adapters=tuple((path.absolute(), weight) for path, weight in request.adapters),
        tokenizer=whole(request.tokenizer),
    )
