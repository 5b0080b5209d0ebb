"""Merging: `W' = dequantize(W) + sum_i weight_i * delta_i` in float32, then stored as asked.

What is read are the checkpoint's bytes, never a live bitsandbytes parameter, which repacks itself at its
first use.
"""

from __future__ import annotations

from vera_edge.merging.costs import MergeCost
from vera_edge.merging.executor import Merge, check_plan, merged_weight, write, write_each
from vera_edge.merging.measure import Survival
from vera_edge.merging.memory import ONE_PROCESS, Resources
from vera_edge.merging.prepare import (
    Prepared,
    estimate,
    perform,
    prepare,
    prepare_base,
    prepare_each,
    to_folder,
)
from vera_edge.merging.report import LayerReport, MergeReport

__all__ = [
    "ONE_PROCESS",
    "LayerReport",
    "Merge",
    "MergeCost",
    "MergeReport",
    "Prepared",
    "Resources",
    "Survival",
    "check_plan",
    "estimate",
    "merged_weight",
    "perform",
    "prepare",
    "prepare_base",
    "prepare_each",
    "to_folder",
    "write",
    "write_each",
]
