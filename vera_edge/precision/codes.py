"""Every module rounded to every format that it may have, by itself.

4 bits are rounded with care, on the statistics of the model as trained, so that what a module's codes are
doesn't depend on the formats of others. An export's are other ones, since later layers make up for earlier:
these codes tell units and formats apart, and what a plan loses is measured on its export. At 8 bits rounding
to nearest loses next to nothing, and exporters do it by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vera_edge import merging as merge
from vera_edge.arrays import Float32, Int64
from vera_edge.errors import PlanError
from vera_edge.formats.blocks import quantize
from vera_edge.merging import Prepared
from vera_edge.plans.int8 import int8_form
from vera_edge.plans.plan import HEAD, Step
from vera_edge.precision.changes import Change
from vera_edge.precision.request import split
from vera_edge.progress import Progress
from vera_edge.reference.calibration import LayerInputs, Walk
from vera_edge.reference.ends import OutputHead
from vera_edge.reference.layers import Changed
from vera_edge.reference.model import oriented
from vera_edge.reference.streamed import LayerStream
from vera_edge.requantize import CALIBRATED, Codes, CodesFolder, Effort, Gram, Grid, int_blocks, requantize
from vera_edge.requantize.devices import CPU, placed
from vera_edge.requantize.gram import in_threads
from vera_edge.rounding.weight_rounding import BLOCK, grid_of

# A graph's layers of these formats round what they read, see replay.py.
INTEGER = ("int4", "int8")


@dataclass
class UnitCodes:
    """Codes of every module by format. steps: format -> module -> what the plan would say.

    groups: the modules that read the same input, in the order of computation, once calibrated. head: the
    output head in 4 bits then, where a plan may have that and text calibrates it.
    """

    ready: Prepared
    steps: Mapping[str, Mapping[str, Step]]
    method: str
    stores: Mapping[str, CodesFolder]
    groups: list[tuple[str, ...]] = field(default_factory=list)
    effort: Effort = field(default_factory=Effort)
    device: str | None = None  # of the statistics and of rounding; see requantize.devices
    head: Codes | None = None
    _output: OutputHead | None = None
    _head_weight: Float32 | None = None

    def calibrate(
        self, model: Any, windows: Sequence[Int64], progress: Progress, stream: LayerStream | None = None
    ) -> None:
        """Round everything to everything, in one walk of the text through the model; see `Walk`."""
        modules = frozenset(module for steps in self.steps.values() for module in steps)
        if self.method in CALIBRATED and any(split(name)[0] == "int4" for name in self.steps):
            self._take_head(model, stream)
        walk = Walk(
            model,
            modules,
            windows,
            "original",
            progress,
            stream,
            device=self.device or CPU,
            head=self._output,
        )
        walk.run(self._answer)
        reached = {module for group in self.groups for module in group}
        if missing := sorted(modules - reached):
            raise PlanError(
                f"the text never reaches {missing[0]}, so its sensitivity can't be measured; give other text "
                "or choose formats yourself (--weights)"
            )

    def _take_head(self, model: Any, stream: LayerStream | None) -> None:
        """Have the head rounded too, where the model has one that blocks divide."""
        found = OutputHead.of(model)
        if found is not None and not found.parameter.shape[1] % BLOCK:
            values = found.parameter.data if stream is None else stream.weights.values(found.parameter.data)
            self._output, self._head_weight = found, values.numpy()

    def _answer(self, inputs: LayerInputs) -> Mapping[str, Changed]:
        if inputs.modules == (HEAD,):
            assert self._head_weight is not None
            gram = Gram.of(inputs.gram, max(self.effort.damp, inputs.damp))
            blocks, threads = int_blocks(4, BLOCK, symmetric=False), torch.get_num_threads()
            self.head = requantize(self._head_weight, blocks, self.method, gram, self.effort, threads)
            return {}
        self.groups.append(inputs.modules)
        wanted = [
            (name, module, grid)
            for name, steps in self.steps.items()
            for module in inputs.modules
            if (grid := _careful(steps[module])) is not None
        ]
        if not wanted:
            return {}
        gram = placed(Gram.of(inputs.gram), self.device)
        if self.method == "gptq":
            gram.prepare()

        targets = {module: self._target(module) for module in inputs.modules}

        def work(job: tuple[str, str, Grid]) -> Codes:
            return requantize(targets[job[1]], job[2], self.method, gram, self.effort)

        found = in_threads(work, wanted, torch.get_num_threads() if gram.device is None else 1)
        for (name, module, _grid), codes in zip(wanted, found, strict=True):
            self.stores[name].put(module, codes)
        return {}

    def _target(self, module: str) -> Float32:
        ready = self.ready
        if ready.plan.mode == "branch":
            return ready.model.checkpoint.dequantize(module)
        return merge.merged_weight(ready.model, module)

    def change(self, modules: Sequence[str], name: str, model: Any) -> Change:
        """Modules in one format, the adapter's delta included; nothing where they stay what they are."""
        weights, rounded = {}, {}
        for module in modules:
            step = self.steps[name][module]
            if step.result in INTEGER and (grid := grid_of(step, exported=True)) is not None:
                rounded[module] = grid.block
            if (stored := self._stored(step, name)) is not None:
                weights[f"{module}.weight"] = self._effective(module, stored, model)
        return Change(weights, rounded)

    def _stored(self, step: Step, name: str) -> Float32 | None:
        """The weight that an export holds, (out, in); None where nothing of it is lost."""
        if step.module in self.stores[name]:
            return self.stores[name][step.module].dequantize()
        if int8_form(step, graph=True) and not step.copies:
            grid = grid_of(step, exported=True)
            assert grid is not None
            target = self._target(step.module)
            return quantize(target, grid.bits, grid.block, grid.symmetric).dequantize()
        return None

    def _effective(self, module: str, stored: Float32, model: Any) -> torch.Tensor:
        checkpoint = self.ready.model.checkpoint
        if self.ready.plan.mode == "merged":
            return oriented(checkpoint, module, stored)
        change = oriented(checkpoint, module, stored - checkpoint.dequantize(module))
        found: torch.Tensor = model.get_submodule(module).weight.data + change
        return found


def _careful(step: Step) -> Grid | None:
    """The grid of a step that is rounded with care; None for one that isn't, or isn't rounded at all."""
    grid = None if step.copies else grid_of(step, exported=True)
    return None if grid is None or grid.bits == 8 else grid
