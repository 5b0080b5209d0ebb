"""Drift of many artefacts, each measured on any worker: one after the other here, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vera_edge.measuring.assess import DriftRequest, assess_any
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport
from vera_edge.parallel import Engine
from vera_edge.text import windows


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
