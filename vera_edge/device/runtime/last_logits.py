"""A decoder's graph rewritten in memory so that it can leave out the logits of all but a prompt's last token.

A head gives logits for every token that is fed, and a prompt needs those of its last. What it reads is the
output of the last norm, (rows, tokens, hidden); that is cut first, from the token on that the input FROM
says: 0, the default, is all of them, -1 the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vera_edge.device.runtime import onnx_message as message
from vera_edge.device.runtime.onnx_file import Node, opset, spans, text

FROM = "vera_edge.logits_from"
_CUT = f"{FROM}/cut"
_LOGITS = "logits"
_NORMS = frozenset(
    {
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
_MOST = 64  # nodes between the last norm and the logits; heads have one to twenty
_OPSET = 13  # since when a Slice is as it's written here
_GRAPH, _NODE, _INITIALIZER, _INPUT = 7, 1, 5, 11  # field numbers of ModelProto and GraphProto
_FED, _CACHES = frozenset({"attention_mask", "input_ids", "position_ids"}), "past_key_values."
_Field = tuple[int, Any, Any]  # its number, its value, and all of it


def rewrite(model: Any) -> bytes | None:
    """The model (bytes of a file) with the input FROM; None for one whose head reads no norm alone.

    Raises ValueError when it isn't a model.
    """
    if opset(model) < _OPSET:
        return None
    made = bytearray()
    for number, value, whole in spans(model):
        if number == _GRAPH:
            graph = _rewritten(list(spans(value)))
            if graph is None:
                return None
            made += message.field(_GRAPH, graph)
        else:
            made += whole
    return bytes(made)


def _rewritten(parts: list[_Field]) -> bytes | None:
    nodes = {index: Node.of(value) for index, (number, value, _) in enumerate(parts) if number == _NODE}
    found = _last_norm(nodes)
    if found is None or not _stands_alone(nodes, *found):
        return None
    place, hidden = found
    made = bytearray()
    for index, (number, value, whole) in enumerate(parts):
        made += message.field(_NODE, _reading(value, hidden)) if number == _NODE and index > place else whole
        if index == place:
            cut = message.node("Slice", (hidden, FROM, f"{_CUT}/to", f"{_CUT}/axis"), _CUT)
            made += message.field(_NODE, cut)
    constants = {FROM: 0, f"{_CUT}/to": np.iinfo(np.int64).max, f"{_CUT}/axis": 1}
    for name, number in constants.items():
        made += message.field(_INITIALIZER, message.constant(name, np.array([number], np.int64)))
    return bytes(made) + message.field(_INPUT, message.port(FROM, message.KINDS["int64"], (1,)))


def _last_norm(nodes: dict[int, Node]) -> tuple[int, str] | None:
    """Where among a graph's fields the norm is that the head reads, and what its output is called.

    A head's first inputs lead back to it, whatever else is added to its product.
    """
    wanted = _LOGITS
    for index, node in [*nodes.items()][: -_MOST - 1 : -1]:
        if wanted not in node.outputs:
            continue
        if node.op in _NORMS:
            return index, wanted
        if not node.inputs:
            return None
        wanted = node.inputs[0]
    return None


def _stands_alone(nodes: dict[int, Node], place: int, hidden: str) -> bool:
    """Whether nothing that has a row for each token joins what comes of `hidden`, but `hidden` itself.

    Else the norm isn't the last: a residual is added to what it leads to.
    """
    comes, joins = {hidden}, set[str]()
    for index, node in nodes.items():
        if index > place and comes & {*node.inputs}:
            comes.update(node.outputs)
            joins.update(node.inputs)
    return not _reads_text(nodes, joins - comes)


def _reads_text(nodes: dict[int, Node], names: set[str]) -> bool:
    """Whether one of these values depends on what is fed, and not on weights or an adapter alone."""
    wanted = set(names)
    for node in reversed(nodes.values()):
        if wanted & {*node.outputs}:
            wanted.update(node.inputs)
    return any(name in _FED or name.startswith(_CACHES) for name in wanted)


def _reading(node: Any, hidden: str) -> bytes:
    """A node that reads what is cut instead of `hidden`."""
    made = bytearray()
    for number, value, whole in spans(node):
        made += message.field(1, _CUT) if number == 1 and text(value) == hidden else whole
    return bytes(made)
