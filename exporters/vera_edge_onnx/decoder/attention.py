"""What each attention layer looks at, as transformers has it: its window, and whether positions count."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import transformers

_LAYER = re.compile(r"layers\.(\d+)/")
_SLIDING = "sliding_attention"
_TABLES = (7, 8)  # the inputs that bring cos and sin


def windows(config: Any, architecture: str) -> list[int | None]:
    """How many tokens each layer attends to, itself included; None for all.

    config: a transformers text config. Where `layer_types` doesn't tell, a class that reads `sliding_window`
    at all (Mistral, Phi-3) applies it to every layer.
    """
    count, window = int(config.num_hidden_layers), getattr(config, "sliding_window", None)
    if not window:
        return [None] * count
    types = getattr(config, "layer_types", None)
    if types is not None:
        return [int(window) if kind == _SLIDING else None for kind in types[:count]]
    slides = getattr(config, "use_sliding_window", True) and _reads_window(architecture)
    return [int(window) if slides else None] * count


def _reads_window(architecture: str) -> bool:
    cls = getattr(transformers, architecture, None)
    return cls is not None and "sliding_window" in inspect.getsource(sys.modules[cls.__module__])


def without_positions(config: Any) -> list[bool]:
    """Which layers use no rotary embedding (SmolLM3's `no_rope_layers`, where 0 says so)."""
    told = getattr(config, "no_rope_layers", None) or [1] * int(config.num_hidden_layers)
    return [not uses for uses in told[: int(config.num_hidden_layers)]]


def put_in(model: ir.Model, windows: Sequence[int | None], without: Sequence[bool]) -> None:
    """Give every GroupQueryAttention of `model` its layer's window, and no positions where it has none."""
    for node in model.graph:
        match = _LAYER.search(node.name or "")
        if node.op_type != "GroupQueryAttention" or match is None or int(match[1]) >= len(windows):
            continue
        layer = int(match[1])
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", windows[layer] or -1)
        if without[layer]:
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
            for place in _TABLES:
                node.replace_input_with(place, None)
