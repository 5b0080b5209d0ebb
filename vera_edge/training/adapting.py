"""An adapter carried from the base it was trained on to the one that is shipped.

Its lambda vectors, or LoRA's pairs, are trained a little further, beside the base that is shipped, towards
what the model as trained says to a text. The base stays as it is, so that other adapters share it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge import __version__
from vera_edge.adapters.adapter import LORA, VERA, Adapter
from vera_edge.adapters.reading import title_of
from vera_edge.arrays import Float32, Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import DataError, MismatchError, PlanError
from vera_edge.memory import free_memory
from vera_edge.progress import Progress, silent
from vera_edge.reference import room
from vera_edge.requantize import devices
from vera_edge.storage.files import check_output
from vera_edge.tasks import task as tasks
from vera_edge.text import mixture, windows
from vera_edge.text import tokenizer as tokenizers
from vera_edge.text.mixture import Mixture
from vera_edge.trained.text_settings import vocabulary_size
from vera_edge.trained.trained_model import TrainedModel, open_model
from vera_edge.training import adapter_folder

_HELD_OUT = 8  # windows, or an eighth of a shorter text's, and at least as many as the next line has
_LEAST_HELD_OUT = 2
_LEAST_TOKENS = 1024
_ROOM = 1.3  # of what both models take in float32: the text's activations come to that


@dataclass(frozen=True)
class Adapted:
    """An adapter that was carried over.

    before, after, effect: mean KL in nats from the model as trained, on the held-out windows: of the adapter
    as it came beside the shipped base, as it was written, and of the trained base without an adapter.
    steps: taken; best: the step whose values were written, 0 for those that came. stopped: why early.
    tokens: trained on; held_out: judged on. seconds: it took.
    """

    folder: Path
    before: float
    after: float
    effect: float
    steps: int
    best: int
    stopped: str | None
    tokens: int
    held_out: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def improved(self) -> bool:
        """Whether its values are others than those that came."""
        return self.best > 0

    def share(self, kl: float) -> float:
        """A divergence as a share of the adapter's effect."""
        return kl / self.effect if self.effect else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        found = asdict(self) | {"folder": str(self.folder), "notes": list(self.notes)}
        return found | {"improved": self.improved}


def to_folder(
    base: Path,
    adapter: Path,
    onto: Path,
    out: Path,
    text: str | Mixture = windows.BUILT_IN,
    steps: int = 160,
    activations: str | None = None,
    projection_rounding: str | None = None,
    trained_as: TrainedAs | None = None,
    tokenizer: Path | None = None,
    device: str = devices.CPU,
    force: bool = False,
    progress: Progress = silent,
) -> Adapted:
    """Carry `adapter`, trained on `base`, to the base `onto`, and write it to `out` as a PEFT folder.

    text: what to train on: texts with shares, or one alone, a UTF-8 file or "built-in"; an eighth of it is
    held out, eight windows at most. activations: "int8" rounds what the shipped integer layers read as the
    runtime does. device: of requantize.devices.DEVICES, what both models run on.
    Raises MismatchError when the three don't belong together, PlanError for a model that gives no text or
    doesn't fit in memory twice and for a device that isn't there, DataError for a text that is too short,
    OutputError for `out`.
    """
    began = time.monotonic()
    check_output(out, force, (base, adapter, onto))
    if steps < 1:
        raise PlanError(f"{steps} steps train nothing; give at least 1")
    pairs, on = [(adapter, 1.0)], devices.chosen(device)
    bases = Checkpoint.open(base, trained_as), Checkpoint.open(onto)
    _check_bases(*bases)
    trained, shipped = (open_model(one, pairs, projection_rounding, None, tokenizer) for one in bases)
    _check(trained, shipped)
    _check_method(trained.adapters[0].adapter)
    training, held_out, notes = _split(trained, Mixture.either(text), steps)
    from vera_edge.training.distillation import Schedule  # it imports torch

    with devices.enough_memory(on, "both models in float32 and what a window of text takes"):
        runs = _Runs.of(trained, shipped, activations, on)
        found = runs.distil(training, held_out, Schedule(steps), progress)
        effect = runs.effect(held_out)
    made = Adapted(
        out,
        found.before,
        found.after,
        effect,
        found.steps,
        found.best,
        found.stopped,
        found.tokens,
        sum(map(len, held_out)),
        round(time.monotonic() - began, 1),
        (*trained.notes, *_other_projections(trained, shipped), *notes, *_doubts(onto, found.before, effect)),
    )
    source = shipped.adapters[0].adapter
    arrays = runs.as_saved(source, found.arrays)
    adapter_folder.write(source, arrays, out, str(onto), _card(made, adapter, base, onto), force)
    return made


