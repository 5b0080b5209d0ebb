"""A decoder's graph rewritten in memory so that it can leave out the logits of all but a prompt's last token.

A head gives logits for every token that is fed, and a prompt needs those of its last. What it reads is the
output of the last norm, (rows, tokens, hidden); that is cut first, from the token on that the input FROM
says: 0, the default, is all of them, -1 the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vera_edge.device.runtime import onnx_message as message
from vera_edge.device.runtime.onnx_file import fields, opset, spans, text

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
_Field = tuple[int, Any, Any]  # its number, its value, and all of it


def rewrite(model: Any) -> bytes | None:
    """The model (bytes of a file) with the input FROM; None for one whose head stands behind no norm.

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
    found = _last_norm(parts)
    if found is None:
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


def _last_norm(parts: list[_Field]) -> tuple[int, str] | None:
    """Where among a graph's fields the norm is that the head reads, and what its output is called.

    A head's first inputs lead back to it, whatever else is added to its product.
    """
    wanted, left = _LOGITS, _MOST
    for index in reversed(range(len(parts))):
        if parts[index][0] != _NODE or left == 0:
            continue
        left -= 1
        inputs, outputs, op = _names(parts[index][1])
        if wanted not in outputs:
            continue
        if op in _NORMS:
            return index, wanted
        if not inputs:
            return None
        wanted = inputs[0]
    return None


def _names(node: Any) -> tuple[list[str], list[str], str]:
    """What a node reads and gives, and its operator."""
    inputs, outputs, op = list[str](), list[str](), ""
    for number, value in fields(node):
        if number == 1:
            inputs.append(text(value))
        elif number == 2:
            outputs.append(text(value))
        elif number == 4:
            op = text(value)
    return inputs, outputs, op


def _reading(node: Any, hidden: str) -> bytes:
    """A node that reads what is cut instead of `hidden`."""
    made = bytearray()
    for number, value, whole in spans(node):
        made += message.field(1, _CUT) if number == 1 and text(value) == hidden else whole
    return bytes(made)
