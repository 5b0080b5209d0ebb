"""How much an export writes and takes, from its plan and from one layer that is tried."""

from __future__ import annotations

import math
from dataclasses import replace

from vera_edge import merging
from vera_edge.exporting.costs import ExportCost
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.formats.blocks import stored_bytes
from vera_edge.formats.dense import is_embedding
from vera_edge.merging.prepare import Prepared
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import Step
from vera_edge.rounding.weight_rounding import BLOCK, grid_of
from vera_edge.storage.tensors import FLOATS
from vera_edge_onnx import options
from vera_edge_onnx.graph import segments
from vera_edge_onnx.weights import stored as weights

# Measured: Python with torch, transformers and ONNX Runtime; what a matrix takes beside its float32 values.
_PROCESS = 700 << 20
_BESIDE = 1.8
_BYTES = {"fp32": 4.0, "fp16": 2.0, "nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64}


def _elements(request: ExportRequest) -> int:
    """Values of the projections."""
    return 0 if request.model.projections is None else request.model.projections.spec.elements


def estimate(request: ExportRequest, timed: bool, encoder: bool) -> ExportCost:
    """What the export of a request takes; writes nothing.

    timed: also compute one layer, to tell how long it takes. encoder: compared with the whole model, and
    calibrated in a graph on the disk.
    """
    tables = _tables(request)
    sizes = [_linear(request, step) for step in request.plan.steps]
    beside = options.beside(request, encoder)
    head = [_matrix(shape, beside[options.HEAD]) for shape in tables]
    size = sum(sizes) + sum(head) + _vectors(request)
    if options.PROJECTIONS in beside:
        elements = _elements(request)
        size += int(elements * _BYTES.get(beside[options.PROJECTIONS], 1.1))
    shapes = [*(step.shape for step in request.plan.steps), *tables]
    whole, largest = 4 * sum(map(math.prod, shapes)), 4 * max(map(math.prod, shapes), default=0)
    held = max(_BESIDE * largest, 2 * min(whole, segments.MOST) + largest) + whole * encoder
    calibrated = encoder and any(step.activations != plans.FLOAT for step in request.plan.steps)
    return ExportCost(
        size=size,
        memory=int(_PROCESS + held + 4 * _elements(request)),
        disk=size + max(whole * calibrated, max([*sizes, *head], default=0)),
        seconds=_seconds(request) if timed else 0.0,
    )


def _seconds(request: ExportRequest) -> float:
    """Each weight is computed for the comparison, by the graph and by the model, and once to be stored."""
    merged = request.plan.mode == "merged"
    model = request.model if merged else replace(request.model, adapters=())
    once = merging.estimate(Prepared(model, plans.plan_model(model, "merged", "fp32"))).seconds
    return 20 + (3 if merged else 5) * once


def _linear(request: ExportRequest, step: Step) -> int:
    """Bytes of a linear's weight in the graph's files."""
    if step.copies:
        checkpoint = request.model.checkpoint
        names = checkpoint.linear(step.module).tensors.values()
        return sum(checkpoint.tensors[name].nbytes for name in names)
    kind, grid = weights.stored_as(step), grid_of(step, exported=True)
    if kind in weights.INTEGERS and grid is not None:
        return stored_bytes(step.shape, int(kind[3:]), grid.width(step.shape[1]))
    return _matrix(step.shape, kind)


def _matrix(shape: tuple[int, int], kind: str) -> int:
    if kind in weights.INTEGERS:
        return stored_bytes(shape, int(kind[3:]), BLOCK)
    return int(math.prod(shape) * _BYTES[kind])


def _tables(request: ExportRequest) -> list[tuple[int, int]]:
    """The shapes of tables of embeddings; of a head that isn't tied, a linear, the step tells."""
    infos = request.model.checkpoint.tensors
    return [
        (info.shape[0], info.shape[1])
        for name, info in infos.items()
        if len(info.shape) == 2 and info.dtype in FLOATS and is_embedding(name.removesuffix(".weight"))
    ]


def _vectors(request: ExportRequest) -> int:
    """Bytes of what isn't a matrix."""
    checkpoint = request.model.checkpoint
    return sum(
        4 * math.prod(checkpoint.tensors[name].shape)
        for name in checkpoint.other_names
        if len(checkpoint.tensors[name].shape) < 2
    )
