"""How large the inputs of linear layers are on a text: what llama.cpp calls an importance matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vera_edge.arrays import Float64, Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import DataError
from vera_edge.progress import Progress, silent
from vera_edge.reference import room
from vera_edge.reference.model import open_reference
from vera_edge.trained.alignment import names_in


@dataclass(frozen=True)
class Squares:
    """sums: (inputs,) of each input's square over `count` tokens."""

    sums: Float64
    count: int


def input_squares(
    checkpoint: Checkpoint,
    modules: Collection[str],
    windows: Sequence[Int64],
    max_memory: int | None = None,
    progress: Progress = silent,
) -> Mapping[str, Squares]:
    """Those of the linears `modules` while `windows` of token ids run through the model in float32.

    A module that no text reaches isn't among them. max_memory: see `room.fits`. Raises DataError without any
    text, or when transformers' model has no such modules.
    """
    if not windows:
        raise DataError("there is no text to calibrate with; give a longer file")
    light = not room.fits(checkpoint, max_memory)
    reference = open_reference(checkpoint, layer_by_layer=light)
    names = names_in(reference.model, modules)
    if names is None:
        raise DataError(
            f"layers of {checkpoint.path} go by other names in transformers' model, so that what they read "
            "can't be measured"
        )
    sums = {module: _Sum() for module in modules}
    hooks = [
        reference.model.get_submodule(names[module]).register_forward_pre_hook(found.add)
        for module, found in sums.items()
    ]
    try:
        for number, _ in enumerate(reference.logits_of(windows)):
            progress("measuring inputs", number + 1, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    return {module: found.value() for module, found in sums.items() if found.count}


class _Sum:
    def __init__(self) -> None:
        self.count = 0
        self._total: torch.Tensor | None = None

    def add(self, module: Any, args: tuple[Any, ...]) -> None:
        """A forward hook: adds what a layer reads, (..., inputs)."""
        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        squares = rows.double().square().sum(dim=0)
        self._total = squares if self._total is None else self._total + squares
        self.count += len(rows)

    def value(self) -> Squares:
        assert self._total is not None
        return Squares(self._total.numpy(), self.count)
