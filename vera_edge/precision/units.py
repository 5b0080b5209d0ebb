"""What a plan chooses for, and what each choice costs in bytes and in KL.

A unit is the set of linears that read the same input (q, k and v; o; gate and up; down): the exporter may
compute them as one product, which then has one format. Of each unit the KL is measured in the format that
loses most; the others' follows from it, for the KL of a small error is quadratic in the unit's output, by
the error of its output on the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vera_edge.formats.blocks import quantize
from vera_edge.precision.codes import INTEGER, UnitCodes
from vera_edge.precision.knapsack import Option
from vera_edge.precision.latency import ProductKind, kind_of, nanoseconds
from vera_edge.precision.replay import Change, Replay, rounded
from vera_edge.precision.request import split
from vera_edge.precision.sizes import HEADS, matrix_bytes, step_bytes
from vera_edge.progress import Progress
from vera_edge.rounding.weight_rounding import BLOCK

ENDS = "embeddings"


@dataclass(frozen=True)
class MeasuredUnit:
    """Linears that get one format together, or `ENDS`: embeddings and output head.

    options: what each format costs. Empty `modules` are the ends.
    """

    name: str
    modules: tuple[str, ...]
    options: Mapping[str, Option]


@dataclass(frozen=True)
class Sensitivities:
    """Measures units on the text of `replay`, whose model this is. timed: how long they take, too."""

    model: Any
    replay: Replay
    codes: UnitCodes
    timed: bool = False
    _times: dict[ProductKind, int] = field(default_factory=dict)

    def units(self, heads: Sequence[str], progress: Progress) -> tuple[MeasuredUnit, ...]:
        """Every unit with its options measured, each alone; `heads`: what the ends may be stored as."""
        found, groups = [self._ends(heads)], self.codes.groups
        for number, modules in enumerate(groups):
            progress("measuring sensitivities", number, len(groups))
            found.append(MeasuredUnit(_name(modules), modules, self._options(modules)))
        progress("measuring sensitivities", len(groups), len(groups))
        return tuple(found)

    def _options(self, modules: Sequence[str]) -> dict[str, Option]:
        x = self.replay.inputs(modules[0])
        changes = {name: self.codes.change(modules, name, self.model) for name in self.codes.steps}
        errors = {name: self._output_error(modules, change, x) for name, change in changes.items()}
        worst = max(errors, key=errors.__getitem__)
        loss = self.replay.kl(changes[worst]) if errors[worst] > 0 else 0.0
        return {
            name: Option(
                sum(step_bytes(steps[module]) for module in modules),
                loss * errors[name] / errors[worst] if loss else 0.0,
                sum(self._time(kind_of(steps[module])) for module in modules),
            )
            for name, steps in self.codes.steps.items()
        }

    def _time(self, kind: ProductKind) -> int:
        if self.timed and kind not in self._times:
            self._times[kind] = nanoseconds(kind)
        return self._times.get(kind, 0)

    def _output_error(self, modules: Sequence[str], change: Change, x: torch.Tensor) -> float:
        """The squared error of the modules' outputs for inputs x (tokens, in)."""
        total = 0.0
        with torch.inference_mode():
            for module in modules:
                exact = self.model.get_submodule(module).weight.data
                weight = change.weights.get(f"{module}.weight", exact)
                conv1d = self.codes.ready.model.checkpoint.is_conv1d(module)
                block = change.rounded.get(module)
                read = None if block is None else rounded(x, block) - x
                error = _product(x, weight - exact, conv1d) if weight is not exact else None
                if read is not None:
                    noise = _product(read, weight, conv1d)
                    error = noise if error is None else error + noise
                total += 0.0 if error is None else float(error.double().square().sum())
        return total

    def _ends(self, heads: Sequence[str]) -> MeasuredUnit:
        """Embeddings and head; tied ones are stored once. Every kind is measured."""
        shapes = [tuple(weight.shape) for weight in _end_weights(self.model).values()]
        # The lookup of embeddings has no short blocks.
        whole = self.model.get_output_embeddings() is not None and not shapes[0][1] % BLOCK
        kinds = heads if whole else ("fp32",)
        options = {}
        for kind in kinds:
            size = sum(matrix_bytes(rows, columns, kind) for rows, columns in shapes)
            change = ends_change(self.model, kind)
            time = self._time((kind, (shapes[-1][0], shapes[-1][1]), BLOCK)) if whole else 0
            options[kind] = Option(size, self.replay.kl(change) if change.weights else 0.0, time)
        return MeasuredUnit(ENDS, (), options)


def ends_change(model: Any, kind: str) -> Change:
    """Embeddings and output head stored as `kind`, rounded to nearest as exporters do."""
    if kind not in INTEGER:
        return Change({})
    names = {id(value): name for name, value in model.named_parameters()}
    weights = {names[key]: _rounded(weight, kind) for key, weight in _end_weights(model).items()}
    head = model.get_output_embeddings()
    return Change(weights, {name: BLOCK for name, module in model.named_modules() if module is head})


def _end_weights(model: Any) -> dict[int, torch.Tensor]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(layer.weight): layer.weight for layer in ends if layer is not None}


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    values = quantize(weight.detach().numpy(), int(kind.removeprefix("int")), BLOCK, symmetric=kind == "int8")
    return torch.from_numpy(values.dequantize())


def _product(x: torch.Tensor, weight: torch.Tensor, conv1d: bool) -> torch.Tensor:
    return x @ (weight if conv1d else weight.T)


def _name(modules: Sequence[str]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
    first, rest = modules[0], modules[1:]
    return "+".join([first, *(module.rsplit(".", 1)[-1] for module in rest)])


def heads_of(formats: Sequence[str]) -> tuple[str, ...]:
    """What embeddings and head may be stored as beside linears of these formats; their blocks are of 32."""
    kinds = {split(name)[0] for name in formats}
    return tuple(name for name in HEADS if name in kinds) or ("fp32",)


def bytes_of(units: Sequence[MeasuredUnit], layers: str, head: str) -> int:
    """Bytes of all units when every one has the same format; ends that can't become `head` stay float32."""
    total = 0
    for unit in units:
        wanted = layers if unit.modules else head
        total += unit.options[wanted if wanted in unit.options else "fp32"].size
    return total
