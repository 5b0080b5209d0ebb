"""Changes of a model: weights exchanged, and what linears read rounded as a runtime does.

ONNX Runtime rounds what a layer in integer blocks reads, too: to 8 bits, block by block, with the largest
magnitude of a block on 127 (accuracy level 4 of `MatMulNBits`). On SmolLM2 in int8 that is most of the drift,
so the same is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from vera_edge.exporting.exporter import Runner
from vera_edge.progress import Progress, silent

_TOP = 127.0


@dataclass(frozen=True)
class Change:
    """Parameters by name, and the linears whose inputs a runtime rounds then, in blocks of what size."""

    weights: Mapping[str, torch.Tensor]
    rounded: Mapping[str, int] = field(default_factory=dict)


# What an exchange of a unit of linears is, given what they read (tokens, in); None where nothing is lost.
ChangeOf = Callable[[Sequence[str], torch.Tensor], Change | None]
# What changes outside of the layers, of PARTS of the model.
PARTS = ("input", "output")
Outside = Callable[[Sequence[str]], Change]


class Replaying(Protocol):
    """A causal model over a few windows, as trained and with changes; in memory, or read layer by layer."""

    def each(
        self,
        outside: Sequence[Outside],
        units: Sequence[Sequence[str]],
        change_of: ChangeOf,
        progress: Progress,
    ) -> list[float]:
        """Mean KL in nats of every change alone: of `outside` first, then of units in the model's order."""

    def joint(self, change_of: Callable[[int], Change], outside: Outside) -> float:
        """The KL of a change of everything. change_of: what changes in a layer, by its number."""

    def kl_of(self, runner: Runner, progress: Progress = silent) -> float:
        """Mean KL in nats from the model as trained to what a runner gives for the same tokens."""

    def depth_of(self, name: str) -> int:
        """The layer that holds a parameter or module; 0 for one outside of the layers."""


@contextmanager
def changed(model: Any, change: Change) -> Iterator[None]:
    """Let a model have a change for as long as this lasts."""
    parameters = {name: model.get_parameter(name) for name in change.weights}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    layers = ((model.get_submodule(module), block) for module, block in change.rounded.items())
    with hooked(*(layer.register_forward_pre_hook(_rounding(block)) for layer, block in layers)):
        try:
            for name, parameter in parameters.items():
                parameter.data = change.weights[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = kept[name]


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
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
