"""What a plan chooses for, and what each choice costs in bytes and in KL.

A unit is the set of linears that read the same input (q, k and v; o; gate and up; down): the exporter may
compute them as one product, which then has one format. Of each unit the KL is measured in the format that
loses most; the others' follows from it, for the KL of a small error is quadratic in the unit's output, by
the error of its output on the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vera_edge.device.check.products import ProductKind
from vera_edge.formats.blocks import quantize
from vera_edge.precision.changes import PARTS, Change, Outside, Replaying, rounded
from vera_edge.precision.codes import INTEGER, UnitCodes
from vera_edge.precision.knapsack import Option
from vera_edge.precision.latency import ProductTimes, kind_of
from vera_edge.precision.request import split
from vera_edge.precision.sizes import HEADS, matrix_bytes, step_bytes
from vera_edge.progress import Progress
from vera_edge.requantize import Codes
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


Values = Callable[[torch.Tensor], torch.Tensor]


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a parameter that is in memory."""
    return tensor


@dataclass(frozen=True)
class Sensitivities:
    """Measures units on the text of `replay`, whose model this is. times: of their products; None: not asked.

    values: gives those of a parameter that holds a stand-in, where the model is read layer by layer.
    """

    model: Any
    replay: Replaying
    codes: UnitCodes
    times: ProductTimes | None = None
    values: Values = as_it_is

    def units(self, heads: Sequence[str], progress: Progress) -> tuple[MeasuredUnit, ...]:
        """Every unit with its options measured, each alone; `heads`: what the ends may be stored as."""
        ends, groups = self._ends(heads), self.codes.groups
        errors: dict[Sequence[str], dict[str, float]] = {}

        def change_of(modules: Sequence[str], x: torch.Tensor) -> Change | None:
            errors[modules], worst = self._errors(modules, x)
            return worst

        outside = [change for change in ends.values() if change is not None]
        losses = iter(self.replay.each(outside, groups, change_of, progress))
        kinds = {kind: 0.0 if change is None else next(losses) for kind, change in ends.items()}
        units = [self._end_options(kinds)]
        for modules, loss in zip(groups, losses, strict=True):
            units.append(MeasuredUnit(_name(modules), modules, self._options(modules, errors[modules], loss)))
        return tuple(units)

    def _errors(self, modules: Sequence[str], x: torch.Tensor) -> tuple[dict[str, float], Change | None]:
        """The output error of every format, and the change to the worst; None where no format loses."""
        errors, worst, most = dict[str, float](), None, 0.0
        for name in self.codes.steps:
            change = self.codes.change(modules, name, self.model)
            errors[name] = self._output_error(modules, change, x)
            if errors[name] > most:
                most, worst = errors[name], change
        return errors, worst

    def _options(self, modules: Sequence[str], errors: Mapping[str, float], loss: float) -> dict[str, Option]:
        """Each format's; loss: that of the worst."""
        worst = max(errors.values())
        return {
            name: Option(
                sum(step_bytes(steps[module]) for module in modules),
                loss * errors[name] / worst if loss else 0.0,
                sum(self._time(kind_of(steps[module])) for module in modules),
            )
            for name, steps in self.codes.steps.items()
        }

    def _time(self, kind: ProductKind) -> int:
        return 0 if self.times is None else self.times.time(kind)

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

    def _ends(self, heads: Sequence[str]) -> dict[str, Outside | None]:
        """What each kind of embeddings and head changes; tied ones are stored once."""
        inside = next(iter(_end_weights(self.model).values())).shape[1]
        # The lookup of embeddings has no short blocks.
        whole = self.model.get_output_embeddings() is not None and not inside % BLOCK
        return {kind: self._end_change(kind) for kind in (heads if whole else ("fp32",))}

    def _end_change(self, kind: str) -> Outside | None:
        if kind not in INTEGER:
            return None
        return lambda parts: ends_change(self.model, kind, self.values, parts, self.codes.head)

    def _end_options(self, losses: Mapping[str, float]) -> MeasuredUnit:
        shapes = [tuple(weight.shape) for weight in _end_weights(self.model).values()]
        options = {}
        for kind, loss in losses.items():
            size = sum(matrix_bytes(rows, columns, kind) for rows, columns in shapes)
            timed = self.model.get_output_embeddings() is not None and not shapes[0][1] % BLOCK
            block = BLOCK if kind in INTEGER else 0
            time = self._time((kind, (shapes[-1][0], shapes[-1][1]), block)) if timed else 0
            options[kind] = Option(size, loss, time)
        return MeasuredUnit(ENDS, (), options)


def ends_change(
    model: Any,
    kind: str,
    values: Values = as_it_is,
    parts: Sequence[str] = PARTS,
    careful: Codes | None = None,
) -> Change:
    """Embeddings and output head stored as `kind`, rounded to nearest as exporters do; those of `parts`.

    careful: a head of 4 bits that was rounded otherwise, and so are embeddings that are tied to it.
    """
    if kind not in INTEGER:
        return Change({})
    names = {id(value): name for name, value in model.named_parameters()}
    weights = {
        names[key]: _rounded(values(weight.data), kind) for key, weight in _end_weights(model, parts).items()
    }
    head = model.get_output_embeddings()
    if careful is not None and kind == "int4" and names[id(head.weight)] in weights:
        weights[names[id(head.weight)]] = torch.from_numpy(careful.dequantize())
    read = {name: BLOCK for name, module in model.named_modules() if module is head and "output" in parts}
    return Change(weights, read)


def _end_weights(model: Any, parts: Sequence[str] = PARTS) -> dict[int, torch.Tensor]:
    ends = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    layers = [layer for part, layer in ends.items() if layer is not None and part in parts]
    return {id(layer.weight): layer.weight for layer in layers}


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
