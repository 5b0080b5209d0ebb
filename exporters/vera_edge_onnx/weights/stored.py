"""The stored form of every linear: the checkpoint's own integers where they can stay, else quantized."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from vera_edge import formats
from vera_edge.arrays import Float32
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.formats import Bnb4Weight, Int8Weight, Weight
from vera_edge.formats.affine import HoldsIntegers
from vera_edge.formats.blocks import IntBlocks, quantize
from vera_edge.plans.plan import FLOAT, SAME, Plan, Step
from vera_edge.rounding.weight_rounding import BLOCK, grid_of
from vera_edge_onnx.graph.parts import Part
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.weights import activations, integers
from vera_edge_onnx.weights.activations import Seen
from vera_edge_onnx.weights.corrected import correct
from vera_edge_onnx.weights.deferred import Deferred
from vera_edge_onnx.weights.integers import Order
from vera_edge_onnx.weights.linear import Bnb4Product, StoredProduct, join_bnb4

Rows = Callable[[], Float32]
ACCURACY, RUN = "accuracy_level", "run"
INTEGERS = ("int8", "int4", "int2")
_BNB4 = ("nf4", "fp4")
# What a format of a checkpoint is stored as in a graph; ONNX Runtime computes in float32 on a CPU.
_STORED = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp16", "nf4": "nf4", "fp4": "fp4"}
KINDS = ("fp32", "fp16", *INTEGERS, *_BNB4)


def kind(plan: Plan) -> str:
    """What most linears of a plan are stored as. Raises TargetError when a graph can't hold one of them."""
    if plan.weights != SAME and plan.weights not in (*KINDS, *_STORED):
        raise _unknown(plan.weights)
    found = [stored_as(step) for step in plan.steps]
    if plan.weights != SAME:
        return _STORED.get(plan.weights, plan.weights)
    results = [result for result in found if result not in ("fp32", "fp16")] or found
    return max(sorted(set(results)), key=results.count)


def stored_as(step: Step) -> str:
    """What a linear is stored as, one of KINDS. Raises TargetError when a graph can't hold it."""
    if step.result in (*KINDS, *_STORED):
        return _STORED.get(step.result, step.result)
    grid = grid_of(step)
    if grid is None:
        raise _unknown(step.result)
    found = f"int{grid.bits}"
    if found not in KINDS or not (step.copies or grid_of(step, exported=True)):
        raise TargetError(
            f"{step.module} has {grid.bits} bits in groups of {grid.width(step.shape[1])} inputs, and ONNX "
            f"Runtime multiplies with 2, 4 or 8 bits in blocks of 16 to 256; {integers.INSTEAD}"
        )
    return found


def is_exact(request: ExportRequest, step: Step) -> bool:
    """Whether a linear of the graph multiplies with the very values that the checkpoint's weight has.

    With integers only at accuracy level 0: what they are multiplied with is rounded too otherwise.
    """
    stored = stored_as(step)
    if step.activations != FLOAT or (stored != "fp32" and not step.copies):
        return False
    if stored in INTEGERS:
        own = request.model.checkpoint.load(step.module) if request.options.get(ACCURACY) == "0" else None
        return own is not None and _stays(own, step)
    return stored == "fp32" or stored in _BNB4


def _stays(own: Weight, step: Step) -> bool:
    """Whether a weight's own integers can be those of the graph's blocks."""
    return isinstance(own, HoldsIntegers) or (isinstance(own, Int8Weight) and not step.shape[1] % BLOCK)


def runs_as(request: ExportRequest) -> str:
    """What most linears of the graph that runs are; with the option `run` other than what is shipped.

    Raises PlanError when what is shipped can't become that.
    """
    shipped = kind(request.plan)
    run = request.options.get(RUN, shipped)
    if run != shipped and (run != "int8" or shipped not in _BNB4):
        raise PlanError(f"{shipped} weights can't run as {run!r}; nf4 and fp4 weights can, as int8")
    return run


def can_join(request: ExportRequest, steps: Sequence[Step]) -> bool:
    """Whether weights run as the same integers in blocks, so that they can be one."""
    kinds = {stored_as(step) for step in steps}
    if runs_as(request) != kind(request.plan):
        return len(kinds) == 1 and kinds <= set(_BNB4)
    grids = {None if step.copies else grid_of(step, exported=True) for step in steps}
    return kinds <= set(INTEGERS) and len(grids) == 1 and None not in grids


def is_four_bit(site: Site, steps: Mapping[str, Step]) -> bool:
    """Whether all of a site is NF4, or all of it FP4."""
    results = {stored_as(steps[part.module]) for part in site.parts}
    return len(results) == 1 and results <= set(_BNB4)


def beside(kind: str, four_bit: str = "int8") -> str:
    """What embeddings, head and the projections of a side-branch are stored as beside linears of a kind.

    The fidelity formats keep them exact. A decoder's head and embeddings in 4 bits, rounded with care, cost
    SmolLM2 3 % of the adapter's effect for 13 MB, rounded to nearest 19 %; projections' error reaches the
    output only through the delta. four_bit: what it is beside 4 bits and less.
    """
    return {"fp16": "fp16", "int8": "int8", "int4": four_bit, "int2": four_bit}.get(kind, "fp32")


def head_block(plan: Plan) -> int:
    """How many inputs share a scale in a quantized head: as in the linears, when one was asked for all.

    A plan that decides on the head was measured with the usual block.
    """
    asked = {step.options.get("block", BLOCK) for step in plan.steps}
    return int(asked.pop()) if len(asked) == 1 and "head" not in plan.options else BLOCK


