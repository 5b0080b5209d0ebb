"""Calibration: text goes through the model, layer by layer, and leaves the statistics of what each reads.

For every distinct input of a layer's linears one Gram matrix H = X^T X / n is gathered; the caller answers
with the weights that the layer will have from then on. So the memory is the model, the hidden states of the
text (tokens x hidden size) and one layer's statistics. What later layers see is a choice, `Walk.sees`:

    "original"   every layer reads what it reads in the model as trained; one pass
    "layers"     a layer reads what the requantized layers before it give
    "inputs"     also within a layer: o_proj reads what the requantized q, k, v give, and so on

With the last two, `follow` shifts each layer's target so that it makes up for what the layers before it did:
the best weight for inputs X~ where the original ones were X is `W (X^T X~)(X~^T X~)^-1` (damped), of which
`follow` is the part that is taken (Arai and Ichikawa, QEP, https://arxiv.org/abs/2504.09629).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vera_edge.errors import DataError
from vera_edge.progress import Progress, silent

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Sees = Literal["original", "layers", "inputs"]


@dataclass(frozen=True)
class Inputs:
    """The statistics of one input. `modules`: the linears that read it. `gram`: X^T X / n (in, in) float32.

    `cross`: X^T X~ / n, original against requantized inputs, where they differ; else None.
    """

    modules: tuple[str, ...]
    gram: Float32
    cross: Float32 | None


# Called once for every input; gives the new weights, in the model's own orientation, of modules that change.
Answer = Callable[[Inputs], Mapping[str, torch.Tensor]]


class _Stop(Exception):
    """Raised by a hook: everything that was wanted of this forward pass is there."""


@dataclass
class Walk:
    """A walk of `windows` of token ids through a causal or bidirectional transformer in float32.

    modules: the linears whose inputs are wanted. sees: what later layers read. cross: gather Inputs.cross.
    """

    model: nn.Module
    modules: frozenset[str]
    windows: Sequence[Int64]
    sees: Sees = "inputs"
    cross: bool = False
    progress: Progress = silent
    _stack: _Stack = field(init=False)

    def run(self, answer: Answer) -> None:
        """Visit every input once, in the order of computation.

        Raises DataError without any text, or when the model has no stack of layers that this can walk.
        """
        if not self.windows:
            raise DataError("there is no text to calibrate with; give a longer file")
        with torch.inference_mode():
            self._stack = _Stack.find(self.model, self.modules, self.windows)
            hidden = self._stack.first_inputs(self.model, self.windows)
            # Only where layers change do the two streams of hidden states part.
            original = list(hidden) if self.cross and self.sees != "original" else None
            for index in range(len(self._stack.layers)):
                self.progress("calibrating", index, len(self._stack.layers))
                hidden, original = self._layer(index, hidden, original, answer)
            self.progress("calibrating", len(self._stack.layers), len(self._stack.layers))

    def _layer(
        self, index: int, hidden: list[torch.Tensor], original: list[torch.Tensor] | None, answer: Answer
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        layer = _Layer(self._stack, index, self.windows)
        groups = layer.groups(hidden[0])
        kept = {module: layer.linears[module].weight.data for group in groups for module in group}
        changed: dict[str, torch.Tensor] = {}
        if self.sees == "inputs":
            for group in groups:
                for found in layer.statistics([group], hidden, original, kept, changed):
                    changed |= answer(found)
        else:
            for found in layer.statistics(groups, hidden, original, kept, {}):
                changed |= answer(found)
        layer.use(kept)
        if original is not None:
            original = [layer(x, row) for row, x in enumerate(original)]
        if self.sees != "original":
            layer.use(kept | changed)
        return [layer(x, row) for row, x in enumerate(hidden)], original


@dataclass
class _Stack:
    """The stack of layers, and the keyword arguments each is called with, by the length of the window."""

    name: str
    layers: list[nn.Module]
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]
    modules: frozenset[str]

    @classmethod
    def find(cls, model: nn.Module, modules: frozenset[str], windows: Sequence[Int64]) -> _Stack:
        lists = {name: item for name, item in model.named_modules() if isinstance(item, nn.ModuleList)}
        inside = {
            name: sum(module.startswith(f"{name}.") for module in modules) * (len(item) > 0)
            for name, item in lists.items()
        }
        name = max(inside, key=lambda name: (inside[name], -len(name)), default="")
        if not name or not inside[name]:
            raise DataError(
                "this model has no stack of layers to calibrate; choose a method without calibration"
            )
        stack = cls(name, list(lists[name]), {}, modules)
        for length in sorted({len(window) for window in windows}):
            window = next(window for window in windows if len(window) == length)
            stack.arguments[length] = stack._record(model, window)
        return stack

    def _record(self, model: nn.Module, window: Int64) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """One forward pass, to see how each layer is called; each must read what the one before gave."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        chain: list[tuple[torch.Tensor, torch.Tensor]] = []

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
            chain.append((_hidden_of(args, kwargs), _hidden(output)))

        with ExitStack() as hooks:
            for layer in self.layers:
                handle = layer.register_forward_hook(after, with_kwargs=True)
                hooks.callback(handle.remove)
            _forward(model, window)
        links = pairwise(chain)
        if len(calls) != len(self.layers) or any(one[1] is not two[0] for one, two in links):
            raise DataError(
                f"the layers of {self.name} aren't called one after the other; choose a method that needs no "
                "calibration"
            )
        return calls

    def first_inputs(self, model: nn.Module, windows: Sequence[Int64]) -> list[torch.Tensor]:
        """What the first layer reads, for every window."""
        found: list[torch.Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_hidden_of(args, kwargs))
            raise _Stop

        handle = self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
        try:
            for window in windows:
                try:
                    _forward(model, window)
                except _Stop:
                    continue
        finally:
            handle.remove()
        return found


