"""The layers of a transformer, called one by one in torch: linears watched, weights exchanged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from vera_edge.arrays import Int64
from vera_edge.errors import DataError

# The key of the hidden states that a layer itself reads, in dicts of what its submodules read.
HIDDEN_STATES = ""


class Changed(NamedTuple):
    """What a linear has from now on, in the model's own orientation; bias None: the one it has."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class LinearState(NamedTuple):
    """What a linear has: its weight, in the model's own orientation, and its bias."""

    weight: torch.Tensor
    bias: nn.Parameter | None


class _Stop(Exception):
    """Raised by a hook: everything that was wanted of this forward pass is there."""


def stack_of(model: nn.Module, modules: Collection[str]) -> tuple[str, list[nn.Module]]:
    """The list of layers that holds most of `modules`, by its name in the model; "" and none without any."""
    lists = {name: item for name, item in model.named_modules() if isinstance(item, nn.ModuleList)}
    inside = {
        name: sum(module.startswith(f"{name}.") for module in modules) * (len(item) > 0)
        for name, item in lists.items()
    }
    name = max(inside, key=lambda name: (inside[name], -len(name)), default="")
    return (name, list(lists[name])) if name and inside[name] else ("", [])


class Call(NamedTuple):
    """What a layer is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """What a layer was called with, without its hidden states."""
    return Call(args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})


@dataclass
class Stack:
    """The stack of layers, and what each is called with, by the number of the window.

    placed: puts the weights of a layer in their place, by its number, for as long as its context lasts.
    """

    name: str
    layers: list[nn.Module]
    calls: Sequence[Sequence[Call]]
    modules: frozenset[str]
    placed: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext()

    @classmethod
    def find(cls, model: nn.Module, modules: frozenset[str], windows: Sequence[Int64]) -> Stack:
        name, layers = stack_of(model, modules)
        if not layers:
            raise DataError(
                "this model has no stack of layers to calibrate; choose a method without calibration"
            )
        stack = cls(name, layers, (), modules)
        known = {len(window): window for window in reversed(windows)}
        calls = {length: stack._record(model, window) for length, window in known.items()}
        return replace(stack, calls=[calls[len(window)] for window in windows])

    def _record(self, model: nn.Module, window: Int64) -> list[Call]:
        """One forward pass, to see how each layer is called; each must read what the one before gave."""
        calls: list[Call] = []
        chain: list[tuple[torch.Tensor, torch.Tensor]] = []

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(call_of(args, kwargs))
            chain.append((hidden_of(args, kwargs), output_hidden(output)))

        with ExitStack() as hooks:
            for layer in self.layers:
                handle = layer.register_forward_hook(after, with_kwargs=True)
                hooks.callback(handle.remove)
            forward(model, window)
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
            found.append(hidden_of(args, kwargs))
            raise _Stop

        handle = self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
        try:
            for window in windows:
                try:
                    forward(model, window)
                except _Stop:
                    continue
        finally:
            handle.remove()
        return found


class Layer:
    """One layer of a stack: called on hidden states, its linears watched, its weights exchanged."""

    def __init__(self, stack: Stack, index: int) -> None:
        self._layer, self._calls = stack.layers[index], [calls[index] for calls in stack.calls]
        prefix = f"{stack.name}.{index}."
        self._parts: dict[str, Any] = {
            prefix + name: module for name, module in self._layer.named_modules() if name
        }
        self.linears = {name: module for name, module in self._parts.items() if name in stack.modules}

    def __call__(self, hidden: torch.Tensor, row: int) -> torch.Tensor:
        args, kwargs = self._calls[row]
        return output_hidden(self._layer(hidden, *args, **kwargs))

    def state(self, module: str) -> LinearState:
        """What a linear has now."""
        linear = self.linears[module]
        return LinearState(linear.weight.data, linear.bias)

    def changed(self, module: str, change: Changed) -> LinearState:
        """What a linear has once it has changed."""
        own = self.linears[module].bias
        bias = own if change.bias is None else nn.Parameter(change.bias, requires_grad=False)
        return LinearState(change.weight, bias)

    def use(self, states: Mapping[str, LinearState]) -> None:
        """Give linears these weights and biases from now on."""
        for module, (weight, bias) in states.items():
            self.linears[module].weight.data = weight
            self.linears[module].bias = bias

    def output_of(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """What a linear gives for x (tokens, in): (tokens, out)."""
        linear = self.linears[module]
        found: torch.Tensor = type(linear).forward(linear, x)
        return found

    @contextmanager
    def giving(self, outputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let linears give these (tokens, out), whatever they read."""

        def instead(output: torch.Tensor) -> Callable[..., torch.Tensor]:
            return lambda x: output.reshape(*x.shape[:-1], output.shape[-1])

        try:
            for module, output in outputs.items():
                self.linears[module].forward = instead(output)
            yield
        finally:
            for module in outputs:
                vars(self.linears[module]).pop("forward", None)

    def outputs(self, hidden: torch.Tensor, row: int) -> dict[str, torch.Tensor]:
        """What each linear gives, (tokens, out)."""
        found: dict[str, torch.Tensor] = {}

        def after(module: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
            def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
                found[module] = output.reshape(-1, output.shape[-1])

            return keep

        with ExitStack() as hooks:
            for module, linear in self.linears.items():
                hooks.callback(linear.register_forward_hook(after(module)).remove)
            self(hidden, row)
        return found

    def groups(self, hidden: torch.Tensor, row: int = 0) -> list[tuple[str, ...]]:
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
            self(hidden, row)
        return [tuple(modules) for _, modules in seen]

    def added_to(self, hidden: torch.Tensor, row: int = 0) -> dict[str, str]:
        """The linears whose output is added to a tensor that flows past them: to the input of which part.

        Found by looking, as no two architectures agree: some part of the layer, or its output, must then be
        exactly the sum. Linears whose output goes another way are left out.
        """
        flow: list[tuple[str, torch.Tensor]] = [(HIDDEN_STATES, hidden)]
        outputs: list[tuple[str, torch.Tensor, int]] = []

        def before(part: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, args: flow.append((part, args[0])) if _is_tensor(args) else None

        def after(module: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
            return lambda _, __, output: outputs.append((module, output, len(flow)))

        with ExitStack() as hooks:
            for part, module in self._parts.items():
                hooks.callback(module.register_forward_pre_hook(before(part)).remove)
            for name, linear in self.linears.items():
                hooks.callback(linear.register_forward_hook(after(name)).remove)
            flow.append((HIDDEN_STATES, self(hidden, row)))
        found: dict[str, str] = {}
        for name, output, count in outputs:
            like = [(part, tensor) for part, tensor in flow[:count] if tensor.shape == output.shape]
            sums = [tensor for _, tensor in flow[count:] if tensor.shape == output.shape]
            for part, tensor in like:
                total = tensor + output
                if any(torch.equal(total, one) for one in sums):
                    found.setdefault(name, part)
        return found

    def inputs(
        self, parts: Sequence[str], hidden: torch.Tensor, row: int, to_the_end: bool = False
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """What each of `parts` reads, (tokens, in), and the layer's output, if the pass goes `to_the_end`.

        Otherwise it ends when the last part has been reached.
        """
        found: dict[str, torch.Tensor] = {}
        missing = set(parts) - {HIDDEN_STATES}
        if HIDDEN_STATES in parts:
            found[HIDDEN_STATES] = hidden.reshape(-1, hidden.shape[-1])

        def watch(part: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def before(_: nn.Module, args: tuple[Any, ...]) -> None:
                found[part] = args[0].reshape(-1, args[0].shape[-1])
                missing.discard(part)
                if not missing and not to_the_end:
                    raise _Stop

            return before

        output = None
        with ExitStack() as hooks:
            for part in missing:
                hooks.callback(self._parts[part].register_forward_pre_hook(watch(part)).remove)
            with suppress(_Stop):
                output = self(hidden, row)
        return found, output


def forward(model: Any, window: Int64) -> Any:
    """The output of a model for one text of token ids (n,), or texts of one length (rows, n); no cache."""
    rows = window if window.ndim == 2 else window[None]
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    return model(input_ids=torch.from_numpy(np.ascontiguousarray(rows)), **options)


def output_hidden(output: Any) -> torch.Tensor:
    """The hidden states in what a layer gives."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states in what a layer is called with."""
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _is_tensor(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], torch.Tensor)
