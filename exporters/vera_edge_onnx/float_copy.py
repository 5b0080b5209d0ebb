"""The float32 model that a graph is drawn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.exporting.target import ExportRequest
from vera_edge.plans import plan as plans


def write(request: ExportRequest, folder: Path) -> Checkpoint:
    """Write to `folder`, if it isn't there, the model in float32: merged as the plan says, or the base."""
    summed = request.model if request.plan.mode == "merged" else replace(request.model, adapters=())
    if not folder.is_dir():
        merge.write(plans.plan_model(summed, "merged", "fp32"), summed, folder, request.progress)
    return Checkpoint.open(folder)
