"""The range of each channel of what int8 layers read, found by running the float graph over text.

With side-branches it runs alone and with each adapter, so that a range holds what any of them makes of the
text. All values count, the rarest too: see docs/export.md for what leaving some out was measured to cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from vera_edge.arrays import Array, Int64
from vera_edge.errors import DataError
from vera_edge.exporting.branch_inputs import Piece
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.plans.plan import FLOAT
from vera_edge.rounding.weight_rounding import calibration_texts
from vera_edge.text.mixture import Mixture
from vera_edge_onnx import parity
from vera_edge_onnx.branch import adapters
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.sessions import save
from vera_edge_onnx.weights.activations import Seen, kind_of

_TOKENS = 8192  # of all texts


def of_text(
    request: ExportRequest, model: ir.Model, found: Sequence[Site], layout: Sequence[Piece], work: Path
) -> tuple[dict[str, Seen], tuple[str, ...]]:
    """What was seen of every x that int8 rows read, by its name; and how, in words.

    model: the float graph, which stays as it is. found: its linear layers. layout: of the graph's vectors.
    work: a folder to write to. Raises DataError without usable text, CheckpointError without a tokenizer.
    """
    steps = {step.module: step for step in request.plan.steps}
    widths = {site.input.name or "": site.in_features for site in found if kind_of(site, steps) != FLOAT}
    names = sorted(widths)
    texts = calibration_texts(request.model.checkpoint, request.text, _TOKENS)
    running = _session(request, model, found, names, work / "ranges" / "model.onnx")
    nothing = {name: np.full(width, np.inf, np.float32) for name, width in widths.items()}
    seen = {name: Seen(infinite, -infinite) for name, infinite in nothing.items()}
    branched = request.model.adapters if layout else ()
    sets = [adapters.arrays(request, adapter, layout, weight) for adapter, weight in branched]
    for done, text in enumerate(texts):
        request.progress("calibrating", done, len(texts))
        for vectors in ({}, *sets):
            arrays = running.run(names, {**_feeds(running, text), **vectors})
            for name, array in zip(names, arrays, strict=True):
                seen[name] = seen[name].with_values(array)
    said = " and ".join(Mixture.either(request.text).names)
    if broken := [name for name, one in seen.items() if not one.finite]:
        raise DataError(
            f"{request.model.checkpoint.path} computes NaN or infinity from {said} text "
            f"({broken[0]}), so its activations have no range; check the model"
        )
    count = sum(len(text) for text in texts)
    return seen, (f"activations were calibrated on {count} tokens of {said} text",)


def _session(
    request: ExportRequest, model: ir.Model, found: Sequence[Site], names: Sequence[str], path: Path
) -> Any:
    """The float graph, its side-branches woven in, that gives the values called `names`."""
    branched = request.plan.mode == "branch"
    copy = parity.woven(request, model, found) if branched else model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    given = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in names if name not in given)
    path.parent.mkdir()
    save(copy, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # so that the same text gives the same ranges
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feeds(running: Any, text: Int64) -> Mapping[str, Array]:
    """One text as the graph takes it."""
    row = text[None]
    feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    return {value.name: feeds[value.name] for value in running.get_inputs()}
