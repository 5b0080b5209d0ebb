"""Refuses a decoder whose graph isn't the model: on the model itself, and on a small copy of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import transformers

from vera_edge.adapters.adapter import Adapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.reference.model import TorchReference, open_reference
from vera_edge.reference.room import float32_size
from vera_edge.storage.files import write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge_onnx.branch import adapters
from vera_edge_onnx.decoder import parity, replica
from vera_edge_onnx.decoder.drawing import Drawing, draw, sites_of
from vera_edge_onnx.graph import groups, sites
from vera_edge_onnx.parity import Checked, Differs, refusal, woven
from vera_edge_onnx.running import opened_graph
from vera_edge_onnx.sessions import Feeds

_RECORD = "checked.json"
_WHOLE = "compared.onnx"
_AT_ONCE = 1 << 30  # bytes of a model in float32 that is held whole


def hold(request: ExportRequest, drawing: Drawing, found: tuple[sites.Site, ...]) -> Checked:
    """What `drawing` was compared on. Raises TargetError, naming the first layer that differs, else.

    found: its linear layers. Merged, it must be the model with its adapters, unmerged in PEFT; with
    side-branches to come the base, and with them the model with each adapter that isn't like another.
    """
    record = drawing.folder / _RECORD
    if record.is_file():  # of an earlier export of the same graph
        return Checked.from_dict(json.loads(record.read_bytes()))
    request.progress("comparing the graph with the model", 0, 1)
    bounds = parity.bounds_of(drawing.config, drawing.windows)
    shrinkable = _is_whole(drawing)
    lengths = parity.lengths_of(drawing.config, bounds, shrinkable)
    if request.plan.mode == "merged":
        _compare(drawing, _reference(request, request.model.adapters), lengths, found)
    else:
        _compare_branches(request, drawing, lengths, found)
    checked = Checked(lengths.longest, bounds)
    if not lengths.reached and shrinkable:
        checked = Checked(lengths.longest, bounds, _hold_replica(drawing))
    write_atomic(record, canonical_json(checked.to_dict()))
    return checked


def _reference(request: ExportRequest, adapted: Sequence[tuple[Adapter, float]]) -> TorchReference:
    checkpoint = request.model.checkpoint
    by_layer = float32_size(checkpoint) > _AT_ONCE
    return open_reference(checkpoint, adapted, request.model.projections, layer_by_layer=by_layer)


def _compare_branches(
    request: ExportRequest, drawing: Drawing, lengths: parity.Lengths, found: tuple[sites.Site, ...]
) -> None:
    """Hold the graph against the base, and with adapters' values in its side-branches the model with each."""
    reference = _reference(request, request.model.adapters[:1])
    _compare(drawing, reference.adapter_off(), lengths, found)
    branched = replace(drawing, model=woven(request, drawing.model, found))
    layout, short = groups.layout(found, adapters.sizes(request)), parity.lengths_of(drawing.config, {})
    for number, (adapter, weight) in enumerate(adapters.unlike(request)):
        if number:
            del reference  # one model in memory
            reference = _reference(request, [(adapter, weight)])
        vectors = adapters.arrays(request, adapter, layout, weight)
        _compare(branched, reference, short, found, f" with {adapter.path} beside it", vectors)


def _is_whole(drawing: Drawing) -> bool:
    """Whether the model is a text model and nothing else, so that a small copy of it can be made."""
    cls = getattr(transformers, drawing.architecture, None)
    return cls is not None and type(drawing.config) is cls.config_class


def _hold_replica(drawing: Drawing) -> Checked:
    """What a small copy of the model was compared on, drawn by the same code."""
    folder = drawing.folder.with_name(f"{drawing.folder.name}-small")
    config = replica.shrunk(drawing.config)
    model = replica.write(config, drawing.architecture, drawing.source.path, folder)
    copy = Checkpoint.open(folder)
    small = draw(copy, config, drawing.architecture, folder / "graph", fuse_qkv=True)
    bounds = parity.bounds_of(small.config, small.windows)
    lengths = parity.lengths_of(small.config, bounds)
    found = sites_of(small)
    reference = TorchReference(model, config.vocab_size, has_adapter=False)
    _compare(small, reference, lengths, found, ", seen on a small copy of the model")
    return Checked(lengths.longest, bounds)


def _compare(
    drawing: Drawing,
    reference: TorchReference,
    lengths: parity.Lengths,
    found: tuple[sites.Site, ...],
    how: str = "",
    vectors: Feeds = MappingProxyType({}),
) -> None:
    try:
        parity.compare(opened_graph(drawing.model, drawing.folder / _WHOLE), reference, lengths, vectors)
    except Differs as cause:
        raise refusal(
            cause,
            drawing.model,
            found,
            drawing.folder / _WHOLE,
            reference.model,
            lambda feeds: reference.logits(feeds["input_ids"][0]),
            f"what {drawing.architecture} computes{how}",
        ) from None
