"""What rounding some weights does to the model: its KL divergence, all other weights as trained.

The layers before a unit give what they give as trained, so they are run once for all units of a layer and
what the last of them gave is handed to the next. A unit of layer i then costs the layers from i on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from vera_edge.arrays import Int64
from vera_edge.errors import DataError
from vera_edge.exporting.exporter import Runner
from vera_edge.precision.changes import PARTS, Change, ChangeOf, Outside, changed, hooked
from vera_edge.progress import Progress, silent
from vera_edge.reference.layers import stack_of

# Rows of logits at once: with a vocabulary of 50,000 they take 3 MB, which caches hold.
_ROWS = 16
_LARGE = 80.0  # e to the power of more overflows float32


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
    _batches: list[torch.Tensor] = field(init=False)
    _start: int = field(init=False, default=0)
    _given: list[Any] = field(init=False, default_factory=list)
    _reference: list[torch.Tensor] = field(init=False)
    _shares: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        name, self.layers = stack_of(self.model, self.modules)
        self._prefix = f"{name}."
        self._batches = [torch.from_numpy(batch) for batch in batches_of(self.windows)]
        with torch.inference_mode():
            self._reference = [self._logits(row) for row in range(len(self._batches))]
            self._shares = [torch.softmax(logits, -1) for logits in self._reference]

    def each(
        self,
        outside: Sequence[Outside],
        units: Sequence[Sequence[str]],
        change_of: ChangeOf,
        progress: Progress,
    ) -> list[float]:
        """Mean KL in nats of every change alone: of `outside` first, then of units in the model's order."""
        found = [self.kl(change(PARTS)) for change in outside]
        for number, modules in enumerate(units):
            progress("measuring sensitivities", number, len(units))
            change = change_of(modules, self.inputs(modules[0]))
            found.append(0.0 if change is None else self.kl(change))
        progress("measuring sensitivities", len(units), len(units))
        return found

    def kl(self, change: Change) -> float:
        """Mean KL in nats from the model as trained to it with this change.

        Ask for units in the order of their layers: going back costs a run through the layers before.
        """
        depth = min((self.depth_of(name) for name in (*change.weights, *change.rounded)), default=0)
        with torch.inference_mode():
            self._go_to(depth)
            with changed(self.model, change):
                return self._divergence()

    def joint(self, change_of: Callable[[int], Change], outside: Outside) -> float:
        """The KL of a change of everything, the changed weights of one layer at a time in memory.

        change_of: what changes in a layer of the stack, by its number.
        """
        with torch.inference_mode(), changed(self.model, outside(PARTS)):
            self._start, self._given = 0, []
            for depth in range(len(self.layers)):
                with changed(self.model, change_of(depth)):
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
            with hooked(self.model.get_submodule(module).register_forward_pre_hook(before)):
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
            found.append(divergence(shares, reference, logits_of(runner, tokens.numpy())))
        return mean_of(found)

    def depth_of(self, name: str) -> int:
        """The layer that holds a parameter; 0, the whole model, for one outside the stack."""
        return depth_in(name, self._prefix)

    def _divergence(self) -> float:
        parts = zip(self._shares, self._reference, strict=True)
        return mean_of([divergence(*part, self._logits(row)) for row, part in enumerate(parts)])

    def _logits(self, row: int) -> torch.Tensor:
        """Logits (n, vocabulary) of one batch, from the layer that was gone to.

        As in drift, the last position of a window isn't judged.
        """
        with self._skipping(row):
            return rows_of(self._forward(row))

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

        watched = hooked(self.layers[self._start].register_forward_hook(after))
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


def batches_of(windows: Sequence[Int64]) -> list[Int64]:
    """Windows of one length together, (rows, n), the shortest first. Raises DataError without any."""
    if not windows:
        raise DataError("there is no text to measure on; give a longer file")
    ordered = sorted(windows, key=len)
    return [np.stack(list(group)) for _, group in groupby(ordered, key=len)]


def rows_of(output: Any) -> torch.Tensor:
    """The logits (tokens, vocabulary) that are judged: as in drift, not those after a window's last token."""
    found: torch.Tensor = output.logits[:, :-1].float()
    return found.reshape(-1, found.shape[-1])


def logits_of(runner: Runner, tokens: Int64) -> torch.Tensor:
    """The same of a runner, for a batch of windows (rows, n)."""
    return torch.from_numpy(np.concatenate([runner.logits(window)[:-1] for window in tokens]))


def depth_in(name: str, prefix: str) -> int:
    """The number behind `prefix` in the name of a parameter or a module; 0 without that."""
    number = name.removeprefix(prefix).split(".")[0]
    return int(number) if name.startswith(prefix) and number.isdigit() else 0


def mean_of(found: Sequence[torch.Tensor]) -> float:
    """The mean KL of all rows. Raises DataError when it isn't a number."""
    kl = float(torch.cat(list(found)).mean())
    if not np.isfinite(kl):
        raise DataError("the model's logits hold NaN or infinities; the model or its weights are broken")
    return kl


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
