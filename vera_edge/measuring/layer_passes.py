"""What exchanging one linear layer does to a model's logits: forward passes over a few pieces of text.

Of a model in memory the layers before the exchanged one give what they gave, without being computed. One that
is run layer by layer carries every exchange along with it, so that its weights are read once
(`vera_edge.reference.carried`). Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np

from vera_edge.arrays import Float32, Float64, Int64
from vera_edge.measuring.metrics import compare
from vera_edge.progress import Progress
from vera_edge.reference.carried import Carried, Exchange, Made
from vera_edge.reference.layers import stack_of
from vera_edge.reference.model import TorchReference
from vera_edge.reference.streamed import LayerStream

# Makes a change to the layer of this name, for as long as its context lasts.
Exchanged = Callable[[str], AbstractContextManager[None]]


def kl_of_each(
    runner: TorchReference,
    pieces: Sequence[Int64],
    modules: Sequence[str],
    exchanged: Exchanged,
    progress: Progress,
) -> dict[str, float]:
    """Mean KL in nats from the model to it with one of `modules` exchanged, of each.

    modules: by their names in the model, in its order. exchanged: is asked for one at a time, and of a layer
    outside of the stack maybe more than once.
    """
    if runner.stream is not None:
        return _streamed(runner, runner.stream, pieces, modules, exchanged, progress)
    passes = _Passes(runner, pieces, modules)
    reference, found = passes.record(), {}
    for index, module in enumerate(modules):
        progress("measuring layer by layer", index, len(modules))
        with exchanged(module):
            kl = [
                _kl(before, passes.logits(row, module), pieces[row]) for row, before in enumerate(reference)
            ]
        found[module] = float(np.concatenate(kl).mean())
    progress("measuring layer by layer", len(modules), len(modules))
    return found


def _kl(reference: Float32, logits: Float32, piece: Int64) -> Float64:
    return compare(reference, logits, piece[1:]).kl


def _streamed(
    runner: TorchReference,
    stream: LayerStream,
    pieces: Sequence[Int64],
    modules: Sequence[str],
    exchanged: Exchanged,
    progress: Progress,
) -> dict[str, float]:
    def made(module: str) -> Made:
        return lambda _: exchanged(module)

    owned = {
        name: index for index, layer in enumerate(stream.layers) for name in _names_in(runner.model, layer)
    }
    exchanges = [Exchange(owned.get(module), made(module)) for module in modules]
    found: dict[str, list[Float64]] = {module: [] for module in modules}
    reference: Float32 | None = None
    passes = Carried(stream, runner, pieces, exchanges)
    for row, place, logits in passes.outputs(_logits, progress):
        if place is None:
            reference = logits
        else:
            assert reference is not None
            found[modules[place]].append(_kl(reference, logits, pieces[row]))
    return {module: float(np.concatenate(kl).mean()) for module, kl in found.items()}


def _names_in(model: Any, layer: Any) -> list[str]:
    """The names in the model of what a layer holds."""
    inside = {id(module) for module in layer.modules()}
    return [name for name, module in model.named_modules() if id(module) in inside]


def _logits(output: Any) -> Float32:
    found: Float32 = output.logits[0, :-1].float().numpy()
    return found


class _Passes:
    """Forward passes over the same pieces, in which layers before one that changed give what they gave."""

    def __init__(self, runner: TorchReference, pieces: Sequence[Int64], modules: Sequence[str]) -> None:
        self._pieces, self._runner = pieces, runner
        self._stack, self._layers = stack_of(runner.model, modules)
        self._given: list[list[Any]] = []

    def record(self) -> list[Float32]:
        """The logits (n - 1, vocab) of every piece, as the model is."""
        logits = []
        for piece in self._pieces:
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
            return self._runner.logits(self._pieces[row])[:-1]

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
