"""Rotary position tables as transformers computes them.

The graph's builder knows some ways to scale rotary embeddings, for some architectures, and leaves the others
out without a word. transformers' own module is what the model was trained with, so the tables (cos and sin
by position) come from running it. Two ways depend on the length of the sequence, not on the position alone:

* longrope (arXiv 2402.13753): one table up to the original context, another one beyond it.
* dynamic (NTK-aware scaling): beyond the original context the base grows with the length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from vera_edge.arrays import Float32
from vera_edge.errors import TargetError


class RotaryTable(NamedTuple):
    """cos and sin, (positions, rotated dimensions / 2) each."""

    cos: Float32
    sin: Float32


@dataclass(frozen=True)
class Growth:
    """How dynamic scaling computes the frequencies of a sequence that is longer than `original`."""

    theta: float
    factor: float
    original: int
    dimensions: int  # rotated dimensions of a head

    @property
    def exponents(self) -> Float32:
        """Of the base, negative: one for each pair of dimensions."""
        even = np.arange(0, self.dimensions, 2, dtype=np.float32)
        result: Float32 = -even / np.float32(self.dimensions)
        return result


@dataclass(frozen=True)
class Rotary:
    """The tables of one kind of layer. switch: the longest sequence that `table` is for, None for any.

    Beyond it the positions are looked up in `beyond`: another table, or how one is computed.
    """

    table: RotaryTable
    switch: int | None = None
    beyond: RotaryTable | Growth | None = None


def context_length(config: Any) -> int:
    """The longest sequence that a text model's config allows.

    `max_position_embeddings`, which dynamic scaling and yarn take as the length before scaling.
    """
    longest = int(config.max_position_embeddings)
    for parameters in all_parameters(config):
        if parameters.get("rope_type") in ("dynamic", "yarn") and "factor" in parameters:
            original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            longest = max(longest, int(original * float(parameters["factor"])))
    return longest


def all_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The `rope_parameters` of a text model's config, those of each kind of layer where kinds differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    yield from nested or ([parameters] if parameters else [])


def tables_of(config: Any, architecture: str, layers: Sequence[int], rotary: Any) -> Rotary:
    """The tables that `layers` of the model share. rotary: from `module_of`.

    Raises TargetError when they don't share them, or are scaled in a way that isn't known.
    """
    kinds = {_layer_type(rotary, config, layer) for layer in layers}
    if len(kinds) > 1:
        raise TargetError(f"the graph rotates layers of {architecture} alike that the model doesn't")
    return _tables(rotary, config, kinds.pop(), context_length(config), architecture)


def module_of(config: Any, architecture: str) -> Any:
    """transformers' rotary embedding for the model, on the CPU; None when it has none."""
    cls = getattr(transformers, architecture, None)
    if cls is None:
        return None
    with torch.device("meta"):
        model = cls(config)
    found = {
        type(module) for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"
    }
    if not found:
        return None
    if len(found) > 1:
        raise TargetError(f"{architecture} has several kinds of rotary embeddings, which aren't told apart")
    try:
        return found.pop()(config=config)
    except (TypeError, KeyError, ValueError, AttributeError) as cause:
        raise TargetError(f"the rotary embedding of {architecture} can't be set up: {cause}") from cause


def _layer_type(rotary: Any, config: Any, layer: int) -> str | None:
    """The kind of a layer where the module tells kinds apart, else None."""
    if "layer_type" not in inspect.signature(type(rotary).forward).parameters:
        return None
    kind = config.layer_types[layer]
    return str(kind)


def _tables(rotary: Any, config: Any, layer_type: str | None, context: int, architecture: str) -> Rotary:
    kinds = rotary.rope_type
    kind = kinds[layer_type] if isinstance(kinds, dict) else kinds
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    if "dynamic" not in kind and kind != "longrope":
        return Rotary(_run(rotary, 0, context, layer_type))
    if kind == "longrope":
        original = min(int(parameters["original_max_position_embeddings"]), context)
        short = _run(rotary, 0, original, layer_type)
        if context <= original:
            return Rotary(short)
        return Rotary(short, original, _run(rotary, 0, context, layer_type))
    if kind != "dynamic":
        raise TargetError(f"{architecture} scales its rotary embedding by {kind!r}, which isn't carried over")
    original = int(config.max_position_embeddings)
    short = _run(rotary, 0, original, layer_type)
    growth = Growth(
        float(parameters["rope_theta"]), float(parameters["factor"]), original, 2 * short.cos.shape[1]
    )
    return Rotary(short, original, growth)


def _run(rotary: Any, start: int, stop: int, layer_type: str | None) -> RotaryTable:
    """What the module gives for positions `start` to `stop` of a sequence of `stop`."""
    positions = torch.arange(start, stop)[None]
    options = {} if layer_type is None else {"layer_type": layer_type}
    with torch.no_grad():
        halves = [half[0] for half in rotary(torch.zeros(1), positions, **options)]
    cos, sin = (half[:, : half.shape[1] // 2].float().contiguous().numpy() for half in halves)
    return RotaryTable(cos, sin)
