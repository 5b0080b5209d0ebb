"""What int8 layers read: rounded at each run or to a range that text gave, large channels levelled first.

A tensor has one scale for all its channels, and some channels of an encoder are ten times the others, which
leaves those few codes. W x = (W diag(s)) (x / s) for any s: so the large channels are divided by s, and the
columns of the weight, where each row has a scale of its own, are multiplied by it.
Source: Xiao et al., SmoothQuant, https://arxiv.org/abs/2211.10438; s here looks at x alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.formats.bnb8 import Int8Weight
from vera_edge.plans.int8 import INT8_QDQ, int8_form
from vera_edge.plans.plan import FLOAT, Step
from vera_edge_onnx.graph.parts import Part
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.weights import qdq

# Of 0.4 to 0.8 this lost least on MiniLM, dynamic and static.
_EXPONENT = 0.7


@dataclass(frozen=True, eq=False)
class Seen:
    """The least and the greatest value of each channel of an activation, (in,) float32 each."""

    low: Float32
    high: Float32

    def with_values(self, values: Float32) -> Seen:
        """What was seen before, and `values` (..., in)."""
        rows = values.reshape(-1, values.shape[-1])
        return Seen(np.minimum(self.low, rows.min(axis=0)), np.maximum(self.high, rows.max(axis=0)))

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    def levels(self) -> Float32:
        """What to divide each channel by: 1 up to the median of their magnitudes, beyond it a power of the
        ratio. None is multiplied, so a channel that the text left alone can't grow past the others."""
        reach = np.maximum(np.abs(self.low), np.abs(self.high))
        middle = np.median(reach)
        if middle == 0:
            return np.ones_like(reach)
        ratio = reach.astype(np.float64) / middle  # which float32 may not hold
        levels = np.minimum(np.maximum(ratio, 1) ** _EXPONENT, np.finfo(np.float32).max)
        found: Float32 = levels.astype(np.float32)
        return found

    def span(self, levels: Float32 | None) -> qdq.Span:
        """The range of all channels, divided by their levels."""
        divisors = np.float32(1) if levels is None else levels
        return qdq.Span(float((self.low / divisors).min()), float((self.high / divisors).max()))


def kind_of(site: Site, steps: Mapping[str, Step]) -> str:
    """What a site's int8 rows read, "dynamic" or "static"; "float" when its weight isn't in rows."""
    here = [steps[part.module] for part in site.parts]
    kinds = {step.activations if int8_form(step, graph=True) == INT8_QDQ else FLOAT for step in here}
    return kinds.pop() if len(kinds) == 1 else FLOAT


def fixed(request: ExportRequest, sites: Sequence[Site], steps: Mapping[str, Step]) -> frozenset[str]:
    """The activations, by name, that a layer reads whose codes are there already: they can't be levelled."""
    return frozenset(
        site.input.name or ""
        for site in sites
        for part in site.parts
        if kind_of(site, steps) != FLOAT and (part.module in request.requantized or steps[part.module].copies)
    )


def linear(
    request: ExportRequest,
    parts: Sequence[tuple[Part, Float32]],
    steps: Mapping[str, Step],
    kind: str,
    seen: Seen | None,
    level: bool,
) -> qdq.Dynamic | qdq.Static:
    """A site's weight as int8 rows, and how x is rounded for them.

    parts: each with its rows (rows, in). kind: "dynamic" or "static". seen: of x, where it was calibrated.
    """
    levels = seen.levels() if level and seen is not None else None
    rows = qdq.RowCodes.stacked(
        [_rows(request, steps[part.module], part, rows, levels) for part, rows in parts]
    )
    if kind == "dynamic":
        return qdq.Dynamic(rows, levels)
    assert seen is not None
    return qdq.Static(rows, levels, seen.span(levels))


def _rows(
    request: ExportRequest, step: Step, part: Part, rows: Float32, levels: Float32 | None
) -> qdq.RowCodes:
    """A part's codes with a scale for each row: its own where it has some, on LLM.int8's grid."""
    codes = request.requantized.get(step.module)
    if codes is None and not step.copies:
        return qdq.RowCodes.fitting(rows if levels is None else rows * levels)
    made = request.model.checkpoint.load(step.module) if codes is None else codes.bnb8()
    assert isinstance(made, Int8Weight)
    return qdq.RowCodes.of(
        [Int8Weight(made.codes[part.start : part.stop], made.scales[part.start : part.stop])]
    )
