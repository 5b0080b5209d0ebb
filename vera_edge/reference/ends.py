"""The output head of a language model in torch, and what it reads behind layers that have run already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vera_edge.arrays import Float32, Int64
from vera_edge.errors import DataError
from vera_edge.reference.layers import forward


class _Stop(Exception):
    """Raised where nothing more is wanted of a forward pass."""


@dataclass(frozen=True)
class OutputHead:
    """The linear that gives the logits; its weight (vocabulary, hidden) may be the embeddings' too."""

    linear: nn.Linear

    @classmethod
    def of(cls, model: Any) -> OutputHead | None:
        """That of a model; None where it has no plain one."""
        found = model.get_output_embeddings()
        return cls(found) if type(found) is nn.Linear else None

    @property
    def parameter(self) -> nn.Parameter:
        """Its weight as the model has it."""
        found = self.linear.weight
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def weight(self) -> Float32:
        """(vocabulary, hidden)."""
        found: Float32 = self.linear.weight.detach().numpy()
        return found

    def shares(self, embeddings: nn.Module) -> bool:
        """Whether its weight is that of the embeddings, or a stand-in for the same."""
        table = getattr(embeddings, "weight", None)
        return isinstance(table, torch.Tensor) and table.data_ptr() == self.parameter.data_ptr()

    def reads(self, run: Callable[[], Any]) -> torch.Tensor:
        """What it reads, (tokens, hidden), while `run` runs the model, which ends there."""
        found: list[torch.Tensor] = []

        def before(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            found.append((*args, *kwargs.values())[0])
            raise _Stop

        handle = self.linear.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with suppress(_Stop):
                run()
        finally:
            handle.remove()
        if not found:
            raise DataError("the text never reaches the model's output head; choose --head int8")
        return found[0].reshape(-1, found[0].shape[-1])


def widths(model: nn.Module, layers: Sequence[nn.Module], window: Int64) -> list[int | None]:
    """How many things each layer gives in a tuple, None for hidden states alone; by one forward pass."""
    found: list[int | None] = []

    def after(_: nn.Module, __: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple) else None)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(after).remove)
        forward(model, window)
    return found


def after_layers(
    model: nn.Module,
    layers: Sequence[nn.Module],
    shapes: Sequence[int | None],
    window: Int64,
    hidden: torch.Tensor,
) -> Any:
    """The model's output where its last layer gives `hidden`, without computing any. shapes: `widths`."""

    def instead(width: int | None) -> Callable[..., Any]:
        output = hidden if width is None else (hidden, *(None for _ in range(width - 1)))
        return lambda *_, **__: output

    try:
        for layer, width in zip(layers, shapes, strict=True):
            vars(layer)["forward"] = instead(width)
        return forward(model, window)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
