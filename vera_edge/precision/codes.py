"""Every unit in every format that it may have, rounded with care, and what that costs in bytes and in KL.

A unit is the set of linears that read the same input (q, k and v; o; gate and up; down): the exporter may
compute them as one product, which then has one format. The codes are those that an export makes with the
same method and text: each layer's statistics come from the model as trained, not from other layers' codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vera_edge import merge
from vera_edge.calibration import Inputs, Int64, Walk
from vera_edge.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.formats.blocks import quantize
from vera_edge.merge import Prepared
from vera_edge.plan import Step
from vera_edge.precision.knapsack import Option
from vera_edge.precision.replay import Replay
from vera_edge.precision.sizes import HEADS, matrix_bytes, step_bytes
from vera_edge.progress import Progress
from vera_edge.reference import load_dense
from vera_edge.requantize import Codes, CodesFolder, Gram, requantize
from vera_edge.tensors import Float32
from vera_edge.weight_rounding import BLOCK, grid_of

ENDS = "embeddings"


@dataclass(frozen=True)
class Unit:
    """Linears that get one format together, or `ENDS`: embeddings and output head.

    options: what each format costs. Empty `modules` are the ends.
    """

    name: str
    modules: tuple[str, ...]
    options: Mapping[str, Option]


def check_adapters(ready: Prepared) -> None:
    """Raise PlanError when an adapter brings whole tensors, whose place in an export isn't measured."""
    for adapter, _ in ready.adapters:
        if adapter.modules_to_save:
            raise PlanError(
                f"{adapter.path} replaces {sorted(adapter.modules_to_save)[0]} whole, which automatic "
                "precision doesn't measure; choose formats yourself (--weights)"
            )


def trained_model(ready: Prepared) -> Any:
    """The model as trained as an ordinary float32 model: the deltas added to the weights.

    Raises PlanError when transformers knows the checkpoint's layers by other names.
    """
    model = load_dense(ready.checkpoint).eval()
    _check_names(model, ready)
    for module in {name for adapter, _ in ready.adapters for name in adapter.vectors}:
        weight = merge.merged_weight(ready.checkpoint, module, ready.adapters, ready.projections)
        model.get_submodule(module).weight.data = oriented(ready.checkpoint, module, weight)
    for adapter, _ in ready.adapters:
        for module, bias in adapter.biases.items():
            model.get_submodule(module).bias.data = torch.from_numpy(np.array(bias, np.float32))
    return model


def _check_names(model: Any, ready: Prepared) -> None:
    known = {name for name, _ in model.named_modules()}
    if missing := sorted(ready.checkpoint.linears.keys() - known):
        raise PlanError(
            f"{missing[0]} of {ready.checkpoint.path} goes by another name in transformers' model, so it "
            "can't be measured; choose formats yourself (--weights)"
        )


def oriented(checkpoint: Checkpoint, module: str, weight: Float32) -> torch.Tensor:
    """A weight (out, in) as the model holds it: Conv1D holds (in, out)."""
    found = torch.from_numpy(weight)
    return found.T.contiguous() if checkpoint.is_conv1d(module) else found


