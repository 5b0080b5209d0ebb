"""What rounding some weights does to the model: its KL divergence, all other weights as trained.

The layers before a unit give what they give as trained, so they are run once for all units of a layer and
what the last of them gave is handed to the next. A unit of layer i then costs the layers from i on.

ONNX Runtime rounds what a layer in integer blocks reads, too: to 8 bits, block by block, with the largest
magnitude of a block on 127 (accuracy level 4 of `MatMulNBits`). On SmolLM2 in int8 that is most of the drift,
so the same is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from vera_edge.arrays import Int64
from vera_edge.errors import DataError
from vera_edge.exporting.target import Runner
from vera_edge.progress import Progress, silent
from vera_edge.reference.layers import stack_of

# Rows of logits at once: with a vocabulary of 50,000 they take 3 MB, which caches hold.
_ROWS = 16
_TOP = 127.0
_LARGE = 80.0  # e to the power of more overflows float32


class _Stop(Exception):
    """Raised by a hook: the output that was wanted of this forward pass is there."""


@dataclass(frozen=True)
class Change:
    """Parameters by name, and the linears whose inputs a runtime rounds then, in blocks of what size."""

    weights: Mapping[str, torch.Tensor]
    rounded: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Replay:
    """A causal model over a few windows of token ids; its weights are those of the model as trained.

    modules: the linears that may be exchanged. They decide which of the model's lists is its stack of layers.
    """

    model: Any
    modules: Sequence[str]
    windows: Sequence[Int64]
    layers: list[nn.Module] = field(init=False)
    _prefix: str = field(init=False)
    _batches: list[torch.Tensor] = field(init=False)
    _start: int = field(init=False, default=0)
    _given: list[Any] = field(init=False, default_factory=list)
    _reference: list[torch.Tensor] = field(init=False)
    _shares: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if not self.windows:
            raise DataError("there is no text to measure on; give a longer file")
        name, self.layers = stack_of(self.model, self.modules)
        self._prefix = f"{name}."
        # Windows of one length run together.
        self.windows = sorted(self.windows, key=len)
        by_length = groupby(self.windows, key=len)
        self._batches = [torch.from_numpy(np.stack(list(group))) for _, group in by_length]
        with torch.inference_mode():
            self._reference = [self._logits(row) for row in range(len(self._batches))]
            self._shares = [torch.softmax(logits, -1) for logits in self._reference]

    def kl(self, change: Change) -> float:
        """Mean KL in nats from the model as trained to it with this change.

        Ask for units in the order of their layers: going back costs a run through the layers before.
        """
        depth = min((self.depth_of(name) for name in (*change.weights, *change.rounded)), default=0)
        with torch.inference_mode():
            self._go_to(depth)
            with self._changed(change):
                return self._divergence()

    def joint(self, change_of: Callable[[int], Change], whole: Change) -> float:
        """The KL of a change of everything, the weights of one layer at a time in memory.

        change_of: what changes in a layer of the stack, by its number. whole: what changes outside the stack.
        """
        with torch.inference_mode(), self._changed(whole):
            self._start, self._given = 0, []
            for depth in range(len(self.layers)):
                with self._changed(change_of(depth)):
                    given = [self._output(row) for row in range(len(self._batches))]
                self._start, self._given = depth + 1, given
            found = self._divergence()
        self._start, self._given = 0, []
        return found

    def inputs(self, module: str) -> torch.Tensor:
        """What a linear of the stack reads in the model as trained, (tokens, in)."""
        found: list[torch.Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].reshape(-1, args[0].shape[-1]))
            raise _Stop

        with torch.inference_mode():
            self._go_to(self.depth_of(module))
            with _hooked(self.model.get_submodule(module).register_forward_pre_hook(before)):
                for row in range(len(self._batches)):
                    with self._skipping(row), suppress(_Stop):
                        self._forward(row)
        return torch.cat(found)

    def kl_of(self, runner: Runner, progress: Progress = silent) -> float:
        """Mean KL in nats from the model as trained to what a runner gives for the same tokens."""
        found = []
        for number, (tokens, shares, reference) in enumerate(
            zip(self._batches, self._shares, self._reference, strict=True)
        ):
            progress("measuring the plan", number, len(self._batches))
            logits = np.concatenate([runner.logits(window.numpy())[:-1] for window in tokens])
            found.append(divergence(shares, reference, torch.from_numpy(logits)))
        return _mean(found)

    def depth_of(self, name: str) -> int:
        """The layer that holds a parameter; 0, the whole model, for one outside the stack."""
        number = name.removeprefix(self._prefix).split(".")[0]
        return int(number) if name.startswith(self._prefix) and number.isdigit() else 0

    def _divergence(self) -> float:
        parts = zip(self._shares, self._reference, strict=True)
        return _mean([divergence(*part, self._logits(row)) for row, part in enumerate(parts)])

    def _logits(self, row: int) -> torch.Tensor:
        """Logits (n, vocabulary) of one batch, from the layer that was gone to.

        As in drift, the last position of a window isn't judged.
        """
        with self._skipping(row):
            found: torch.Tensor = self._forward(row).logits[:, :-1].float()
            return found.reshape(-1, found.shape[-1])

    def _forward(self, row: int) -> Any:
        return self.model(input_ids=self._batches[row], use_cache=False)

    def _go_to(self, depth: int) -> None:
        if depth < self._start:
            self._start, self._given = 0, []
        while self._start < depth:
            given = [self._output(row) for row in range(len(self._batches))]
            self._start, self._given = self._start + 1, given

    def _output(self, row: int) -> Any:
        """What layer `start` gives, as it gives it."""
        found: list[Any] = []

        def after(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output)
            raise _Stop

        watched = _hooked(self.layers[self._start].register_forward_hook(after))
        with watched, self._skipping(row), suppress(_Stop):
            self._forward(row)
        return found[0]

    @contextmanager
    def _skipping(self, row: int) -> Iterator[None]:
        """Let the layers before `start` give what the last of them is known to give."""
        skipped = self.layers[: self._start]

        def known(*_: Any, **__: Any) -> Any:
            return self._given[row]

        for layer in skipped:
            instance: Any = layer
            instance.forward = known
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward

    @contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        parameters = {name: self.model.get_parameter(name) for name in change.weights}
        kept = {name: parameter.data for name, parameter in parameters.items()}
        layers = ((self.model.get_submodule(module), block) for module, block in change.rounded.items())
        with _hooked(*(layer.register_forward_pre_hook(_rounding(block)) for layer, block in layers)):
            try:
                for name, parameter in parameters.items():
                    parameter.data = change.weights[name]
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.data = kept[name]


def _mean(found: Sequence[torch.Tensor]) -> float:
    kl = float(torch.cat(list(found)).mean())
    if not np.isfinite(kl):
        raise DataError("the model's logits hold NaN or infinities; the model or its weights are broken")
    return kl


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    """Remove these hooks in the end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _rounding(block: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(args[0], block), *args[1:])

    return before


def rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """What a layer in blocks of integers computes with where it is given x (..., in)."""
    inside = x.shape[-1]
    padded = nn.functional.pad(x, (0, -inside % block))
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    scales = blocks.abs().amax(-1, keepdim=True) / _TOP
    levels = torch.round(blocks / torch.where(scales == 0, 1.0, scales))
    return (levels * scales).reshape(padded.shape)[..., :inside]


def divergence(shares: torch.Tensor, reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL (n,) of each row: `reference` logits (n, vocabulary), their softmax `shares`, the other's `logits`.

    With u the difference of logits less its mean under p, KL = ln sum p e^u = ln(1 + sum p (e^u - 1 - u)):
    none of the terms is negative, so that float32 is enough for a KL of 1e-9.
    """
    found = []
    for start in range(0, len(shares), _ROWS):
        rows = slice(start, start + _ROWS)
        p, u = shares[rows], logits[rows] - reference[rows]
        u -= (p * u).sum(-1, keepdim=True)
        if u.max() < _LARGE:
            found.append(torch.log1p((p * (torch.expm1(u) - u)).sum(-1)))
        else:
            theirs, own = (torch.log_softmax(part[rows], -1) for part in (logits, reference))
            found.append(nn.functional.kl_div(theirs, own, reduction="none", log_target=True).sum(-1))
    return torch.cat(found)