class _Layer:
    """One layer of the stack: called on hidden states, its linears watched, its weights exchanged."""

    def __init__(self, stack: _Stack, index: int, windows: Sequence[Int64]) -> None:
        self._layer, self._windows = stack.layers[index], windows
        self._arguments = {length: calls[index] for length, calls in stack.arguments.items()}
        prefix = f"{stack.name}.{index}."
        self.linears: dict[str, Any] = {
            prefix + name: module
            for name, module in self._layer.named_modules()
            if prefix + name in stack.modules
        }

    def __call__(self, hidden: torch.Tensor, row: int) -> torch.Tensor:
        args, kwargs = self._arguments[len(self._windows[row])]
        return _hidden(self._layer(hidden, *args, **kwargs))

    def use(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give linears these weights from now on."""
        for module, weight in weights.items():
            self.linears[module].weight.data = weight

    def groups(self, hidden: torch.Tensor) -> list[tuple[str, ...]]:
        """The linears that read the same input, in the order of computation, without those never called."""
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def watch(module: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def before(_: nn.Module, args: tuple[Any, ...]) -> None:
                for tensor, modules in seen:
                    if tensor is args[0]:
                        modules.append(module)
                        return
                seen.append((args[0], [module]))

            return before

        with ExitStack() as hooks:
            for module, linear in self.linears.items():
                hooks.callback(linear.register_forward_pre_hook(watch(module)).remove)
            self(hidden, 0)
        return [tuple(modules) for _, modules in seen]

    def statistics(
        self,
        groups: Sequence[tuple[str, ...]],
        hidden: list[torch.Tensor],
        original: list[torch.Tensor] | None,
        kept: Mapping[str, torch.Tensor],
        changed: Mapping[str, torch.Tensor],
    ) -> list[Inputs]:
        """The statistics of each group's input; `original` runs on `kept`, `hidden` on `changed` over it."""
        firsts = [group[0] for group in groups]
        sums: dict[str, list[torch.Tensor]] = {}
        count = 0
        for row, states in enumerate(hidden):
            self.use({**kept, **changed})
            inputs = self._inputs(firsts, states, row)
            before = None
            if original is not None:
                self.use(kept)
                before = self._inputs(firsts, original[row], row)
            count += next(iter(inputs.values())).shape[0]
            for module, x in inputs.items():
                products = [x.T @ x] if before is None else [x.T @ x, before[module].T @ x]
                if module in sums:
                    for total, product in zip(sums[module], products, strict=True):
                        total += product
                else:
                    sums[module] = products
        found = []
        for group in groups:
            gram, *cross = ((total / count).numpy() for total in sums.pop(group[0]))
            found.append(Inputs(group, gram, cross[0] if cross else None))
        return found

    def _inputs(self, modules: Sequence[str], hidden: torch.Tensor, row: int) -> dict[str, torch.Tensor]:
        """What each of `modules` reads, (tokens, in); the pass ends when the last has been seen."""
        found: dict[str, torch.Tensor] = {}

        def watch(module: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def before(_: nn.Module, args: tuple[Any, ...]) -> None:
                found[module] = args[0].reshape(-1, args[0].shape[-1])
                if len(found) == len(modules):
                    raise _Stop

            return before

        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(self.linears[module].register_forward_pre_hook(watch(module)).remove)
            with suppress(_Stop):
                self(hidden, row)
        return found


def _forward(model: nn.Module, window: Int64) -> None:
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    model(input_ids=torch.from_numpy(np.ascontiguousarray(window[None])), **options)


def _hidden(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def follow_target(weight: Float32, inputs: Inputs, share: float, damp: float = 0.01) -> Float32:
    """`weight` (out, in) moved towards the best one for inputs that changed; `share` of the way.

    W + share * W (C - H)(H + damp * mean diagonal)^-1, C = X^T X~, H = X~^T X~.
    """
    if inputs.cross is None or share == 0:
        return weight
    gram = inputs.gram.astype(np.float64)
    gram[np.diag_indices_from(gram)] += damp * np.trace(gram) / gram.shape[0]
    shift = np.linalg.solve(gram, (inputs.cross - inputs.gram).astype(np.float64).T).T
    return weight + np.float32(share) * (weight @ shift.astype(np.float32))