@dataclass
class Rounded:
    """Codes of every module by format. steps: format -> module -> what the plan would say."""

    ready: Prepared
    steps: Mapping[str, Mapping[str, Step]]
    method: str
    stores: Mapping[str, CodesFolder]
    groups: list[tuple[str, ...]] = field(default_factory=list)

    def calibrate(self, model: Any, windows: Sequence[Int64], progress: Progress) -> None:
        """Round everything to everything, in one walk of the text through the model."""
        modules = frozenset(module for steps in self.steps.values() for module in steps)
        Walk(model, modules, windows, "original", progress=progress).run(self._answer)
        reached = {module for group in self.groups for module in group}
        if missing := sorted(modules - reached):
            raise PlanError(
                f"the text never reaches {missing[0]}, so its sensitivity can't be measured; give other text "
                "or choose formats yourself (--weights)"
            )

    def _answer(self, inputs: Inputs) -> Mapping[str, torch.Tensor]:
        gram = Gram.of(inputs.gram)
        for module in inputs.modules:
            target = self._target(module)
            for name, steps in self.steps.items():
                step = steps[module]
                grid = None if step.copies else grid_of(step, exported=True)
                if grid is not None:
                    self.stores[name].put(module, requantize(target, grid, self.method, gram))
        self.groups.append(inputs.modules)
        return {}

    def _target(self, module: str) -> Float32:
        ready = self.ready
        if ready.plan.mode == "branch":
            return ready.checkpoint.dequantize(module)
        return merge.merged_weight(ready.checkpoint, module, ready.adapters, ready.projections)

    def exchanged(self, modules: Sequence[str], name: str, model: Any) -> dict[str, torch.Tensor]:
        """The parameters of a unit in one format, the adapter's delta included; those that change."""
        found = {}
        for module in modules:
            if module in self.stores[name]:
                weight = self.stores[name][module].dequantize()
                if self.ready.plan.mode == "branch":
                    base = self.ready.checkpoint.dequantize(module)
                    change = oriented(self.ready.checkpoint, module, weight - base)
                    found[f"{module}.weight"] = model.get_submodule(module).weight.data + change
                else:
                    found[f"{module}.weight"] = oriented(self.ready.checkpoint, module, weight)
        return found

    def units(self, model: Any, replay: Replay, heads: Sequence[str], progress: Progress) -> tuple[Unit, ...]:
        """Every unit with its options measured, each alone; `heads`: what the ends may be stored as."""
        found = [self._ends(model, replay, heads)]
        for number, modules in enumerate(self.groups):
            progress("measuring sensitivities", number, len(self.groups))
            options = {}
            for name, steps in self.steps.items():
                changed = self.exchanged(modules, name, model)
                size = sum(step_bytes(steps[module]) for module in modules)
                options[name] = Option(size, replay.kl(changed) if changed else 0.0)
            found.append(Unit(_name(modules), modules, options))
        progress("measuring sensitivities", len(self.groups), len(self.groups))
        return tuple(found)

    def _ends(self, model: Any, replay: Replay, heads: Sequence[str]) -> Unit:
        """Embeddings and head; tied ones are stored once."""
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        weights = {id(layer.weight): layer.weight for layer in (table, head) if layer is not None}
        names = {id(value): name for name, value in model.named_parameters()}
        shapes = [tuple(weight.shape) for weight in weights.values()]
        # The lookup of embeddings has no short blocks.
        kinds = heads if head is not None and not shapes[0][1] % BLOCK else ("fp32",)
        options = {}
        for kind in kinds:
            changed = {names[key]: _rounded(weight, kind) for key, weight in weights.items()}
            size = sum(matrix_bytes(rows, columns, kind) for rows, columns in shapes)
            options[kind] = Option(size, 0.0 if kind == "fp32" else replay.kl(changed))
        return Unit(ENDS, (), options)


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "fp32":
        return weight
    values = quantize(weight.detach().numpy(), int(kind.removeprefix("int")), BLOCK, symmetric=kind == "int8")
    return torch.from_numpy(values.dequantize())


def _name(modules: Sequence[str]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
    first, rest = modules[0], modules[1:]
    return "+".join([first, *(module.rsplit(".", 1)[-1] for module in rest)])


def heads_of(formats: Sequence[str]) -> tuple[str, ...]:
    """What embeddings and head may be stored as beside linears of these formats."""
    return tuple(name for name in HEADS if name in formats) or ("fp32",)


def bytes_of(units: Sequence[Unit], layers: str, head: str) -> int:
    """Bytes of all units when every one has the same format; ends that can't become `head` stay float32."""
    total = 0
    for unit in units:
        wanted = layers if unit.modules else head
        total += unit.options[wanted if wanted in unit.options else "fp32"].size
    return total


@dataclass(frozen=True)
class Picked(Mapping[str, Codes]):
    """The codes of a plan: of each module those of its format."""

    stores: Mapping[str, CodesFolder]
    formats: Mapping[str, str]

    def __getitem__(self, module: str) -> Codes:
        return self.stores[self.formats[module]][module]

    def __iter__(self) -> Iterator[str]:
        return (module for module, name in self.formats.items() if module in self.stores[name])

    def __len__(self) -> int:
        return sum(1 for _ in self)
