"""A whole model onto new grids: calibration and requantization together, layer after layer.

The target of each layer is the model as trained: `W + delta` where it's merged, `W` where the adapter stays a
branch beside the requantized base. Either way the calibration text runs through the effective weights, delta
included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vera_edge.adapter import Adapter
from vera_edge.calibration import Inputs, Int64, Sees, Walk, follow_target
from vera_edge.checkpoint import Checkpoint
from vera_edge.errors import MismatchError
from vera_edge.progress import Progress, silent
from vera_edge.projection import Projections
from vera_edge.reference import load_dense
from vera_edge.requantize import Codes, Effort, Gram, Grid, requantize
from vera_edge.tensors import Float32


@dataclass(frozen=True)
class Calibration:
    """How to calibrate. `windows`: token ids. `sees`, `follow`: see calibration.py."""

    windows: Sequence[Int64]
    method: str = "gptq"
    sees: Sees = "original"
    follow: float = 0.0
    effort: Effort = field(default_factory=Effort)


def write_back(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections | None,
    grids: Mapping[str, Grid],
    calibration: Calibration,
    put: Callable[[str, Codes], None],
    merged: bool = True,
    auto_class: str = "AutoModelForCausalLM",
    progress: Progress = silent,
) -> None:
    """Requantize the modules of `grids`; `put(module, codes)` is called for each, in order of computation.

    Modules that the text never reaches get scales by search, without statistics. Codes are in nn.Linear's
    orientation (out, in). Memory: the model in float32 and one layer's statistics.
    Raises DataError when the model or the text can't be calibrated with, MismatchError for a module that the
    base doesn't have.
    """
    for module in grids:
        if module not in checkpoint.linears:
            raise MismatchError(f"{checkpoint.path} has no linear layer called {module}")
    work = _WriteBack(checkpoint, adapters, projections, grids, calibration, put, merged)
    if calibration.method in ("search", "gptq"):
        model = load_dense(checkpoint, auto_class).eval()
        work.prepare(model)
        cross = calibration.follow > 0
        walk = Walk(model, frozenset(grids), calibration.windows, calibration.sees, cross, progress)
        walk.run(work.answer)
    work.finish(progress)


@dataclass
class _WriteBack:
    checkpoint: Checkpoint
    adapters: Sequence[tuple[Adapter, float]]
    projections: Projections | None
    grids: Mapping[str, Grid]
    calibration: Calibration
    put: Callable[[str, Codes], None]
    merged: bool
    done: set[str] = field(default_factory=set)

    def prepare(self, model: Any) -> None:
        """Make the model the one that was trained: every adapter's delta and biases in its weights."""
        for module in {name for adapter, _ in self.adapters for name in adapter.vectors}:
            weight = model.get_submodule(module).weight
            weight.data = weight.data + self._stored(module, torch.from_numpy(self._delta(module)))
        for adapter, _ in self.adapters:
            for module, bias in adapter.biases.items():
                model.get_submodule(module).bias.data = torch.from_numpy(np.array(bias, np.float32))

    def answer(self, inputs: Inputs) -> Mapping[str, torch.Tensor]:
        gram = Gram.of(inputs.gram, self.calibration.effort.damp, self.calibration.effort.act_order)
        changed = {}
        for module in inputs.modules:
            base, delta = self.checkpoint.dequantize(module), self._delta(module)
            trained = base + delta
            target = follow_target(trained, inputs, self.calibration.follow)
            if not self.merged:
                target = base if target is trained else target - delta
            found = self._requantize(module, target, gram)
            effective = found if self.merged else found + delta
            changed[module] = self._stored(module, torch.from_numpy(effective))
        return changed

    def finish(self, progress: Progress) -> None:
        """Requantize what no text reached."""
        left = [module for module in self.grids if module not in self.done]
        for number, module in enumerate(left):
            progress("rounding", number, len(left))
            weight = self.checkpoint.dequantize(module)
            self._requantize(module, weight + self._delta(module) if self.merged else weight, None)

    def _requantize(self, module: str, target: Float32, gram: Gram | None) -> Float32:
        method = self.calibration.method
        if gram is None and method == "gptq":
            method = "search"
        codes = requantize(target, self.grids[module], method, gram, self.calibration.effort)
        self.put(module, codes)
        self.done.add(module)
        return codes.dequantize()

    def _delta(self, module: str) -> Float32:
        linear = self.checkpoint.linears[module]
        total = np.zeros(linear.shape, np.float32)
        for adapter, weight in self.adapters:
            if module in adapter.vectors and self.projections is not None:
                vectors = adapter.vectors[module]
                delta = self.projections.delta(vectors.lambda_b, vectors.lambda_d, linear.in_features)
                total += np.float32(weight) * delta
        return total

    def _stored(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """In the model's own orientation: Conv1D holds (in, out)."""
        return weight.T.contiguous() if self.checkpoint.is_conv1d(module) else weight
