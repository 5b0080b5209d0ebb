"""The stored form of every linear: the checkpoint's own integers where they can stay, else quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vera_edge import formats
from vera_edge.errors import TargetError
from vera_edge.formats import Bnb4Weight, Int8Weight, Weight
from vera_edge.formats.blocks import IntBlocks, quantize
from vera_edge.plan import SAME, Plan, Step
from vera_edge.target import ExportRequest
from vera_edge.tensors import Float32
from vera_edge_onnx.linear import Blocks, Bnb4, Linear, join_blocks, join_bnb4
from vera_edge_onnx.sites import Part, Site

BLOCK = 32
_BITS = {"int8": 8, "int4": 4}
_BNB4 = ("nf4", "fp4")
# What a format of a checkpoint is stored as in a graph; ONNX Runtime computes in float32 on a CPU.
_STORED = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp16", "nf4": "nf4", "fp4": "fp4", "int8": "int8"}
KINDS = ("fp32", "fp16", "int8", "int4", "nf4", "fp4")


def kind(plan: Plan) -> str:
    """What most linears of a plan are stored as. Raises TargetError when a graph can't hold that."""
    if plan.weights != SAME:
        return _known(plan.weights)
    results = [step.result for step in plan.steps if step.result not in ("fp32", "bf16", "fp16")]
    results = results or [step.result for step in plan.steps]
    return _known(max(sorted(set(results)), key=results.count))


def _known(weights: str) -> str:
    found = weights if weights in KINDS else _STORED.get(weights)
    if found is None:
        raise TargetError(
            f"{weights} weights can't be stored in an ONNX graph; choose from {', '.join(KINDS)}"
        )
    return found


def stored(request: ExportRequest, sites: Sequence[Site]) -> dict[str, Linear]:
    """The weight of every site, by site name; a site that isn't named is stored as float32.

    Raises TargetError when a weight's blocks can't be held as they are.
    """
    steps = {step.module: step for step in request.plan.steps}
    found: dict[str, Linear] = {}
    for done, site in enumerate(sites):
        request.progress("quantizing", done, len(sites))
        results = {steps[part.module].result for part in site.parts}
        result = _known(results.pop()) if len(results) == 1 else "fp32"
        if result in _BITS:
            parts = [_blocks(request, steps[part.module], part, rows) for part, rows in _rows(site)]
            found[site.name] = join_blocks(parts)
        elif result in _BNB4:
            found[site.name] = join_bnb4(
                [_bnb4(request, steps[part.module], part, rows) for part, rows in _rows(site)]
            )
    return found


def _rows(site: Site) -> list[tuple[Part, Float32]]:
    """Each part with its rows of the site's weight, (rows, in)."""
    ends = np.cumsum([part.size for part in site.parts])[:-1]
    return list(zip(site.parts, np.split(site.weight, ends), strict=True))


def _blocks(request: ExportRequest, step: Step, part: Part, rows: Float32) -> Blocks:
    own = _own(request, step)
    bits = _BITS[step.result]
    if (codes := request.requantized.get(step.module)) is not None:
        return Blocks(_cut(codes.int_blocks(), part))
    if isinstance(own, Int8Weight) and bits == 8 and not step.shape[1] % BLOCK:
        return _rowwise(own, part)
    # Zero points cost more than they're worth at 8 bits, and halve the error at 4.
    return Blocks(quantize(rows, bits, BLOCK, symmetric=bits == 8))


def _cut(whole: IntBlocks, part: Part) -> IntBlocks:
    """Some rows of a weight in blocks."""
    rows = slice(part.start, part.stop)
    zeros = None if whole.zero_points is None else whole.zero_points[rows]
    return replace(whole, codes=whole.codes[rows], scales=whole.scales[rows], zero_points=zeros)


def _rowwise(own: Int8Weight, part: Part) -> Blocks:
    """LLM.int8's own codes; every block of a row has the row's scale."""
    codes = (own.codes[part.start : part.stop].astype(np.int16) + 128).astype(np.uint8)
    count = codes.shape[1] // BLOCK
    scales = np.repeat(own.scales[part.start : part.stop, None] / np.float32(127), count, axis=1)
    return Blocks(IntBlocks(8, codes.shape[1], codes.reshape(-1, count, BLOCK), scales))


def _bnb4(request: ExportRequest, step: Step, part: Part, rows: Float32) -> Bnb4:
    codes = request.requantized.get(step.module)
    own = _own(request, step) if codes is None else codes.bnb4()
    if own is not None:
        assert isinstance(own, Bnb4Weight)
        whole = Bnb4(own.shape, own.quant_type, own.blocksize, own.packed, own.absmax)
        return whole if part.size == own.shape[0] else whole.rows(part.start, part.stop)
    made = formats.get(step.result).quantize(rows, step.options)
    assert isinstance(made, Bnb4Weight)
    return Bnb4(made.shape, made.quant_type, made.blocksize, made.packed, made.absmax)


def _own(request: ExportRequest, step: Step) -> Weight | None:
    """The checkpoint's weight when it stays as it is stored."""
    return request.checkpoint.load(step.module) if step.copies else None
