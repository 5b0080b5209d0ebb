"""Holds the float graph of an encoder or a classifier against the model, in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vera_edge.arrays import Array
from vera_edge.errors import TargetError
from vera_edge.reference.model import TorchReference
from vera_edge_onnx.graph.sites import Site
from vera_edge_onnx.parity import Checked, Differs, hold, refusal
from vera_edge_onnx.running import opened_graph
from vera_edge_onnx.sessions import Feeds

_SHORT, _USUAL, _PAST, _LONGEST = 4, 40, 20, 2048  # tokens
_SEED = 20240311
# How far each token looks, in families that don't all look at everything.
_WINDOWS = ("local_attention", "sliding_window", "attention_window")


def compare(
    graph: ir.Model,
    sites: Sequence[Site],
    reference: TorchReference,
    model: Any,
    architecture: str,
    folder: Path,
    vectors: Feeds = MappingProxyType({}),
) -> Checked:
    """What the graph was compared on. Raises TargetError, naming the first layer that differs, else.

    sites: its linear layers. model: what `reference` runs, or the part of it that was drawn. folder: to write
    to. vectors: of the adapter that runs beside the base.
    """
    folder.mkdir(parents=True)
    running = opened_graph(graph, folder / "model.onnx")
    bounds, tokens = _bounds(model.config), 0
    names = running.signature.outputs

    def forward(feeds: Feeds) -> Any:
        given = {name: torch.from_numpy(array) for name, array in feeds.items() if name not in vectors}
        with reference.running():
            return model(**given)

    for feeds in _inputs(graph, model, max(bounds.values(), default=0)):
        try:
            values = next(running.run_chains([[{**feeds, **vectors}]], {}, names))[0]
            _hold(forward(feeds), names, [values[name] for name in names], feeds)
        except Differs as cause:
            what, path = f"what {architecture} computes", folder / "layers.onnx"
            cause.feeds = {**feeds, **vectors}
            raise refusal(cause, graph, sites, path, model, forward, what) from None
        tokens = max(tokens, feeds["input_ids"].shape[1] if "input_ids" in feeds else 0)
    return Checked(tokens, bounds)


def _hold(outputs: Any, names: Sequence[str], found: Sequence[Array], feeds: Feeds) -> None:
    for name, array in zip(names, found, strict=True):
        expected = getattr(outputs, name, None)
        if expected is None:
            raise TargetError(f"the graph gives {name}, which the model in transformers doesn't")
        hold(expected.float().numpy(), array, f"{name} of inputs {_shapes(feeds)} differ", feeds)


def _bounds(config: Any) -> dict[str, int]:
    found = {}
    for name in _WINDOWS:
        value = getattr(config, name, None)
        widths = value if isinstance(value, list) else [value]
        if widest := max((width for width in widths if type(width) is int), default=0):
            found[name] = widest
    return {name: bound for name, bound in found.items() if bound < _longest(config)}


def _longest(config: Any) -> int:
    """The longest text, in tokens; two positions of RoBERTa's are never used."""
    longest = getattr(config, "max_position_embeddings", None)
    return _LONGEST if not longest or longest < 3 else min(_LONGEST, int(longest) - 2)


def _inputs(graph: ir.Model, model: Any, bound: int) -> Iterator[dict[str, Array]]:
    random = np.random.default_rng(_SEED)
    names = [value.name or "" for value in graph.graph.inputs if not value.is_initializer()]
    if model.main_input_name == "input_ids":
        longest = min(max(bound + _PAST, _USUAL), _longest(model.config))
        for rows, length in ((1, min(_SHORT, longest)), (2, longest)):
            yield _text(model.config, names, rows, length, random)
        return
    for rows in (1, 3):
        shape = [size if isinstance(size, int) else rows for size in graph.graph.inputs[0].shape or ()]
        yield {names[0]: random.random(shape, np.float32)}


def _text(
    config: Any, names: list[str], rows: int, length: int, random: np.random.Generator
) -> dict[str, Array]:
    """Rows of tokens, the last one a third shorter and padded at its end."""
    shape = (rows, length)
    pad = getattr(config, "pad_token_id", None)
    tokens = random.integers(0, config.vocab_size, shape)
    if pad is not None:  # positions are counted by it, and the last token found by it
        tokens[tokens == pad] = (pad + 1) % config.vocab_size
    mask = np.ones(shape, np.int64)
    if rows > 1:
        mask[-1, length - length // 3 :] = 0
        tokens[-1, length - length // 3 :] = pad or 0
    kinds = random.integers(0, max(1, getattr(config, "type_vocab_size", 0)), shape)
    feeds = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": kinds}
    return {name: feeds[name] for name in names}


def _shapes(feeds: Feeds) -> str:
    return " and ".join(sorted({str(list(array.shape)) for array in feeds.values()}))