def _unknown(weights: str) -> TargetError:
    return TargetError(f"{weights} weights can't be stored in an ONNX graph; choose from {', '.join(KINDS)}")


def stored(
    request: ExportRequest, sites: Sequence[Site], seen: Mapping[str, Seen] = MappingProxyType({})
) -> dict[str, StoredProduct]:
    """The weight of every site, by site name, made when it's woven in; a site that isn't named stays float32.

    seen: of what sites read whose activations were calibrated, by its name in the graph.
    Raises PlanError when there's no place for a correction; a weight, TargetError when its blocks can't be
    held as they are.
    """
    steps = {step.module: step for step in request.plan.steps}
    fixed = activations.fixed(request, sites, steps)
    found: dict[str, StoredProduct] = {}
    for number, site in enumerate(sites):
        maker = _maker(request, site, steps, seen.get(site.input.name or ""), fixed)
        if maker is not None:
            found[site.name] = Deferred(partial(_told, request, number, len(sites), maker))
    return correct(found, sites, request.corrections)


def _told(
    request: ExportRequest, number: int, count: int, make: Callable[[], StoredProduct]
) -> StoredProduct:
    request.progress("quantizing", number, count)
    return make()


def _maker(
    request: ExportRequest, site: Site, steps: Mapping[str, Step], seen: Seen | None, fixed: Collection[str]
) -> Callable[[], StoredProduct] | None:
    """What makes a site's weight; None where it stays as it is in the graph."""
    results = {stored_as(steps[part.module]) for part in site.parts}
    if (reads := activations.kind_of(site, steps)) != FLOAT:
        level = (site.input.name or "") not in fixed
        return lambda: activations.linear(
            request, [(part, rows()) for part, rows in rows_of(site)], steps, reads, seen, level
        )
    if results <= set(INTEGERS):
        return lambda: integers.join(
            [_blocks(request, steps[part.module], part, rows) for part, rows in rows_of(site)]
        )
    if is_four_bit(site, steps) and runs_as(request) != "int8":
        return lambda: join_bnb4(
            [_bnb4(request, steps[part.module], part, rows) for part, rows in rows_of(site)]
        )
    return None


def set_accuracy(request: ExportRequest, model: ir.Model) -> None:
    """Let every `MatMulNBits` compute at the accuracy level that was asked for; without, they stay at 4.

    Raises PlanError for a level that ONNX Runtime has no kernel of its own for on a CPU.
    """
    level = request.options.get(ACCURACY, "4")
    if level not in ("0", "4"):
        raise PlanError(
            f"a CPU has no accuracy level {level!r}; choose 4 (activations rounded to int8) or 0 (float32)"
        )
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes[ACCURACY] = ir.AttrInt64(ACCURACY, int(level))


def rows_of(site: Site) -> list[tuple[Part, Rows]]:
    """Each part with what gives its rows of the site's weight, (rows, in); all at most once."""
    whole = cache(lambda: site.weight)
    starts = np.cumsum([0, *(part.size for part in site.parts)]).tolist()

    def rows(start: int, stop: int) -> Float32:
        return whole()[start:stop]

    return [
        (part, partial(rows, start, stop))
        for part, start, stop in zip(site.parts, starts, starts[1:], strict=False)
    ]


def _blocks(request: ExportRequest, step: Step, part: Part, rows: Rows) -> tuple[IntBlocks, Order | None]:
    if (codes := request.requantized.get(step.module)) is not None:
        return _cut(codes.int_blocks(), part), None
    own = _own(request, step)
    if isinstance(own, HoldsIntegers):
        whole, order = integers.of_checkpoint(own.integers(), step.module)
        return _cut(whole, part), order
    if isinstance(own, Int8Weight) and _stays(own, step):
        return _rowwise(own, part), None
    grid = grid_of(step, exported=True)
    assert grid is not None
    return quantize(rows(), grid.bits, grid.block, grid.symmetric), None


def _cut(whole: IntBlocks, part: Part) -> IntBlocks:
    """Some rows of a weight in blocks."""
    rows = slice(part.start, part.stop)
    zeros = None if whole.zero_points is None else whole.zero_points[rows]
    return replace(whole, codes=whole.codes[rows], scales=whole.scales[rows], zero_points=zeros)


def _rowwise(own: Int8Weight, part: Part) -> IntBlocks:
    """LLM.int8's own codes; every block of a row has the row's scale."""
    codes = (own.codes[part.start : part.stop].astype(np.int16) + 128).astype(np.uint8)
    count = codes.shape[1] // BLOCK
    scales = np.repeat(own.scales[part.start : part.stop, None] / np.float32(127), count, axis=1)
    return IntBlocks(8, codes.shape[1], codes.reshape(-1, count, BLOCK), scales)


def _bnb4(request: ExportRequest, step: Step, part: Part, rows: Rows) -> Bnb4Product:
    made = four_bit(request, step, rows)
    whole = Bnb4Product(made.shape, made.quant_type, made.blocksize, made.packed, made.absmax)
    return whole if part.size == made.shape[0] else whole.rows(part.start, part.stop)


def four_bit(request: ExportRequest, step: Step, rows: Rows) -> Bnb4Weight:
    """A module's weight in NF4 or FP4, whole where the checkpoint or a rounding gives it; else of `rows`."""
    codes = request.requantized.get(step.module)
    made = _own(request, step) if codes is None else codes.bnb4()
    if made is None:
        made = formats.get(step.result).quantize(rows(), step.options)
    assert isinstance(made, Bnb4Weight)
    return made


def _own(request: ExportRequest, step: Step) -> Weight | None:
    """The checkpoint's weight when it stays as it is stored."""
    return request.model.checkpoint.load(step.module) if step.copies else None
