"""Automatic precision: measure every unit in every format, solve, try the plan out, correct, solve again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vera_edge import merging as merge
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import PlanError
from vera_edge.exporting import plan_options
from vera_edge.exporting import target as targets
from vera_edge.merging import Prepared
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import DENSE, SAME, Plan, Step
from vera_edge.precision.changes import Replaying
from vera_edge.precision.choice import ChosenPlan
from vera_edge.precision.codes import UnitCodes
from vera_edge.precision.latency import DeviceTimes, MachineTimes, ProductTimes, read_times
from vera_edge.precision.replay import Replay
from vera_edge.precision.request import PlanRequest, split
from vera_edge.precision.solver import Solver, finished
from vera_edge.precision.streamed_replay import StreamedReplay
from vera_edge.precision.trained import check_adapters, trained_model, trained_stream
from vera_edge.precision.trial import Trials
from vera_edge.precision.units import Sensitivities, as_it_is, bytes_of, heads_of
from vera_edge.progress import Progress, silent
from vera_edge.reference import room
from vera_edge.reference.streamed import LayerStream
from vera_edge.requantize import CALIBRATED, CodesFolder, devices
from vera_edge.requantize.effort import DEFAULT
from vera_edge.storage.files import staged_folder
from vera_edge.storage.scratch import scratch_folder
from vera_edge.tasks import task as tasks
from vera_edge.text import mixture, windows
from vera_edge.text import tokenizer as tokenizers
from vera_edge.text.mixture import Cut, Mixture


def choose(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    request: PlanRequest,
    beside: Path,
    projection_rounding: str | None = None,
    progress: Progress = silent,
    keep: Path | None = None,
    trained_as: TrainedAs | None = None,
) -> ChosenPlan:
    """The plan that loses least within `request.max_size`, or the smallest within `request.max_kl`.

    base, adapters: folders, each adapter with its weight. beside: a path in whose folder scratch files may
    lie (thrice as large as the float model). keep: a folder for the export of the plan, as it was measured;
    one that is there is replaced. trained_as: how the base was loaded in training.
    Raises PlanError when no plan keeps the limit, other VeraEdgeErrors when an input is at fault.
    """
    request.check()
    times = _times(request)
    targets.find(request.target)
    merged = merge.prepare(base, adapters, SAME, None, projection_rounding, trained_as=trained_as)
    if tasks.of(merged.model.checkpoint.config).gives != tasks.TEXT:
        raise PlanError(
            f"{base} gives no text, and a plan is made by what a model says; choose --weights and measure "
            "the export with vera-edge drift"
        )
    ready = replace(merged, plan=plans.plan_model(merged.model, request.mode))
    check_adapters(ready)
    with scratch_folder(beside, "plan") as work:
        return _Search(ready, request, work, progress, keep, times).run()


def _times(request: PlanRequest) -> ProductTimes | None:
    """What products take: as the device told, on this machine, or None where nobody asked."""
    if request.device_times is not None:
        times = read_times(Path(request.device_times))
        times.require(list(dict.fromkeys((*request.formats, *heads_of(request.formats)))))
        return times
    return None if request.max_latency is None else MachineTimes()


def candidates(ready: Prepared, formats: Sequence[str]) -> tuple[str, Plan, dict[str, dict[str, Step]]]:
    """A format to start from and the plan for it, and by format the steps of the modules that may have it.

    Raises PlanError when no layer may be quantized.
    """
    made = {}
    for name in formats:
        kind, block = split(name)
        made[name] = plan_options.in_blocks(plans.plan_model(ready.model, ready.plan.mode, kind), block, None)
    quantized = {name: plan for name, plan in made.items() if name not in DENSE} or made
    free: set[str] | None = None
    for name, plan in quantized.items():
        may = {step.module for step in plan.steps if step.result == split(name)[0]}
        free = may if free is None else free & may
    if not free:
        path = ready.model.checkpoint.path
        raise PlanError(f"no layer of {path} may be stored as {' or '.join(formats)}")
    steps = {
        name: {step.module: step for step in plan.steps if step.module in free} for name, plan in made.items()
    }
    first = next(iter(quantized))
    return first, made[first], steps


@dataclass
class _Search:
    ready: Prepared
    request: PlanRequest
    work: Path
    progress: Progress
    keep: Path | None
    times: ProductTimes | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> ChosenPlan:
        first, start, steps = candidates(self.ready, self.request.formats)
        stores = {name: CodesFolder(self.work / name) for name in steps}
        for store in stores.values():
            store.folder.mkdir()
        rounded = UnitCodes(
            self.ready,
            steps,
            self.request.method,
            stores,
            effort=self.request.unit_effort,
            device=devices.chosen(self.request.device),
        )
        sensitivity, check = self._windows()
        calibration = self._calibration(self.request.trial_tokens)
        start = targets.told(start, calibration.to_list() if self.request.method in CALIBRATED else ())
        trials, heads = Trials(self.ready, self.request.target, self.work), heads_of(self.request.formats)
        with self._timed("weighing"):
            weighed = trials.weigh(finished(start, heads[0], self.request, self.ready), self.progress)
        stream = self._stream()
        model = trained_model(self.ready) if stream is None else stream.model
        values = as_it_is if stream is None else stream.weights.values
        enough = devices.enough_memory(rounded.device, "a layer and its statistics")
        with self._timed("calibration and rounding"), enough:
            own = self._calibration(self.request.unit_tokens)
            rounded.calibrate(model, own.windows, self.progress, stream)
        modules = [module for group in rounded.groups for module in group]
        with self._timed("sensitivities"):
            replay = self._replay(stream, model, modules, sensitivity)
            units = Sensitivities(model, replay, rounded, self.times, values).units(heads, self.progress)
            del replay
        fixed = float(weighed - bytes_of(units, first, heads[0]))
        with self._timed("trials"):
            replay = self._replay(stream, model, modules, check)
            facts = (self.request, start, rounded, units, model, replay, trials, self.progress, fixed, values)
            solver = Solver(*facts)
            point = solver.solve()
        if self.keep is not None:
            with staged_folder(self.keep, force=True) as stage:
                shutil.copytree(solver.folders[point], stage, dirs_exist_ok=True)
        notes = self._notes(calibration, sensitivity, check)
        told = () if stream is None else (room.note(self.ready.model.checkpoint),)
        return solver.choice(point, self.seconds, (*notes, *told))

    def _stream(self) -> LayerStream | None:
        """What runs the model layer by layer, where it doesn't fit and can be run so."""
        if room.fits(self.ready.model.checkpoint, self.request.max_memory):
            return None
        return trained_stream(self.ready)

    def _replay(
        self, stream: LayerStream | None, model: Any, modules: Sequence[str], text: windows.Windows
    ) -> Replaying:
        if stream is not None:
            return StreamedReplay(stream, text.tokens)
        return Replay(model, modules, text.tokens)

    def _windows(self) -> tuple[windows.Windows, windows.Windows]:
        """The text that units are measured on, and the longer one for plans."""
        request, (tokenizer, size) = self.request, self._tokenizer()
        texts = Mixture.either(request.calibration)
        data = windows.read_text(texts.names[0] if request.data is None else request.data)
        width = min(windows.WINDOW, request.tokens)
        counts = (request.tokens, request.check_tokens)
        few, more = (windows.make(data, tokenizer, size, count, width) for count in counts)
        return few, more

    def _calibration(self, tokens: int) -> Cut:
        tokenizer, size = self._tokenizer()
        return mixture.cut(Mixture.either(self.request.calibration), tokenizer, size, tokens, windows.WINDOW)

    def _tokenizer(self) -> tuple[Tokenizer, int]:
        """It, and how many tokens the model knows."""
        checkpoint = self.ready.model.checkpoint
        config = checkpoint.config.get("text_config") or checkpoint.config
        return tokenizers.read(checkpoint.files, checkpoint.config), int(config.get("vocab_size", 0))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[what] = round(time.monotonic() - begun, 1)

    def _notes(self, calibration: Cut, *cut: windows.Windows) -> tuple[str, ...]:
        few, more = (sum(len(window) for window in one.tokens) for one in cut)
        request, found = self.request, list(self.ready.model.notes)
        spent = "" if request.effort == DEFAULT else f" with effort {request.effort}"
        if request.method in CALIBRATED:
            found.append(
                f"weights were rounded by {request.method}{spent}, calibrated on {calibration.said()}; "
                "export with the same --method and --calibration"
            )
        else:
            found.append(f"weights were rounded by {request.method}; export with the same --method")
        own = Mixture.either(request.calibration).names
        source = own[0] if request.data is None else request.data
        found.append(
            f"sensitivities: the KL of one unit quantized alone, on {few} tokens of {source} text; plans: of "
            f"all units together, in torch (predicted) and in an export (measured), on {more} tokens"
        )
        if isinstance(self.times, DeviceTimes):
            found.append(
                f"latency is that of {self.times.device} with {self.times.threads} threads, measured there, "
                "and of the layers' products alone, one token at a time"
            )
        elif self.times is not None:
            found.append(
                "latency is this machine's, and of the layers' products alone, one token at a time; for a "
                "device's own measure them there (vera-edge bench BUNDLE --products --json) and give the "
                "file as --device-times"
            )
        if source in own and source != windows.BUILT_IN:
            found.append("measured on the text that weights were calibrated on, which flatters; give --data")
        return tuple(found)
