"""Keys and values that a decoder keeps as int8, by scales that calibration text gave, which the graph holds.

ONNX Runtime's `GroupQueryAttention` rounds a key, rotated, and a value when it writes them to the cache, and
attends to what it wrote, those of the run itself among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from vera_edge.arrays import Array, Float32
from vera_edge.errors import CheckpointError, TargetError
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.rounding.weight_rounding import calibration_windows
from vera_edge.text.mixture import Cut
from vera_edge_onnx import parity
from vera_edge_onnx.branch import adapters
from vera_edge_onnx.decoder.drawing import Drawing
from vera_edge_onnx.decoder.parity import fed
from vera_edge_onnx.graph import groups
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.graph.weaver import Weaver
from vera_edge_onnx.running import opened_graph
from vera_edge_onnx.sessions import Feeds

_ATTENTION = "GroupQueryAttention"
_PAST, _PRESENT, _SCALES = (3, 4), (1, 2), (12, 13)  # its inputs and outputs, keys before values
_COS = 7  # where it reads the table that keys are turned by
_TOKENS = 2048  # of the text
# What is cut off loses more than coarser steps do: docs/speed.md, "An int8 KV cache".
_MARGIN, _TOP = 1.25, 127
_FILE = "ranges.onnx"


class Attention(NamedTuple):
    """A layer's attention, and the names of its caches as it gives them, keys before values."""

    node: ir.Node
    presents: tuple[str, str]


def put_in(request: ExportRequest, drawing: Drawing, found: Sequence[Site]) -> str:
    """Let the attention of `drawing` keep int8, by what the request's text makes of its keys and values.

    The graph is the float one; found: its linear layers. Returns a sentence for a person to read. Raises
    TargetError when a cache belongs to another operator, CheckpointError when keys or values aren't numbers,
    DataError for unusable text.
    """
    layers = _attention(drawing)
    cut, _ = calibration_windows(request.model.checkpoint, request.text, _TOKENS)
    scales = {name: _scales(most) for name, most in _largest(request, drawing, found, layers, cut).items()}
    weaver = Weaver(drawing.model)
    for layer in layers:
        layer.node.resize_inputs(_SCALES[1] + 1)
        for part, scale, name in zip(("k", "v"), _SCALES, layer.presents, strict=True):
            layer.node.replace_input_with(scale, weaver.initializer(f"{name}.scale", scales[name]))
            layer.node.attributes[f"{part}_quant_type"] = ir.AttrString(f"{part}_quant_type", "PER_CHANNEL")
        layer.node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for value in (*(layer.node.inputs[place] for place in _PAST), *_presents(layer.node)):
            assert value is not None
            value.type = ir.TensorType(ir.DataType.INT8)
    return (
        f"keys and values are kept as int8, by scales of {cut.said()}: that takes ONNX Runtime 1.27 or "
        "newer, and a program that makes its caches of the type that the graph says"
    )


def _presents(node: ir.Node) -> list[ir.Value]:
    return [node.outputs[place] for place in _PRESENT]


def _attention(drawing: Drawing) -> list[Attention]:
    """The attention of every layer, which all caches of the graph belong to."""
    inputs = {value.name: value for value in drawing.model.graph.inputs}
    caches = {name for name in inputs if (name or "").startswith("past")}
    nodes = [node for node in drawing.model.graph if node.op_type == _ATTENTION]
    known = {value.name for node in nodes for place in _PAST if (value := node.inputs[place]) is not None}
    turned = any(node.op_type == "RotaryEmbedding" for node in drawing.model.graph)
    if not caches or caches != known or turned:
        raise TargetError(
            f"not all layers of this {drawing.architecture} are a {_ATTENTION} that turns its keys itself, "
            "the one whose keys and values ONNX Runtime keeps as int8; leave --kv-cache out"
        )
    return [Attention(node, (_name(node, 0), _name(node, 1))) for node in nodes]


def _name(node: ir.Node, part: int) -> str:
    return _presents(node)[part].name or ""


def _largest(
    request: ExportRequest, drawing: Drawing, found: Sequence[Site], layers: Sequence[Attention], cut: Cut
) -> dict[str, Float32]:
    """By the name of a cache, the largest magnitude that each channel may hold: (heads, size)."""
    rotations = {layer.presents[0]: _Rotation.of(layer.node) for layer in layers}
    most: dict[str, Float32] = {}
    names = [name for layer in layers for name in layer.presents]
    for values in _run(request, drawing, found, names, cut):
        for name, array in values.items():
            turned = rotations.get(name, _Rotation(0, interleaved=False)).longest(array[0])
            seen: Float32 = turned.max(axis=1)
            most[name] = np.maximum(most.get(name, seen), seen)
    if broken := [name for name, one in most.items() if not np.isfinite(one).all()]:
        raise CheckpointError(
            f"{request.model.checkpoint.path} computes NaN or infinity from the calibration text "
            f"({broken[0]}); check its weights, and the adapter's"
        )
    return most


@dataclass(frozen=True)
class _Rotation:
    """Which channels of a key are turned, two by two: the first `width`, each with one half of it further, or
    `interleaved` with its neighbour."""

    width: int
    interleaved: bool

    @classmethod
    def of(cls, attention: ir.Node) -> _Rotation:
        """Of the keys that an attention keeps."""
        cos = attention.inputs[_COS]
        if not _number(attention, "do_rotary") or cos is None or cos.shape is None:
            return cls(0, interleaved=False)
        half = cos.shape[-1]
        assert isinstance(half, int)
        return cls(2 * half, bool(_number(attention, "rotary_interleaved")))

    def longest(self, keys: Float32) -> Float32:
        """The magnitude (heads, tokens, size) that each channel has at whatever position it's turned to.

        Two channels that were never seen far from where they begin, as those that turn slowly in a short
        text, change places in a long one.
        """
        found = np.abs(keys)
        if self.width:
            half = self.width // 2
            one, other = (slice(0, half), slice(half, self.width))
            if self.interleaved:
                one, other = slice(0, self.width, 2), slice(1, self.width, 2)
            found[..., one] = found[..., other] = np.hypot(keys[..., one], keys[..., other])
        return found


def _number(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _run(
    request: ExportRequest, drawing: Drawing, found: Sequence[Site], names: Sequence[str], cut: Cut
) -> Iterator[Mapping[str, Array]]:
    """The caches called `names` (1, heads, tokens, size) of each text: of the merged model, or of the base
    alone and of each adapter beside it."""
    model, sets = drawing.model, list[Feeds]([{}])
    if request.plan.mode == "branch":
        model = parity.woven(request, model, found)
        layout = groups.layout(found, adapters.sizes(request))
        sets += [adapters.arrays(request, one, layout, weight) for one, weight in request.model.adapters]
    running = opened_graph(model, drawing.folder / _FILE)
    chains = [
        [{**fed(running.signature, text, 0, len(text)), **vectors}]
        for vectors in sets
        for text in cut.windows
    ]
    for done, chain in enumerate(running.run_chains(chains, {}, names)):
        request.progress("calibrating keys and values", done, len(chains))
        yield chain[0]


def _scales(most: Float32) -> Float32:
    """The steps of grids of int8 (1, heads, 1, size) that reach past `most` (heads, size), rounded up to 8
    bits, so that they are the same whatever the last bits of another run.
    """
    mantissa, exponent = np.frexp(most * np.float32(_MARGIN / _TOP))
    steps = np.ldexp(np.ceil(mantissa * 256) / 256, exponent).astype(np.float32)
    return np.where(steps > 0, steps, np.float32(1))[None, :, None, :]
