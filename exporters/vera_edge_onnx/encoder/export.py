"""Exports an encoder or a classifier as a folder that ONNX Runtime, Optimum and Transformers.js open.

transformers' exporter draws the graph from a skeleton of the model; then each linear gets the weight it is to
be stored with, the side-branches are woven in, and the folder is described in its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vera_edge.adapters.adapter import Adapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.device.runtime import pooling
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting.branch_inputs import Piece
from vera_edge.exporting.exporter import Export, ExportRequest
from vera_edge.merging.computed import ComputedTensors
from vera_edge.plans import plan as plans
from vera_edge.reference.model import TorchReference, open_reference
from vera_edge.rounding.weight_rounding import BLOCK
from vera_edge.storage import side_files
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import read_json, settings_json
from vera_edge_onnx import (
    float_copy,
    generated,
    options,
    parity,
    staging,
    tokenizer_config,
    transformers_js,
)
from vera_edge_onnx.branch import adapters, branch
from vera_edge_onnx.encoder import drawing, ranges
from vera_edge_onnx.encoder import parity as encoder_parity
from vera_edge_onnx.graph import groups, sites
from vera_edge_onnx.graph.skeleton import Computed
from vera_edge_onnx.graph.spool import Spool
from vera_edge_onnx.graph.weaver import Range, Weaver
from vera_edge_onnx.manifest_fields import describe, manifest_fields
from vera_edge_onnx.parity import Checked, NotTheModel
from vera_edge_onnx.weights import embeddings
from vera_edge_onnx.weights import stored as weights
from vera_edge_onnx.weights.activations import Seen
from vera_edge_onnx.weights.expanded import Shipped, ship

MODEL = "onnx/model.onnx"
KIND = "encoder"
# Where a folder came from is nobody's business, and would make two exports of one model differ.
_ORIGINS = ("_name_or_path", "_model_name_or_path")


def export(request: ExportRequest, target: str, architecture: str) -> Export:
    """Write `request.out`, whole or not at all.

    Raises TargetError when the model or the adapter can't be exported this way, PlanError on an option that
    isn't known.
    """
    task = _check(request, target, architecture)
    if task.half:
        steps = tuple(step for step in request.plan.steps if _in_encoder(step.module))
        request = replace(request, plan=replace(request.plan, steps=steps))
    branched = request.plan.mode == "branch"
    with staging.opened(request, KIND) as stage:
        model, found, source, checked = _float_graph(request, task, architecture, stage.work)
        layout = groups.layout(found, adapters.sizes(request)) if branched else ()
        seen, notes = _calibrated(request, task, model, found, layout, stage.work)
        shared, shipped = _weave(request, model, found, seen, stage.spool)
        model.metadata_props.update(describe(request, KIND) | {"vera_edge.task": task.name})
        apart = generated.save(request, stage.out, model, MODEL, shared, shipped, stage.spool)
        _copy_beside(source, stage.out, [value.name or "" for value in model.graph.inputs])
        files = adapters.write(request, stage.out, layout) if branched else {}
        described = replace(manifest_fields(request, MODEL, files, layout, KIND), checked=checked.to_dict())
        manifest = generated.write(stage.out, model, MODEL, apart, described, request.progress)
    if task.takes_text and not request.model.checkpoint.files.has_vocabulary:
        notes = (
            *notes,
            f"{request.model.checkpoint.path} holds no tokenizer, so a device can't read text with this",
        )
    return Export(
        target=target,
        folder=request.out,
        model=request.out / MODEL,
        size=manifest.size,
        plan=request.plan,
        adapters={name: request.out / file for name, file in files.items()},
        notes=(f"{'the encoder of ' * task.half}{architecture} for {task.name}", *notes),
    )


def _check(request: ExportRequest, target: str, architecture: str) -> drawing.EncoderTask:
    """The model's task; raises before any work is done when the request can't be met."""
    options.check(request, target)
    task = drawing.task(architecture, str(request.model.checkpoint.config.get("model_type")))
    if task.half:
        _check_half(request, architecture)
    if task.name == "feature-extraction" and task.takes_text:
        _check_pooling(request)
    reads = {step.activations for step in request.plan.steps}
    if unknown := sorted(reads - set(plans.ACTIVATIONS)):
        raise PlanError(f"the plan has {unknown[0]} activations; known: {', '.join(plans.ACTIVATIONS)}")
    if "static" in reads and not task.takes_text:
        raise TargetError(
            f"static activations need samples to find their ranges with, and {architecture} takes "
            f"{task.main_input}, which text can't be; export with --activations dynamic"
        )
    return task


def _check_pooling(request: ExportRequest) -> None:
    """Raise BundleError when the device couldn't make embeddings as the folder says (modules.json)."""
    folder = request.model.checkpoint.files.folders.get(side_files.MODULES)
    hidden = request.model.checkpoint.config.get("hidden_size")
    if folder is not None:
        pooling.read(folder, hidden if type(hidden) is int else None)


def _check_half(request: ExportRequest, architecture: str) -> None:
    """Raise TargetError when an adapter changes more than the encoder, which is all that is exported."""
    for adapter, _ in request.model.adapters:
        changed = [*adapter.vectors, *adapter.biases, *adapter.modules_to_save]
        if outside := next((name for name in changed if not _in_encoder(name)), None):
            raise TargetError(
                f"{adapter.path} changes {outside}, and {architecture} is exported by its encoder alone; "
                "merge it (vera-edge merge) and export the result with a tool that takes both halves"
            )


def _in_encoder(module: str) -> bool:
    return "encoder" in module.split(".")


