"""The same as replay.py of a model that is read layer by layer: every weight once for all units together.

What comes before a unit's change is the model's as it is, and all changed models go through the later layers
together (`vera_edge.reference.carried`). The numbers are those of the model in memory. Logits of the model as
it is are kept like hidden states, and their softmax isn't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vera_edge.arrays import Int64
from vera_edge.exporting.exporter import Runner
from vera_edge.precision.changes import PARTS, Change, ChangeOf, Outside, changed, hooked
from vera_edge.precision.replay import batches_of, depth_in, divergence, logits_of, mean_of, rows_of
from vera_edge.progress import Progress, silent
from vera_edge.reference.carried import Carried, Exchange, Made
from vera_edge.reference.hidden_states import HiddenStates
from vera_edge.reference.streamed import LayerStream, Run

_ROWS = 64  # of logits whose softmax is kept at a time


class _Stop(Exception):
    """Raised by a hook: what was wanted of this layer is there."""


class StreamedReplay:
    """A causal model over a few windows of token ids, as trained, that is read layer by layer."""

    def __init__(self, stream: LayerStream, windows: Sequence[Int64]) -> None:
        self._stream, self._model = stream, stream.model
        self._batches = batches_of(windows)

    def each(
        self,
        outside: Sequence[Outside],
        units: Sequence[Sequence[str]],
        change_of: ChangeOf,
        progress: Progress,
    ) -> list[float]:
        """Mean KL in nats of every change alone: of `outside` first, then of units in the model's order."""
        exchanges = [self._outside(change) for change in outside]
        exchanges += [self._unit(modules, change_of) for modules in units]
        found: list[list[torch.Tensor]] = [[] for _ in exchanges]
        reference = torch.empty(0)
        passes = Carried(self._stream, self._stream.view, self._batches, exchanges, "measuring sensitivities")
        for _, place, logits in passes.outputs(rows_of, progress):
            if place is None:
                reference = logits
            else:
                found[place].append(_divergence(reference, logits))
        return [mean_of(parts) if parts else 0.0 for parts in found]

    def joint(self, change_of: Callable[[int], Change], outside: Outside) -> float:
        """The KL of a change of everything. change_of: what changes in a layer, by its number."""
        stream, reference = self._stream, self._reference  # which is made of the model as it is
        run = Run(stream, stream.view, self._batches, HiddenStates())
        with torch.inference_mode():
            with changed(self._model, outside(PARTS[:1])):
                run.start({})
            for index, layer in enumerate(stream.layers):
                read: dict[str, torch.Tensor] = {}
                with (
                    stream.weights.placed(layer.parameters(), read),
                    changed(self._model, change_of(index)),
                ):
                    run.layer(index, read)
            found, read = [], {}
            with changed(self._model, outside(PARTS[1:])):
                for row in range(len(self._batches)):
                    logits = rows_of(run.end(row, read))
                    found.append(_divergence(reference[row], logits))
        return mean_of(found)

    def kl_of(self, runner: Runner, progress: Progress = silent) -> float:
        """Mean KL in nats from the model as trained to what a runner gives for the same tokens."""
        found = []
        for row, tokens in enumerate(self._batches):
            progress("measuring the plan", row, len(self._batches))
            found.append(_divergence(self._reference[row], logits_of(runner, tokens)))
        return mean_of(found)

    def depth_of(self, name: str) -> int:
        """The layer that holds a parameter or module; 0 for one outside of the layers."""
        return depth_in(name, f"{self._stream.name}.")

    @cached_property
    def _reference(self) -> HiddenStates:
        """The logits of every batch as the model is."""
        found = HiddenStates()
        for row, _, logits in Carried(self._stream, self._stream.view, self._batches, ()).outputs(rows_of):
            found[row] = logits
        return found

    def _outside(self, change: Outside) -> Exchange:
        def made(parts: Sequence[str]) -> Made:
            return lambda _: changed(self._model, change(parts))

        return Exchange(None, made(PARTS[:1]), made(PARTS[1:]))

    def _unit(self, modules: Sequence[str], change_of: ChangeOf) -> Exchange:
        depth = self.depth_of(modules[0])

        def made(base: Run) -> AbstractContextManager[None] | None:
            change = change_of(modules, self._inputs(base, depth, modules[0]))
            return None if change is None else changed(self._model, change)

        return Exchange(depth, made)

    def _inputs(self, run: Run, depth: int, module: str) -> torch.Tensor:
        """What a linear reads, (tokens, in), of a run that stands before its layer."""
        found: list[torch.Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].reshape(-1, args[0].shape[-1]))
            raise _Stop

        layer = self._stream.layers[depth]
        with (
            self._stream.view.running(),
            hooked(self._model.get_submodule(module).register_forward_pre_hook(before)),
        ):
            for row in range(len(self._batches)):
                call = run.calls[row][depth]
                with suppress(_Stop):
                    layer(run.states[row], *call.args, **call.kwargs)
        return torch.cat(found)


def _divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL (n,) of each row of logits (n, vocabulary)."""
    blocks = (slice(start, start + _ROWS) for start in range(0, len(reference), _ROWS))
    with torch.inference_mode():
        return torch.cat(
            [divergence(torch.softmax(reference[b], -1), reference[b], logits[b]) for b in blocks]
        )
