"""Runs a model layer by layer over all of a text, so that the weights of one layer are in memory at a time.

    1. every window through the model with its layers left out: how each layer is called, what the first reads
    2. layer after layer, every window through it, in every view of the model (adapter on, off, bfloat16)
    3. every window through the model with its layers left out, the last giving what came of 2: the outputs

Whether a model can be run so is tried, not guessed, on stand-ins for its weights (see stand_ins.py): its
layers must be called once each, one on the other's output, with arguments that don't depend on the layers
before; and what comes after them must give, from the last one's output alone, what the whole model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from vera_edge.arrays import Float32, Int64
from vera_edge.progress import Progress, silent
from vera_edge.reference.alike import same, tensors_of
from vera_edge.reference.hidden_states import HiddenStates, Room
from vera_edge.reference.layers import Call, call_of, forward, hidden_of, output_hidden, stack_of
from vera_edge.reference.stand_ins import StandIns

Take = Callable[[Any], Float32]  # of a model's output
_PROBE = 8  # tokens


class View(Protocol):
    """One way to run the model: with its adapter or without, in this precision or that."""

    def running(self) -> AbstractContextManager[None]: ...


class _Stop(Exception):
    """Raised where nothing more is wanted of a forward pass."""


class _Unlike(Exception):
    """The model doesn't run as a chain of layers."""


