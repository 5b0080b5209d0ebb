"""Exports a decoder as a folder that ONNX Runtime GenAI and plain ONNX Runtime open as it is.

GenAI's builder draws the graph from a float32 copy of the model; then each linear gets the weight it is to be
stored with, the side-branches are woven in, and the folder is described in its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.device.runtime.decoding import ROPE_KIND, ROPE_SWITCH
from vera_edge.errors import TargetError
from vera_edge.exporting.exporter import Export, ExportRequest
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import HEAD
from vera_edge.reference.loading import config_of
from vera_edge_onnx import float_copy, generated, options, staging
from vera_edge_onnx.branch import adapters, branch
from vera_edge_onnx.decoder import configs, held, kv_cache
from vera_edge_onnx.decoder.drawing import Drawing, draw, sites_of
from vera_edge_onnx.graph import groups, joining, sites
from vera_edge_onnx.graph.skeleton import Computed
from vera_edge_onnx.graph.spool import Spool
from vera_edge_onnx.graph.weaver import Range, Weaver
from vera_edge_onnx.manifest_fields import describe, manifest_fields
from vera_edge_onnx.parity import Checked
from vera_edge_onnx.weights import head
from vera_edge_onnx.weights import stored as weights
from vera_edge_onnx.weights.expanded import Shipped, ship

MODEL = "onnx/model.onnx"


def export(request: ExportRequest, target: str, architecture: str) -> Export:
    """Write `request.out`, whole or not at all: a decoder, through ONNX Runtime GenAI's model builder.

    Raises TargetError when the model or the adapter can't be exported this way, PlanError on an option
    that isn't known.
    """
    check(request, target)
    branched = request.plan.mode == "branch"
    with staging.opened(request, "decoder") as stage:
        work = request.drawn or stage.work
        drawing, found, checked, notes = _float_graph(request, architecture, work)
        model = drawing.model
        layout = groups.layout(found, adapters.sizes(request)) if branched else ()
        shared, shipped = _weave(request, model, found, stage.spool)
        model.metadata_props.update(describe(request))
        apart = generated.save(request, stage.out, model, MODEL, shared, shipped, stage.spool)
        configs.copy(drawing.source.path, drawing.folder, stage.out, MODEL, quiet=branched)
        files = adapters.write(request, stage.out, layout) if branched else {}
        described = replace(manifest_fields(request, MODEL, files, layout), checked=checked.to_dict())
        manifest = generated.write(stage.out, model, MODEL, apart, described, request.progress)
    return Export(
        target=target,
        folder=request.out,
        model=request.out / MODEL,
        size=manifest.size,
        plan=request.plan,
        adapters={name: request.out / file for name, file in files.items()},
        notes=notes,
    )


def _notes(model: ir.Model) -> tuple[str, ...]:
    """What a person should know of the graph before it runs elsewhere."""
    if model.metadata_props.get(ROPE_KIND) != "longrope":
        return ()
    switch = model.metadata_props[ROPE_SWITCH]
    return (
        f"past {switch} tokens all keys are rotated by other factors (longrope): a runtime that isn't "
        "vera-edge's must be given the whole text anew there",
    )


def check(request: ExportRequest, target: str) -> None:
    """Raise before any work is done when the request can't be met."""
    if any(step.activations != plans.FLOAT for step in request.plan.steps):
        raise TargetError(
            "a decoder's int8 products round what they read by themselves (MatMulNBits at accuracy level 4); "
            "leave --activations out"
        )
    options.check(request, target)


def _float_graph(
    request: ExportRequest, architecture: str, work: Path
) -> tuple[Drawing, tuple[sites.Site, ...], Checked, tuple[str, ...]]:
    """The float32 graph, merged or the base's own; its linear layers; what it was compared on; notes."""
    adapted = adapters.sizes(request)
    try:
        drawing, found = _drawn(request, architecture, float_copy.computed(request, work / "float"), work)
    except Computed:
        drawing, found = _drawn(request, architecture, float_copy.write(request, work / "written"), work)
    shapes = {module: drawing.source.linear(module).shape for module in adapted}
    sites.check_covered(found, shapes, "adapted")
    checked = held.hold(request, drawing, found)
    notes = [kv_cache.put_in(request, drawing, found)] if options.has_int8_cache(request) else []
    joined = joining.join(drawing.model, found, partial(_fit_together, request))
    return drawing, joined, checked, (*notes, *_notes(drawing.model))


def _drawn(
    request: ExportRequest, architecture: str, source: Checkpoint, work: Path
) -> tuple[Drawing, tuple[sites.Site, ...]]:
    config = config_of(source)
    for fuse in (True, False):
        request.progress("drawing the graph", 0, 1)
        drawing = draw(source, config, architecture, work / f"{source.path.name}-{fuse}".lower(), fuse)
        found = sites_of(drawing)
        # Where an adapter leaves k alone, say, q, k and v can't be one product with one side-branch.
        if request.plan.mode == "merged" or not any(adapters.partial(request, (site,)) for site in found):
            break
    return drawing, found


def _fit_together(request: ExportRequest, found: tuple[sites.Site, ...]) -> bool:
    """Whether sites can be one product, all adapted or none."""
    modules = {part.module for site in found for part in site.parts}
    steps = [step for step in request.plan.steps if step.module in modules]
    return (
        len(steps) == len(modules)
        and weights.can_join(request, steps)
        and not adapters.partial(request, found)
    )


def _is_adapted(site: sites.Site, adapted: Mapping[str, int]) -> bool:
    return any(part.module in adapted for part in site.parts)


def _weave(
    request: ExportRequest, model: ir.Model, found: tuple[sites.Site, ...], spool: Spool
) -> tuple[dict[str, Range], Shipped]:
    """Store each weight as the plan says and add the side-branches.

    Returns which bytes are shared, and what is shipped in 4 bits to be expanded.
    """
    weaver, plan, kind = Weaver(model, spool), request.plan, weights.runs_as(request)
    adapted = adapters.sizes(request) if plan.mode == "branch" else {}
    ends = head.find(model)
    if ends is not None and any(site.node is ends.head and _is_adapted(site, adapted) for site in found):
        ends = None  # a head with a side-branch is a linear like any other
    inner = tuple(site for site in found if ends is None or site.node is not ends.head)
    bases = weights.stored(request, inner)
    shipped = ship(request, inner, bases, spool)
    if kind == "fp16":
        for site in inner:
            if site.name not in bases:
                weaver.narrow_weight(site.node)
    dtypes, vectors = options.beside(request), adapters.vector_dtype(request)
    projections = dtypes.get(options.PROJECTIONS, "fp32")
    inputs = adapters.inputs(request)
    branch.weave(weaver, inner, bases, inputs, request.model.projections, projections, vectors)
    if ends is not None:
        rounded = request.requantized.get(HEAD) if dtypes[options.HEAD] == "int4" else None
        reads = options.head_activations_of(request)
        head.store(weaver, ends, dtypes[options.HEAD], weights.head_block(plan), rounded, reads)
    elif options.HEAD_ACTIVATIONS in request.options:
        raise TargetError(
            "the graph's output head is no product of its own, or has a side-branch; leave "
            "--head-activations out"
        )
    weights.set_accuracy(request, model)
    return weaver.finish(), shipped
