"""The float32 model that a graph is drawn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.merging.computed import open_computed
from vera_edge.plans import plan as plans
from vera_edge.trained.trained_model import TrainedModel


def write(request: ExportRequest, folder: Path) -> Checkpoint:
    """Write to `folder`, if it isn't there, the model in float32: merged as the plan says, or the base."""
    model = _summed(request)
    if not folder.is_dir():
        merge.write(plans.plan_model(model, "merged", "fp32"), model, folder, request.progress)
    return Checkpoint.open(folder)


def computed(request: ExportRequest, folder: Path) -> Checkpoint:
    """The same model, its weights computed when they're read: `folder` gets the other files alone."""
    model = _summed(request)
    return open_computed(plans.plan_model(model, "merged", "fp32"), model, folder)


def _summed(request: ExportRequest) -> TrainedModel:
    return request.model if request.plan.mode == "merged" else replace(request.model, adapters=())
