"""Drift by layer: how far each weight is from the exact merged one, and what that does to the model.

Errors of weights cost nothing to find. What they do at a layer's output is measured on a few windows of the
text, and which layer causes the drift by taking one layer at a time from the artefact, all others as trained.
That is two forward passes of 128 tokens for each linear, from the layer on that it lies in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vera_edge.arrays import Float32, Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring.layer_passes import kl_of_each
from vera_edge.measuring.opened_candidate import OpenedCandidate
from vera_edge.measuring.opened_reference import OpenedReference
from vera_edge.measuring.result import LayerDrift
from vera_edge.merging.delta import effect
from vera_edge.progress import Progress, silent
from vera_edge.reference.model import TorchReference
from vera_edge.text.windows import Windows

# Tokens that the passes run on: layers are ranked by them, not measured to the last digit.
_TOKENS = 256
_PIECES = 2
_WRAPPED = "base_model.model."  # what PEFT puts before a module's name
_ROWS = 512  # of a weight that are looked at in float64 at a time


@dataclass(frozen=True)
class _Pair:
    """One layer's weights (out, in) float32: exactly merged, as the artefact has it, the delta alone."""

    exact: Float32
    stored: Float32
    delta: Float32 | None


def check(trained: OpenedReference, candidate: OpenedCandidate) -> None:
    """Raise DataError when layers can't be compared: that needs both sides' weights, not exports."""
    if trained.checkpoint is None or candidate.checkpoint is None:
        side = trained.artefact if trained.checkpoint is None else candidate.artefact
        raise DataError(
            f"{side.path} is an export, whose layers can't be read one by one; leave --by-layer out, or give "
            "a merged Hugging Face folder and the adapter"
        )


def by_layer(
    trained: OpenedReference, candidate: OpenedCandidate, windows: Windows, progress: Progress = silent
) -> tuple[LayerDrift, ...]:
    """Every linear layer that both have, in the model's order.

    Holds one layer's weights at a time. Raises DataError for exports (see `check`), MismatchError when a
    layer's shapes differ.
    """
    check(trained, candidate)
    assert isinstance(trained.runner, TorchReference)
    layers = _Layers(trained, candidate)
    kl = kl_of_each(trained.runner, _pieces(windows), list(layers.names), layers.exchanged, progress)
    return tuple(layers.drift(name, kl[name]) for name in layers.names)


class _Layers:
    """The linear layers that both sides have, each exchanged in the reference by itself.

    names: by their names in the model, in its order, those in its checkpoint.
    """

    def __init__(self, trained: OpenedReference, candidate: OpenedCandidate) -> None:
        assert trained.checkpoint is not None and candidate.checkpoint is not None
        assert isinstance(trained.runner, TorchReference)
        self._trained, self._model = trained, trained.runner.model
        self._base, self._stored = trained.checkpoint, candidate.checkpoint
        own = {name: name.removeprefix(_WRAPPED) for name, _ in self._model.named_modules()}
        both = self._base.linears.keys() & self._stored.linears.keys()
        self.names = {name: module for name, module in own.items() if module in both}
        self._powers: dict[str, list[tuple[float, float]]] = {}
        self._weights: dict[str, LayerDrift] = {}

    @contextmanager
    def exchanged(self, name: str) -> Iterator[None]:
        """Let one layer compute with the artefact's weight, and look at what it gives then."""
        module = self.names[name]
        pair = _load(self._trained, self._base, self._stored, module)
        if name not in self._weights:
            self._weights[name] = _of_weights(self._stored, module, pair)
        with _replaced(self._model.get_submodule(name), pair, self._powers.setdefault(name, [])):
            yield

    def drift(self, name: str, kl: float) -> LayerDrift:
        """Everything about a layer that was exchanged."""
        signal, noise = (sum(power[part] for power in self._powers[name]) for part in (0, 1))
        ratio = float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else None
        return replace(self._weights[name], output_snr=ratio, kl=kl)


def _pieces(windows: Windows) -> list[Int64]:
    """Beginnings of windows from different parts of the text."""
    step = max(1, len(windows.tokens) // _PIECES)
    return [window[: _TOKENS // _PIECES] for window in windows.tokens[::step]][:_PIECES]


def _load(trained: OpenedReference, base: Checkpoint, stored: Checkpoint, module: str) -> _Pair:
    weight, quantized = base.dequantize(module), stored.dequantize(module)
    if weight.shape != quantized.shape:
        raise MismatchError(
            f"{module} has shape {list(quantized.shape)} in {stored.path} and {list(weight.shape)} in "
            f"{base.path}; they are different models"
        )
    if not any(module in adapter.vectors for adapter, _ in trained.adapters):
        return _Pair(weight, quantized, None)
    delta = effect(module, weight, trained.adapters, trained.projections)
    return _Pair(weight + delta, quantized, delta)


@contextmanager
def _replaced(layer: Any, pair: _Pair, powers: list[tuple[float, float]]) -> Iterator[None]:
    """Let a layer compute with the artefact's weight; adds (signal, error) powers of its outputs."""
    inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    stored, exact = torch.from_numpy(pair.stored), torch.from_numpy(pair.exact)

    def instead(_: Any, inputs: Sequence[torch.Tensor], __: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        found, wanted = x @ stored.T, x @ exact.T
        powers.append((float((wanted.double() ** 2).sum()), float(((found - wanted).double() ** 2).sum())))
        return found if inner.bias is None else found + inner.bias

    handle = layer.register_forward_hook(instead)
    try:
        yield
    finally:
        handle.remove()


def _of_weights(stored: Checkpoint, module: str, pair: _Pair) -> LayerDrift:
    """What the weights alone say of a layer."""
    squares = np.zeros(4)  # of the error, the exact weight, the delta; and <Q - W, dW>
    for start in range(0, len(pair.exact), _ROWS):
        rows = slice(start, start + _ROWS)
        error = (pair.stored[rows] - pair.exact[rows]).astype(np.float64)
        exact = pair.exact[rows].astype(np.float64)
        delta = np.zeros_like(error) if pair.delta is None else pair.delta[rows].astype(np.float64)
        # Q - W = error + dW
        products = ((error, error), (exact, exact), (delta, delta), (error + delta, delta))
        squares += [float(np.vdot(one, other)) for one, other in products]
    error_size, weight_size, delta_size = (float(np.sqrt(square)) for square in squares[:3])
    return LayerDrift(
        module=module,
        bytes=sum(stored.tensors[name].nbytes for name in stored.linears[module].tensors.values()),
        weight_error=error_size / (weight_size or 1.0),
        delta_error=error_size / delta_size if delta_size else None,
        retained=float(squares[3] / squares[2]) if delta_size else None,
    )
