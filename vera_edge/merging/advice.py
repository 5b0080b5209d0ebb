"""The warning when rounding drowned the adapter, and which format would have kept it, by trying."""

from __future__ import annotations

import numpy as np

from vera_edge import formats
from vera_edge.merging.delta import Delta, merge_rows
from vera_edge.merging.measure import Survival, measure, measured_rows, total
from vera_edge.merging.report import MergeReport
from vera_edge.trained.trained_model import TrainedModel

# From small to large; the first that keeps the adapter is named.
_LADDER = ("int8", "bf16", "fp16", "fp32")
_TRIED = 6  # layers at most, spread over the drowned ones
_GOOD_NOISE = 0.5


def warning(report: MergeReport, model: TrainedModel) -> str | None:
    """One sentence when the adapter is drowned, in all layers taken as one or in most of them; else None."""
    drowned = report.drowned
    whole = report.survival
    if not whole.drowned and 2 * len(drowned) <= len(report.layers):
        return None
    names = sorted({layer.result for layer in report.layers})
    better = _better(report, model)
    return (
        f"the adapter is drowned by rounding to {' and '.join(names)}: {_share(whole.retained)} of its delta "
        f"is retained and the rounding noise is {whole.noise or 0:.2f} times its effect "
        f"({len(drowned)} of {len(report.layers)} layers); {better}, or keep it as a side-branch "
        "(vera-edge export --mode branch)"
    )


def _share(retained: float | None) -> str:
    return "none" if retained is None else f"{retained:.1%}"


def _better(report: MergeReport, model: TrainedModel) -> str:
    drowned = report.drowned or report.layers
    tried = [layer.module for layer in drowned[:: -(-len(drowned) // _TRIED)]]
    taken = {layer.result for layer in report.layers}
    for name in _LADDER:
        if name in taken:
            continue
        found = total(_try(name, module, model) for module in tried)
        if not found.drowned and (found.noise or 0) <= _GOOD_NOISE:
            noise = f"{found.noise or 0:.2g}"
            return f"merge with --to {name} (noise {noise}, tried on {len(tried)} of these layers)"
    return "merge with --to fp32"


def _try(name: str, module: str, model: TrainedModel) -> Survival:
    base, target = model.checkpoint.load(module), formats.get(name)
    merged = merge_rows(module, base, Delta(module, base.shape[1], model.adapters, model.projections))
    options = target.options({})
    # Values beyond fp16 become infinite, their shares NaN, and NaN is never good enough to be named.
    with np.errstate(over="ignore", invalid="ignore"):
        exact = {start: merged[start:stop] for start, stop in measured_rows(base.shape).items()}
        return measure(base, exact, target.quantize(merged, options), target, options, on_grid=False)
