"""Automatic precision: the formats that lose least within a size, or take least within a loss.

request   what is asked
codes     every unit rounded to every format, its bytes and its sensitivity
replay    the sensitivity: the model's KL with one unit exchanged
sizes     bytes of a layer in a format
knapsack  the choice among all of it, with a bound on how far from the best it can be
trial     a plan exported, weighed and run
choose    all of these in turn
choice    what was found
"""

from __future__ import annotations

from vera_edge.precision.request import FORMATS, TARGETS, Request, parse_size

__all__ = ["FORMATS", "TARGETS", "Request", "parse_size"]
