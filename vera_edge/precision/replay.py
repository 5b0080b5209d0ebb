"""What one unit's rounding does to the model: its KL divergence, all other weights as trained.

The layers before a unit give what they give as trained, so they are run once for all units of a layer and
what the last of them gave is handed to the next. A unit of layer i then costs the layers from i on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vera_edge.errors import DataError

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

# Rows of logits at once: a vocabulary of 50,000 then takes 13 MB.
_ROWS = 64


class _Stop(Exception):
    """Raised by a hook: the output that was wanted of this forward pass is there."""


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
    _start: int = field(init=False, default=0)
    _given: list[Any] = field(init=False, default_factory=list)
    _reference: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if not self.windows:
            raise DataError("there is no text to measure on; give a longer file")
        lists = {name: item for name, item in self.model.named_modules() if isinstance(item, nn.ModuleList)}
        inside = {name: sum(module.startswith(f"{name}.") for module in self.modules) for name in lists}
        name = max(inside, key=lambda name: (inside[name], -len(name)), default="")
        self.layers = list(lists[name]) if name and inside[name] else []
        self._prefix = f"{name}."
        with torch.inference_mode():
            self._reference = [torch.log_softmax(self.logits(row), -1) for row in range(len(self.windows))]

    def kl(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Mean KL in nats from the model as trained to it with these parameters, by name, exchanged.

        Ask for units in the order of their layers: going back costs a run through the layers before.
        """
        depth = min((self._layer_of(name) for name in weights), default=0)
        with torch.inference_mode():
            self._go_to(depth)
            with _exchanged(self.model, weights):
                found = [
                    divergence(reference, self.logits(row)) for row, reference in enumerate(self._reference)
                ]
        kl = float(torch.cat(found).mean())
        if not np.isfinite(kl):
            raise DataError("the model's logits hold NaN or infinities; the model or its weights are broken")
        return kl

    def logits(self, row: int) -> torch.Tensor:
        """Logits (n, vocabulary) of one window, from the layer that was gone to."""
        with self._skipping(row):
            found: torch.Tensor = self._forward(row).logits[0].float()
            return found

    def _forward(self, row: int) -> Any:
        tokens = torch.from_numpy(np.ascontiguousarray(self.windows[row][None]))
        return self.model(input_ids=tokens, use_cache=False)

    def _layer_of(self, name: str) -> int:
        """The layer that holds a parameter; 0, the whole model, for one outside the stack."""
        number = name.removeprefix(self._prefix).split(".")[0]
        return int(number) if name.startswith(self._prefix) and number.isdigit() else 0

    def _go_to(self, depth: int) -> None:
        if depth < self._start:
            self._start, self._given = 0, []
        while self._start < depth:
            given = [self._output(row) for row in range(len(self.windows))]
            self._start, self._given = self._start + 1, given

    def _output(self, row: int) -> Any:
        """What layer `start` gives, as it gives it."""
        found: list[Any] = []

        def after(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output)
            raise _Stop

        handle = self.layers[self._start].register_forward_hook(after)
        try:
            with self._skipping(row), suppress(_Stop):
                self._forward(row)
        finally:
            handle.remove()
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
def _exchanged(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    parameters = {name: model.get_parameter(name) for name in weights}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL (n,) of each row: `reference` log-probabilities (n, vocabulary), `logits` the other model's.

    `sum p (e^d - 1 - d)` with d = ln q - ln p is the same sum as `-sum p d`, but none of its terms is
    negative, so that float32 is enough for a KL of 1e-9.
    """
    found = []
    for start in range(0, len(reference), _ROWS):
        p = reference[start : start + _ROWS]
        d = torch.log_softmax(logits[start : start + _ROWS], -1) - p
        found.append((p.exp() * (torch.expm1(d) - d)).sum(-1))
    return torch.cat(found)


def reference_logits(model: Any, windows: Sequence[Int64]) -> list[Float32]:
    """Teacher-forced logits (n, vocabulary) float32 of each window."""
    found = []
    with torch.inference_mode():
        for window in windows:
            tokens = torch.from_numpy(np.ascontiguousarray(window[None]))
            found.append(model(input_ids=tokens, use_cache=False).logits[0].float().numpy())
    return found