def _float_graph(
    request: ExportRequest, task: drawing.EncoderTask, architecture: str, work: Path
) -> tuple[ir.Model, tuple[sites.Site, ...], Path, Checked]:
    """The float32 graph, its weights merged or the base's own; its linear layers; the folder of the other
    files; what the graph was compared on.

    Where the exporter computes with weights instead of moving them about, a graph drawn from a skeleton lacks
    what it computed: then, and where it isn't the model for another reason, it's drawn from the weights.
    """
    computed = float_copy.computed(request, work / "float")
    try:
        model, found = _drawn(request, task, computed)
        return model, found, computed.path, _held(request, task, architecture, model, found, work)
    except (Computed, NotTheModel):
        copy = float_copy.write(request, work / "written")
        model, found = _drawn(request, task, copy)
        return model, found, copy.path, _held(request, task, architecture, model, found, work / "again")


def _drawn(
    request: ExportRequest, task: drawing.EncoderTask, source: Checkpoint
) -> tuple[ir.Model, tuple[sites.Site, ...]]:
    request.progress("drawing the graph", 0, 1)
    model = drawing.draw(source, task)
    shapes = {module: linear.shape for module, linear in source.linears.items()}
    if isinstance(source.tensors, ComputedTensors):
        found = sites.of_skeleton(model, shapes)
    else:
        found = sites.find(model, shapes, source.dequantize)
    if request.plan.mode == "branch":
        adapted = {module: shapes[module] for module in adapters.sizes(request)}
        sites.check_covered(found, adapted, "adapted")
    return model, found


def _held(
    request: ExportRequest,
    task: drawing.EncoderTask,
    architecture: str,
    model: ir.Model,
    found: tuple[sites.Site, ...],
    work: Path,
) -> Checked:
    """What the float graph was compared on; raises TargetError when it isn't the model."""
    request.progress("comparing the graph with the model", 0, 1)
    merged = request.plan.mode == "merged"
    adapted = request.model.adapters if merged else request.model.adapters[:1]
    reference, inside = _reference(request, task, adapted)
    held_to = reference if merged else reference.adapter_off()
    checked = encoder_parity.compare(model, found, held_to, inside, architecture, work / "compared")
    if merged:
        return checked
    del held_to
    graph, layout = parity.woven(request, model, found), groups.layout(found, adapters.sizes(request))
    for number, (adapter, weight) in enumerate(adapters.unlike(request)):
        if number:
            del reference, inside  # one model in memory
            reference, inside = _reference(request, task, [(adapter, weight)])
        vectors = adapters.arrays(request, adapter, layout, weight)
        folder = work / f"branched-{number}"
        encoder_parity.compare(graph, found, reference, inside, architecture, folder, vectors)
    return checked


def _reference(
    request: ExportRequest, task: drawing.EncoderTask, adapted: Sequence[tuple[Adapter, float]]
) -> tuple[TorchReference, Any]:
    """The model with adapters in torch, and what of it was drawn."""
    reference = open_reference(request.model.checkpoint, adapted, request.model.projections, task.auto_class)
    return reference, reference.model.get_encoder() if task.half else reference.model


def _calibrated(
    request: ExportRequest,
    task: drawing.EncoderTask,
    model: ir.Model,
    found: tuple[sites.Site, ...],
    layout: Sequence[Piece],
    work: Path,
) -> tuple[Mapping[str, Seen], tuple[str, ...]]:
    """What text shows of int8 activations, where there are some, and how it was found, in words."""
    reads = {step.activations for step in request.plan.steps}
    if reads == {plans.FLOAT}:
        return {}, ()
    readable = task.takes_text and request.model.checkpoint.files.has_vocabulary
    if "static" not in reads and not readable:
        return {}, ("activations weren't calibrated: there is no tokenizer, or the model doesn't take text",)
    return ranges.of_text(request, model, found, layout, work)


def _weave(
    request: ExportRequest,
    model: ir.Model,
    found: tuple[sites.Site, ...],
    seen: Mapping[str, Seen],
    spool: Spool,
) -> tuple[dict[str, Range], Shipped]:
    """Store each weight as the plan says and add the side-branches.

    Returns which bytes are shared, and what is shipped in 4 bits to be expanded.
    """
    weaver, plan, kind = Weaver(model, spool), request.plan, weights.runs_as(request)
    results = {step.module: step.result for step in plan.steps}
    if kind == "fp16":
        for site in found:
            if all(results[part.module] == "fp16" for part in site.parts):
                weaver.narrow_weight(site.node)
    dtypes = options.beside(request, encoder=True)
    stored, vectors = weights.stored(request, found, seen), adapters.vector_dtype(request)
    shipped = ship(request, found, stored, spool)
    projections = dtypes.get(options.PROJECTIONS, "fp32")
    inputs = adapters.inputs(request)
    branch.weave(weaver, found, stored, inputs, request.model.projections, projections, vectors)
    by_row = any(step.activations != plans.FLOAT for step in plan.steps)
    embeddings.store(weaver, dtypes[options.HEAD], BLOCK, by_row)
    weights.set_accuracy(request, model)
    return weaver.finish(), shipped


def _copy_beside(source: Path, stage: Path, inputs: list[str]) -> None:
    """config.json, the tokenizer's and the preprocessor's files."""
    config = read_json(source / "config.json", TargetError)
    kept = {key: value for key, value in config.items() if key not in _ORIGINS}
    write_atomic(stage / "config.json", settings_json(transformers_js.described(kept, stage / MODEL)))
    side_files.copy(source, stage)
    tokenizer_config.mend(stage, inputs)