@dataclass
class LayerStream:
    """A model made of stand-ins, whose layers can be run one at a time."""

    model: Any
    weights: StandIns
    view: View
    layers: list[nn.Module]
    name: str  # of the list of layers
    widths: list[int | None] = field(default_factory=list)  # a layer gives a tuple of so many, or a tensor
    first: set[str] = field(default_factory=set)  # matrices that are needed before the layers
    last: set[str] = field(default_factory=set)  # after them

    @classmethod
    def of(cls, model: Any, weights: StandIns, views: Sequence[View]) -> LayerStream | None:
        """The model with its stand-ins, made ready; None where it can't be told that this gives the same.

        views: all that differ in what they compute with.
        """
        owners = [
            name
            for name, module in model.named_modules()
            if any(weights.name_of(own.data) for own in module.parameters(recurse=False))
        ]
        name, layers = stack_of(model, owners)
        if not layers:
            return None
        stream = cls(model, weights, views[0], layers, name)
        weights.fill()
        try:
            for view in views:
                with view.running(), weights.products():
                    stream._probe()
        except (_Unlike, RuntimeError, TypeError, AttributeError, LookupError, ValueError):
            return None  # of whatever the model's code meets when its layers are left out
        finally:
            weights.empty()
        return stream

    def outputs(
        self,
        views: Sequence[View],
        windows: Sequence[Int64],
        take: Take,
        first: Sequence[int | None] = (),
        progress: Progress = silent,
    ) -> Iterator[tuple[Float32, ...]]:
        """Of every window, what `take` makes of the model's output in each view, one window at a time.

        first: how many of the windows each view is run on, None or nothing for all; a later window's tuple
        lacks the view. Memory: one layer's weights and the hidden states, in the end what comes after the
        layers.
        """
        counts = [len(windows) if count is None else min(count, len(windows)) for count in first]
        counts += [len(windows)] * (len(views) - len(counts))
        room = Room()
        states = [HiddenStates(room) for _ in views]
        with torch.inference_mode():
            runs = [
                Run(self, view, windows[:count], hidden)
                for view, count, hidden in zip(views, counts, states, strict=True)
            ]
            read: dict[str, torch.Tensor] = {}
            for run in runs:
                run.start(read)
            for index in range(len(self.layers)):
                progress("running the model layer by layer", index, len(self.layers))
                read = {}
                for run in runs:
                    run.layer(index, read)
        yield from self._ends(runs, len(windows), take)

    def _ends(self, runs: Sequence[Run], count: int, take: Take) -> Iterator[tuple[Float32, ...]]:
        read: dict[str, torch.Tensor] = {}
        for row in range(count):
            found = []
            for run in runs:
                if row < len(run.windows):
                    with torch.inference_mode():
                        found.append(take(run.end(row, read)))
            yield tuple(found)

    def outside(self) -> list[nn.Parameter]:
        """The parameters that no layer holds."""
        inside = {id(own) for layer in self.layers for own in layer.parameters()}
        return [own for own in self.model.parameters() if id(own) not in inside]

    def calls(self, window: Int64) -> tuple[list[Call], torch.Tensor]:
        """How each layer is called where all hand on what they read, and what that is."""
        calls: list[Call] = []
        read: list[torch.Tensor] = []

        def instead(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = hidden_of(args, kwargs)
                if len(calls) != index or (read and hidden is not read[0]):
                    raise _Unlike
                calls.append(call_of(args, kwargs))
                read[:] = [hidden]
                if index + 1 == len(self.layers):
                    raise _Stop
                return self._shaped(index, hidden)

            return forward

        with self._replaced(instead), suppress(_Stop):
            forward(self.model, window)
        if len(calls) != len(self.layers):
            raise _Unlike
        return calls, read[0]

    def end(self, window: Int64, hidden: torch.Tensor) -> Any:
        """The model's output where its last layer gives `hidden`."""

        def instead(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                last = index + 1 == len(self.layers)
                return self._shaped(index, hidden if last else hidden_of(args, kwargs))

            return forward

        with self._replaced(instead):
            return forward(self.model, window)

    def _shaped(self, index: int, hidden: torch.Tensor) -> Any:
        """Hidden states as this layer gives them."""
        width = self.widths[index]
        return hidden if width is None else (hidden, *(None for _ in range(width - 1)))

    @contextmanager
    def _replaced(self, instead: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        layers: list[Any] = list(self.layers)
        try:
            for index, layer in enumerate(layers):
                layer.forward = instead(index)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def _probe(self) -> None:
        """Hold the passes above to the whole model on stand-ins; raises _Unlike where they differ."""
        window = np.arange(_PROBE, dtype=np.int64) % _vocabulary(self.model)
        calls, first, last, output = self._watched(window)
        again, start = self.calls(window)
        expected = tensors_of(output)
        if not same((calls, first), (again, start)) or not expected:
            raise _Unlike
        if not all(tensor.isfinite().all() for tensor in expected):
            raise _Unlike
        # A second text between: nothing but its arguments may tell a layer which one it works on.
        other = window[::-1][: _PROBE // 2 + 1]
        beside = tensors_of(forward(self.model, other))
        both = [(window, again, start), (other, *self.calls(other))]
        for text, hidden, wanted in zip(
            (window, other), self._chained(both), (expected, beside), strict=True
        ):
            if not same(tensors_of(self.end(text, hidden)), wanted):
                raise _Unlike
        outside = {name for own in self.outside() if (name := self.weights.name_of(own.data))}
        for name in sorted(outside):
            with self.weights.poisoned([name]):
                if not same(self.calls(window), (again, start)):
                    self.first.add(name)
                if not same(tensors_of(self.end(window, last)), expected):
                    self.last.add(name)
        with self.weights.poisoned(self.weights.tensors.keys() - self.first):
            if not same(self.calls(window), (again, start)):
                raise _Unlike
        with self.weights.poisoned(self.weights.tensors.keys() - self.last):
            if not same(tensors_of(self.end(window, last)), expected):
                raise _Unlike

    def _chained(self, texts: Sequence[tuple[Int64, list[Call], torch.Tensor]]) -> list[torch.Tensor]:
        """What the last layer gives for each text, all of them through one layer after the other."""
        states = [hidden for _, _, hidden in texts]
        for index, layer in enumerate(self.layers):
            with self.weights.poisoned(self.weights.tensors.keys() - self.weights.held_by(layer)):
                for row, (_, calls, _) in enumerate(texts):
                    args, kwargs = calls[index]
                    states[row] = output_hidden(layer(states[row], *args, **kwargs))
        return states

    def _watched(self, window: Int64) -> tuple[list[Call], torch.Tensor, torch.Tensor, Any]:
        """One whole pass: how each layer was called, what the first read, what the last gave, the output."""
        calls: list[Call] = []
        chain: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.widths = []

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rest = output[1:] if isinstance(output, tuple) else ()
            if any(item is not None for item in rest):
                raise _Unlike
            self.widths.append(1 + len(rest) if isinstance(output, tuple) else None)
            calls.append(call_of(args, kwargs))
            chain.append((hidden_of(args, kwargs), output_hidden(output)))

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
            output = forward(self.model, window)
        if len(chain) != len(self.layers) or any(one[1] is not two[0] for one, two in pairwise(chain)):
            raise _Unlike
        return calls, chain[0][0], chain[-1][1], output


class Run:
    """One view of a streamed model on its way through the layers. windows: (n,) or (rows, n)."""

    def __init__(
        self, stream: LayerStream, view: View, windows: Sequence[Int64], states: HiddenStates
    ) -> None:
        self._stream, self._view, self.windows, self.states = stream, view, windows, states
        self.calls: list[list[Call]] = []

    def start(self, read: dict[str, torch.Tensor]) -> None:
        """To where the first layer reads."""
        stream, known = self._stream, dict[int, list[list[Call]]]()
        for row, window in enumerate(self.windows):
            with self._view.running(), stream.weights.placed(stream.outside(), read, stream.first):
                calls, hidden = stream.calls(window)
            # Windows of one length are mostly called alike: one copy of their masks and angles will do.
            alike = known.setdefault(len(window), [])
            known_calls = next((one for one in alike if same(one, calls)), None)
            if known_calls is None:
                alike.append(calls)
            self.calls.append(calls if known_calls is None else known_calls)
            self.states[row] = hidden

    def layer(self, index: int, read: dict[str, torch.Tensor]) -> None:
        """Every window through one layer."""
        layer = self._stream.layers[index]
        with self._view.running(), self._stream.weights.placed(layer.parameters(), read):
            for row in range(len(self.windows)):
                args, kwargs = self.calls[row][index]
                self.states[row] = output_hidden(layer(self.states[row], *args, **kwargs))

    def end(self, row: int, read: dict[str, torch.Tensor], needed: set[str] | None = None) -> Any:
        """The model's output for one window. needed: matrices that must be there, if other than usual."""
        stream = self._stream
        wanted = stream.last if needed is None else needed
        with self._view.running(), stream.weights.placed(stream.outside(), read, wanted):
            return stream.end(self.windows[row], self.states[row])


def _vocabulary(model: Any) -> int:
    return max(1, int(getattr(model.config.get_text_config(), "vocab_size", 1) or 1))
