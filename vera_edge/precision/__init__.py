"""Automatic precision: the formats that lose least within a size, or take least within a loss.

request   what is asked
trained   the model that weights are exchanged in
changes   a model with weights exchanged, and what linears read rounded
replay    the model's KL with one unit exchanged, or with all of them
streamed_replay  the same of a model that is read layer by layer
codes     every module rounded to every format
units     what is chosen for: bytes and sensitivity of every unit in every format
sizes     bytes of a layer in a format
latency   its time in a format, on this machine
knapsack  the choice among all of it, with a bound on how far from the best it can be
trial     a plan exported, weighed and run
solver    the knapsack solved, tried out, and solved again with what that showed
choose    all of these in turn
choice    what was found
"""

from __future__ import annotations

from vera_edge.device.check.products import FORMATS
from vera_edge.precision.request import TARGETS, PlanRequest, parse_ratio

__all__ = ["FORMATS", "TARGETS", "PlanRequest", "parse_ratio"]
