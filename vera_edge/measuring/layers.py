"""Drift by layer: how far each weight is from the exact merged one, and what that does to the model.

Errors of weights cost nothing to find. What they do at a layer's output is measured on a few windows of the
text, and which layer causes the drift by taking one layer at a time from the artefact, all others as trained.
That is two forward passes of 128 tokens for each linear, from the layer on that it lies in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring.metrics import compare
from vera_edge.measuring.opened_candidate import OpenedCandidate
from vera_edge.measuring.opened_reference import OpenedReference
from vera_edge.measuring.result import LayerDrift
from vera_edge.progress import Progress, silent
from vera_edge.reference.layers import stack_of
from vera_edge.text.windows import Windows

# Tokens that the passes run on: layers are ranked by them, not measured to the last digit.
_TOKENS = 256
_PIECES = 2
_WRAPPED = "base_model.model."  # what PEFT puts before a module's name


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
    assert trained.checkpoint is not None and candidate.checkpoint is not None
    shared = _in_model_order(trained, candidate.checkpoint)
    passes = _Passes(trained, _pieces(windows), shared)
    reference = passes.record()
    found = []
    for index, module in enumerate(shared):
        progress("measuring layer by layer", index, len(shared))
        pair = _load(trained, trained.checkpoint, candidate.checkpoint, module)
        with _replaced(trained, module, pair) as powers:
            kl = [
                compare(before, passes.logits(row, module), passes.pieces[row][1:]).kl
                for row, before in enumerate(reference)
            ]
        found.append(_describe(candidate.checkpoint, module, pair, powers, float(np.concatenate(kl).mean())))
    progress("measuring layer by layer", len(shared), len(shared))
    return tuple(found)


class _Passes:
    """Forward passes over the same pieces, in which layers before one that changed give what they gave."""

    def __init__(
        self, trained: OpenedReference, pieces: list[npt.NDArray[np.int64]], modules: Sequence[str]
    ) -> None:
        self.pieces, self._runner = pieces, trained.runner
        model, names = _model(trained), _names(trained)
        self._stack, self._layers = stack_of(model, [names[module] for module in modules])
        self._stack = self._stack.removeprefix(_WRAPPED)
        self._given: list[list[Any]] = []

    def record(self) -> list[Float32]:
        """The logits (n - 1, vocab) of every piece, as the model is."""
        logits = []
        for piece in self.pieces:
            given: list[Any] = []
            with ExitStack() as hooks:
                for layer in self._layers:
                    handle = layer.register_forward_hook(lambda _, __, output, to=given: to.append(output))
                    hooks.callback(handle.remove)
                logits.append(self._runner.logits(piece)[:-1])
            self._given.append(given)
        return logits

    def logits(self, row: int, module: str) -> Float32:
        """The same of one piece, where nothing that comes before `module` has changed."""
        given, first = self._given[row], self._place(module)
        with ExitStack() as kept:
            for layer, output in zip(self._layers[:first], given, strict=False):
                kept.enter_context(_giving(layer, output))
            return self._runner.logits(self.pieces[row])[:-1]

    def _place(self, module: str) -> int:
        """How many layers come before the one that holds `module`; 0 where that can't be told."""
        inside = module.removeprefix(f"{self._stack}.")
        if inside == module or any(len(given) != len(self._layers) for given in self._given):
            return 0
        return int(inside.partition(".")[0])


@contextmanager
def _giving(layer: Any, output: Any) -> Iterator[None]:
    """Let a layer give this without computing it."""
    layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del layer.forward


def _pieces(windows: Windows) -> list[npt.NDArray[np.int64]]:
    """Beginnings of windows from different parts of the text."""
    step = max(1, len(windows.tokens) // _PIECES)
    return [window[: _TOKENS // _PIECES] for window in windows.tokens[::step]][:_PIECES]


def _in_model_order(trained: OpenedReference, stored: Checkpoint) -> list[str]:
    assert trained.checkpoint is not None
    known = trained.checkpoint.linears
    return [name for name in _names(trained) if name in stored.linears and name in known]


def _names(trained: OpenedReference) -> dict[str, str]:
    """The model's own names of modules, by those in its checkpoint, in its order."""
    return {name.removeprefix(_WRAPPED): name for name, _ in _model(trained).named_modules()}


def _model(trained: OpenedReference) -> Any:
    from vera_edge.reference.model import TorchReference

    assert isinstance(trained.runner, TorchReference)
    return trained.runner.model


def _load(trained: OpenedReference, base: Checkpoint, stored: Checkpoint, module: str) -> _Pair:
    weight, quantized = base.dequantize(module), stored.dequantize(module)
    if weight.shape != quantized.shape:
        raise MismatchError(
            f"{module} has shape {list(quantized.shape)} in {stored.path} and {list(weight.shape)} in "
            f"{base.path}; they are different models"
        )
    deltas = [
        np.float32(scale) * trained.projections.delta(vectors.lambda_b, vectors.lambda_d, weight.shape[1])
        for adapter, scale in trained.adapters
        if trained.projections is not None and (vectors := adapter.vectors.get(module)) is not None
    ]
    if not deltas:
        return _Pair(weight, quantized, None)
    delta: Float32 = np.sum(deltas, axis=0, dtype=np.float32)
    return _Pair(weight + delta, quantized, delta)


@contextmanager
def _replaced(trained: OpenedReference, module: str, pair: _Pair) -> Iterator[list[tuple[float, float]]]:
    """Let one layer compute with the artefact's weight; yields (signal, error) powers of its outputs."""
    layer = _model(trained).get_submodule(_names(trained)[module])
    inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    stored, exact = torch.from_numpy(pair.stored), torch.from_numpy(pair.exact)
    powers: list[tuple[float, float]] = []

    def instead(_: Any, inputs: Sequence[torch.Tensor], __: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        found, wanted = x @ stored.T, x @ exact.T
        powers.append((float((wanted.double() ** 2).sum()), float(((found - wanted).double() ** 2).sum())))
        return found if inner.bias is None else found + inner.bias

    handle = layer.register_forward_hook(instead)
    try:
        yield powers
    finally:
        handle.remove()


def _describe(
    stored: Checkpoint, module: str, pair: _Pair, powers: list[tuple[float, float]], kl: float
) -> LayerDrift:
    linear = stored.linears[module]
    error = (pair.stored - pair.exact).astype(np.float64)
    delta = None if pair.delta is None else pair.delta.astype(np.float64)
    size = float(np.linalg.norm(delta)) if delta is not None else 0.0
    signal, noise = (sum(part) for part in zip(*powers, strict=True))
    return LayerDrift(
        module=module,
        bytes=sum(stored.tensors[name].nbytes for name in linear.tensors.values()),
        weight_error=float(np.linalg.norm(error) / (np.linalg.norm(pair.exact.astype(np.float64)) or 1.0)),
        delta_error=float(np.linalg.norm(error)) / size if size else None,
        # <Q - W, dW> with Q - W = error + dW.
        retained=float(np.sum((error + delta) * delta)) / size**2 if delta is not None and size else None,
        output_snr=float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else None,
        kl=kl,
    )