def _check_method(adapter: Adapter) -> None:
    """Raise PlanError for an adapter of a method whose values aren't trained here."""
    if adapter.method not in (VERA, LORA):
        raise PlanError(
            f"{adapter.path} is an adapter of {title_of(adapter)}, and those of VeRA and LoRA alone are "
            "carried over; train it on the base that is shipped (vera_edge.training.load)"
        )


def _check_bases(trained: Checkpoint, shipped: Checkpoint) -> None:
    """Raise MismatchError unless the two are one model, however each is stored."""
    shapes = [{module: linear.shape for module, linear in one.linears.items()} for one in (trained, shipped)]
    common = shapes[0].keys() & shapes[1].keys()
    kinds = {one.config.get("model_type") for one in (trained, shipped)}
    if len(kinds) > 1 or not common or any(shapes[0][name] != shapes[1][name] for name in common):
        raise MismatchError(
            f"{trained.path} and {shipped.path} aren't the same model: its type or its layers differ; give "
            "the base that was trained on, and the same model as it is shipped"
        )


def _check(trained: TrainedModel, shipped: TrainedModel) -> None:
    """Raise unless both are models of one kind that give text, and fit in memory together."""
    bases = [trained.checkpoint, shipped.checkpoint]
    for checkpoint in bases:
        if tasks.of(checkpoint.config).gives != tasks.TEXT:
            raise PlanError(
                f"{checkpoint.path} gives {tasks.of(checkpoint.config).gives or 'something else'}, and "
                "adapters are carried over by what models say to a text"
            )
    rows = [vocabulary_size(one.config) for one in bases]
    if rows[0] != rows[1]:
        raise MismatchError(
            f"{bases[0].path} has a vocabulary of {rows[0]} tokens and {bases[1].path} one of {rows[1]}; "
            "they aren't the same model"
        )
    logits = 4 * _HELD_OUT * windows.WINDOW * max(rows)  # of the model as trained, kept
    needed = int(_ROOM * sum(map(room.float32_size, bases))) + logits
    free = free_memory()
    if free is not None and free < needed:
        raise PlanError(
            f"both models in float32 take about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; "
            "run it where there's more memory"
        )


def _other_projections(trained: TrainedModel, shipped: TrainedModel) -> tuple[str, ...]:
    """That PEFT rounds the projections otherwise on the shipped base, which it then learns."""
    before, after = trained.projections, shipped.projections
    if before is None or after is None or before.digest == after.digest:
        return ()
    return (
        f"the projections, rounded to {before.spec.rounding} on the trained base, are rounded to "
        f"{after.spec.rounding} on the shipped one, as PEFT does there",
    )


def _doubts(onto: Path, before: float, effect: float) -> tuple[str, ...]:
    """That the shipped base may be another model's, of which layers of the same shapes tell nothing."""
    if before <= effect:
        return ()
    return (
        f"beside {onto} the adapter, as it came, is further from the model as trained ({before:.3g} nats) "
        f"than the trained base alone ({effect:.3g}); see whether it is the same model",
    )


