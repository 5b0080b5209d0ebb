"""A whole model onto new grids: calibration and requantization together, layer after layer.

The target of each layer is the model as trained: `W + delta` where it's merged, `W` where the adapter stays a
branch beside the requantized base. Either way the calibration text runs through the effective weights, delta
included. A branch's vectors can be refitted to the base that came out (recover.py), and layers can be given a
low-rank term and a bias beside their weight (correction.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from vera_edge.adapters.vera import LambdaVectors, vectors_of
from vera_edge.arrays import Float32, Int64
from vera_edge.cores import available_cores
from vera_edge.errors import DataError, MismatchError
from vera_edge.merging.delta import effect
from vera_edge.plans.plan import HEAD
from vera_edge.progress import Progress, silent
from vera_edge.reference.calibration import LayerInputs, Sees, Walk, follow_target
from vera_edge.reference.ends import OutputHead
from vera_edge.reference.hidden_states import ROOM
from vera_edge.reference.layers import Changed, stack_of
from vera_edge.reference.model import TorchReference, load_dense, load_light, oriented
from vera_edge.reference.stand_ins import StandIns
from vera_edge.reference.streamed import LayerStream
from vera_edge.requantize import CALIBRATED, Codes, Effort, Gram, Grid, requantize
from vera_edge.requantize.correction import Correction, low_rank
from vera_edge.requantize.devices import CPU, placed
from vera_edge.requantize.gram import in_threads
from vera_edge.rounding import recover
from vera_edge.rounding.journal import Rounded, RoundingJournal
from vera_edge.trained.alignment import names_in
from vera_edge.trained.trained_model import TrainedModel


@dataclass(frozen=True)
class Recovered:
    """By module: an adapter's vectors where they were refitted, and corrections where there are any."""

    vectors: Mapping[str, LambdaVectors]
    corrections: Mapping[str, Correction]


@dataclass(frozen=True)
class Calibration:
    """How to calibrate. `windows`: token ids. `sees`, `follow`: see calibration.py.

    recover: what to win back, of recover.PARTS. device: torch's name of the one that computes statistics and
    rounds; None: the processor's compiled loops.
    """

    windows: Sequence[Int64]
    method: str = "gptq"
    sees: Sees = "inputs"
    follow: float = 1.0
    effort: Effort = field(default_factory=Effort)
    recover: tuple[str, ...] = ()
    device: str | None = None


def write_back(
    model: TrainedModel,
    grids: Mapping[str, Grid],
    calibration: Calibration,
    put: Callable[[str, Codes], None],
    merged: bool = True,
    auto_class: str = "AutoModelForCausalLM",
    progress: Progress = silent,
    journal: RoundingJournal | None = None,
    layer_by_layer: bool = True,
    room: int = ROOM,
) -> Recovered:
    """Requantize the modules of `grids`; `put(module, codes)` is called for each, in order of computation.

    journal: what an earlier run of the same work has finished isn't done again, and all is kept there.
    layer_by_layer: read the weights layer by layer, of a model that can be run so; the results are the same.
    room: bytes of hidden states that stay in memory.
    `HEAD` among the grids is the output head, which is rounded last, merged or not; where a model has none
    that could be, nothing is put for it. Modules that the text never reaches get scales by search, without
    statistics, and no correction. Codes are in nn.Linear's orientation (out, in). Memory: one layer in
    float32, or the whole model, and the statistics of one input.
    Raises DataError when the model or the text can't be calibrated with, MismatchError for a module that the
    base doesn't have, PlanError where there's nothing that could be recovered.
    """
    asked = recover.check(calibration.recover, model.adapters, merged, calibration.method)
    for module in grids:
        if module not in model.checkpoint.linears and module != HEAD:
            raise MismatchError(f"{model.checkpoint.path} has no linear layer called {module}")
    work = _WriteBack(model, grids, calibration, put, merged, asked, journal)
    if calibration.method in CALIBRATED and not work.is_done():
        walk = work.walk(auto_class, layer_by_layer, progress)
        walk = replace(walk, room=room, device=calibration.device or CPU)
        walk.run(work.answer, work.recall)
    work.finish(progress)
    return Recovered(work.refitted, work.corrections)


@dataclass
class _WriteBack:
    model: TrainedModel
    grids: Mapping[str, Grid]
    calibration: Calibration
    put: Callable[[str, Codes], None]
    merged: bool
    asked: recover.Recovery
    journal: RoundingJournal | None = None
    done: set[str] = field(default_factory=set)
    refitted: dict[str, LambdaVectors] = field(default_factory=dict)
    corrections: dict[str, Correction] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    threads: int = 1  # for one module
    stored: dict[str, str] = field(default_factory=dict)  # the model's name of a module -> the checkpoint's
    head: OutputHead | None = None
    tied: bool = False  # the head's weight is the embeddings' too
    stand_ins: StandIns | None = None  # for the head's weight, among others

    def is_done(self) -> bool:
        """Whether the journal has all modules."""
        return self.journal is not None and self.grids.keys() <= self.journal.keys()

    def walk(self, auto_class: str, layer_by_layer: bool, progress: Progress) -> Walk:
        """The walk through the model as trained."""
        windows, sees = self.calibration.windows, self.calibration.sees
        if layer_by_layer and (light := load_light(self.model.checkpoint, auto_class, self._trained)):
            model, weights = light
            names, head = frozenset(self.prepare(model, whole=False)), self._head_of(model, weights)
            view = TorchReference(model.eval(), 0, has_adapter=False)
            stream = LayerStream.of(model, weights, [view])
            if stream is not None and stack_of(model, names)[0] == stream.name:
                return Walk(model, names, windows, sees, progress, stream, head=head)
        model = load_dense(self.model.checkpoint, auto_class).eval()
        names = frozenset(self.prepare(model))
        return Walk(model, names, windows, sees, progress, head=self._head_of(model))

    def _head_of(self, model: Any, weights: StandIns | None = None) -> OutputHead | None:
        """The head, where it's wanted and isn't adapted, which makes it a layer like any other."""
        found = OutputHead.of(model) if HEAD in self.grids else None
        if found is None:
            return None
        name = next((name for name, module in model.named_modules() if module is found.linear), "")
        adapted = {module for adapter, _ in self.model.adapters for module in adapter.vectors}
        if self.stored.get(name, name) in adapted:
            return None
        self.head, self.stand_ins, self.stored[HEAD] = found, weights, HEAD
        self.tied = found.shares(model.get_input_embeddings())
        return found

    def _head_weight(self) -> Float32:
        """(vocabulary, hidden)."""
        assert self.head is not None
        if self.stand_ins is None:
            return self.head.weight
        with self.stand_ins.placed([self.head.parameter], {}):
            return self.head.weight

    def _trained(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A matrix of the model as trained, of the base's; `name` is that in the checkpoint."""
        module = name.removesuffix(".weight")
        if not any(module in adapter.vectors for adapter, _ in self.model.adapters):
            return weight
        return weight + oriented(self.model.checkpoint, module, self._delta(module))

    def prepare(self, model: Any, whole: bool = True) -> list[str]:
        """Make the model the one that was trained: every adapter's biases and, where `whole`, deltas.

        Returns what it calls the modules to round. Raises DataError when it knows none like them.
        """
        adapted = {name for adapter, _ in self.model.adapters for name in (*adapter.vectors, *adapter.biases)}
        modules = self.grids.keys() - {HEAD}
        names = names_in(model, {*modules, *adapted})
        if names is None:
            raise DataError(
                f"layers of {self.model.checkpoint.path} go by other names in transformers' model, so "
                "text can't calibrate them; choose --method hqq or rtn"
            )
        self.stored = {names[module]: module for module in self.grids if module in modules}
        for module in {name for adapter, _ in self.model.adapters for name in adapter.vectors if whole}:
            weight = model.get_submodule(names[module]).weight
            weight.data = self._trained(f"{module}.weight", weight.data)
        for adapter, _ in self.model.adapters:
            for module, bias in adapter.biases.items():
                model.get_submodule(names[module]).bias.data = torch.from_numpy(np.array(bias, np.float32))
        for name, module in self.stored.items():
            if (bias := model.get_submodule(name).bias) is not None:
                self.biases[module] = bias.data
        return list(self.stored)

    def recall(self, names: tuple[str, ...]) -> Mapping[str, Changed] | None:
        """What modules that read one input have from now on, where the journal has them all."""
        live = {self.stored[name]: name for name in names}
        if self.journal is None or not live.keys() <= self.journal.keys():
            return None
        read = [self._read(module) for module in live]
        if HEAD in live:
            return {}

        def work(item: tuple[str, Rounded]) -> tuple[Float32, Float32 | None]:
            module, rounded = item
            weight = rounded.codes.dequantize()
            if not self.merged:
                weight = weight + self._branch(module, rounded.vectors)
            if (correction := rounded.correction) is None:
                return weight, None
            if (term := correction.weight) is not None:
                weight = weight + term
            return weight, correction.bias

        found = in_threads(work, zip(live, read, strict=True), _threads())
        return {
            name: self._changed(module, weight, bias)
            for (module, name), (weight, bias) in zip(live.items(), found, strict=True)
        }

    def _read(self, module: str) -> Rounded:
        """What the journal has of a module, which is done with it."""
        assert self.journal is not None
        rounded = self.journal.read(module)
        if rounded.vectors is not None:
            self.refitted[module] = rounded.vectors
        if rounded.correction is not None:
            self.corrections[module] = rounded.correction
        self.done.add(module)
        self.put(module, rounded.codes)
        return rounded

    def _changed(self, module: str, weight: Float32, bias: Float32 | None) -> Changed:
        # Not in the threads of the arithmetic, which torch's inference mode doesn't reach.
        total = None if bias is None else torch.from_numpy(bias) + self.biases.get(module, 0)
        return Changed(oriented(self.model.checkpoint, module, weight), total)

    def answer(self, inputs: LayerInputs) -> Mapping[str, Changed]:
        """What modules have from now on, by the model's names."""
        live = {self.stored[name]: name for name in inputs.modules}
        changed = self._answer(replace(inputs, modules=tuple(live)))
        return {live[module]: change for module, change in changed.items()}

    def _answer(self, inputs: LayerInputs) -> Mapping[str, Changed]:
        effort = self.calibration.effort
        gram = Gram.of(inputs.gram, max(effort.damp, inputs.damp), effort.act_order, in_place=True)
        gram = placed(gram, self.calibration.device)
        if self.calibration.method == "gptq":
            gram.prepare()
        cores = _threads() if gram.device is None else 1
        # Where fewer modules than cores read the same input, the rows of each are shared out.
        self.threads = max(1, cores // len(inputs.modules))

        def work(module: str) -> tuple[Codes, Float32, Float32 | None]:
            return self._rounded(module, inputs, gram)

        found, changed = in_threads(work, inputs.modules, cores), {}
        for module, (codes, weight, bias) in zip(inputs.modules, found, strict=True):
            self._keep(module, codes)
            if module == HEAD:  # nothing reads what it gives
                continue
            changed[module] = self._changed(module, weight, bias)
        return changed

    def _rounded(self, module: str, inputs: LayerInputs, gram: Gram) -> tuple[Codes, Float32, Float32 | None]:
        """The codes, the effective weight that the model has from now on, and what its bias gets."""
        if module == HEAD:
            weight = self._head_weight()
            # What makes up for the layers would lead embeddings away, where both are one table.
            follow = 0.0 if self.tied else self.calibration.follow
            target = follow_target(weight, inputs, follow, gram, self.threads)
            return self._codes(module, target, gram), target, None
        base = self.model.checkpoint.dequantize(module)
        delta = self._delta(module, base)
        trained = base + delta
        target = follow_target(trained, inputs, self.calibration.follow, gram, self.threads)
        if self.merged:
            codes = self._codes(module, target, gram)
            found = codes.dequantize()
        else:
            codes = self._codes(module, base if target is trained else target - delta, gram)
            found = codes.dequantize()
            found = found + self._refitted(module, target - found, delta, gram)
        if self.asked.rank:
            found = found + self._low_rank(module, target - found, gram)
        bias = self._bias(module, trained, found, inputs) if self.asked.bias else None
        return codes, found, bias

    def _low_rank(self, module: str, left: Float32, gram: Gram) -> Float32:
        """The low-rank term for what is left, (out, in)."""
        up, down = low_rank(left, gram, self.asked.rank)
        self.corrections[module] = Correction(up, down)
        return up @ down

    def _bias(self, module: str, trained: Float32, found: Float32, inputs: LayerInputs) -> Float32:
        """The bias that brings the mean of the output to that of the model as trained.

        W mean(X) + mean(R - R~) - V mean(X~), W trained and V found; see calibration.py for the letters.
        """
        assert inputs.means is not None
        now, before, stream = inputs.means
        bias: Float32 = trained @ before - found @ now
        if stream is not None:
            bias += stream
        known = self.corrections.get(module, Correction())
        self.corrections[module] = replace(known, bias=bias)
        return bias

    def _refitted(self, module: str, left: Float32, delta: Float32, gram: Gram) -> Float32:
        """What the branch adds from now on; `left`: what it should, `delta`: what it does as trained."""
        adapter, weight = self.model.adapters[0] if self.asked.vectors else (None, 0.0)
        if adapter is None or module not in adapter.vectors:
            return delta
        vectors, scale = vectors_of(adapter)[module], np.float32(weight)
        assert self.model.projections is not None
        found = recover.refit(vectors, left / scale, self.model.projections, gram, self.asked.vectors)
        self.refitted[module] = found
        return self._branch(module, found)

    def _branch(self, module: str, vectors: LambdaVectors | None) -> Float32:
        """What a side-branch adds; vectors: the only adapter's, where they were refitted."""
        if vectors is None:
            return self._delta(module)
        scale = np.float32(self.model.adapters[0][1])
        inside = self.model.checkpoint.linears[module].in_features
        assert self.model.projections is not None
        return scale * self.model.projections.delta(vectors.lambda_b, vectors.lambda_d, inside)

    def finish(self, progress: Progress) -> None:
        """Requantize what no text reached, one module at a time, its rows on all cores."""
        self.threads = _threads()
        for module in self.journal or ():
            if module not in self.done:
                self._read(module)
        left = [module for module in self.grids if module not in self.done and module != HEAD]
        for number, module in enumerate(left):
            progress("rounding", number, len(left))
            weight = self.model.checkpoint.dequantize(module)
            target = weight + self._delta(module) if self.merged else weight
            self._keep(module, self._codes(module, target, None))

    def _codes(self, module: str, target: Float32, gram: Gram | None) -> Codes:
        method = self.calibration.method
        if gram is None and method == "gptq":
            method = "search"
        return requantize(target, self.grids[module], method, gram, self.calibration.effort, self.threads)

    def _keep(self, module: str, codes: Codes) -> None:
        if self.journal is not None:
            rest = self.refitted.get(module), self.corrections.get(module)
            self.journal.put(module, Rounded(codes, *rest))
        self.put(module, codes)
        self.done.add(module)

    def _delta(self, module: str, base: Float32 | None = None) -> Float32:
        """What the adapters change of a weight; base: it, where it is at hand."""
        checkpoint, adapters = self.model.checkpoint, self.model.adapters
        if base is None:
            adds, shape = all(adapter.adds for adapter, _ in adapters), checkpoint.linears[module].shape
            base = np.empty(shape, np.float32) if adds else checkpoint.dequantize(module)
        return effect(module, base, adapters, self.model.projections)


def _threads() -> int:
    """How many threads round: those that torch may use, and no more than there are cores."""
    return min(torch.get_num_threads(), available_cores())