def _split(
    model: TrainedModel, texts: Mixture, steps: int
) -> tuple[list[Int64], list[Int64], tuple[str, ...]]:
    """Windows to train on and windows to judge by, spread over the texts; and notes."""
    checkpoint = model.checkpoint
    tokenizer, rows = tokenizers.read(checkpoint.files, checkpoint.config), vocabulary_size(checkpoint.config)
    longest = checkpoint.config.get("max_position_embeddings")
    window = min(windows.WINDOW, longest) if type(longest) is int else windows.WINDOW
    cut = mixture.cut(texts, tokenizer, rows, (steps + _HELD_OUT) * window, window)
    count = sum(map(len, cut.windows))
    apart = max(_LEAST_HELD_OUT, min(_HELD_OUT, len(cut.windows) // 8))
    if count < _LEAST_TOKENS or len(cut.windows) < 2 * apart:
        least = max(_LEAST_TOKENS, 2 * _LEAST_HELD_OUT * window)
        more = f", better {steps * window:,}" if steps * window > least else ""
        raise DataError(
            f"{' and '.join(texts.names)} gives {count} tokens, too few to carry an adapter over; give at "
            f"least {least:,}{more}"
        )
    held = {number * len(cut.windows) // apart for number in range(apart)}
    training = [one for number, one in enumerate(cut.windows) if number not in held]
    note = f"trained on {cut.said()}"
    if not texts.own:
        note += "; text like the adapter's own (--calibration FILE) serves better"
    return training, [cut.windows[number] for number in sorted(held)], (note,)


@dataclass(frozen=True)
class _Runs:
    """Both models in torch: the one as trained, and the adapter beside the shipped base."""

    teacher: Any
    student: Any

    @classmethod
    def of(
        cls, trained: TrainedModel, shipped: TrainedModel, activations: str | None, device: str | None
    ) -> _Runs:
        from vera_edge.reference.model import open_reference
        from vera_edge.training.loading import check_activations, round_inputs
        from vera_edge.training.on_device import placed

        check_activations(activations)
        models = [open_reference(one.checkpoint, one.adapters, one.projections) for one in (trained, shipped)]
        if activations is not None:
            round_inputs(models[1].model.base_model.model, shipped.checkpoint)
        for model in models:
            placed(model.model, device)
        return cls(*models)

    def distil(
        self, training: Sequence[Int64], held_out: Sequence[Int64], schedule: Any, progress: Progress
    ) -> Any:
        from vera_edge.training.distillation import distil

        return distil(self.teacher.logits, self.student.model, training, held_out, schedule, progress)

    def effect(self, held_out: Sequence[Int64]) -> float:
        """The mean KL of the trained base without the adapter."""
        from vera_edge import divergence

        bare = self.teacher.adapter_off()
        found = [
            divergence.kl(*(divergence.log_softmax(one.logits(window)) for one in (self.teacher, bare)))
            for window in held_out
        ]
        return float(np.concatenate(found).mean())

    def as_saved(
        self, adapter: Adapter, arrays: Mapping[str, Mapping[str, Float32]]
    ) -> Mapping[str, Mapping[str, Float32]]:
        """By the layers' names that PEFT saved them under, of those that the loaded model has."""
        from vera_edge.trained.alignment import as_loaded

        loaded = as_loaded(adapter, self.student.model.base_model.model, speaks=True)
        saved = (adapter.as_trained or adapter).vectors
        return {theirs: arrays[here] for here, theirs in zip(loaded.vectors, saved, strict=True)}


def _card(made: Adapted, adapter: Path, base: Path, onto: Path) -> str:
    """README.md of the adapter, by PEFT's keys."""
    names = [path.resolve().name for path in (adapter, base, onto)]
    lost = [f"{kl:.4g} nats ({made.share(kl):.1%} of its effect)" for kl in (made.before, made.after)]
    return (
        "---\nlibrary_name: peft\n---\n"
        f"# {names[0]}, carried from {names[1]} to {names[2]}\n\n"
        f"It was trained by vera-edge {__version__} towards the model as trained, for {made.best} "
        f"steps. Mean KL from that model on {made.held_out} held-out tokens: {lost[0]} before, {lost[1]} "
        "after.\n"
    )
