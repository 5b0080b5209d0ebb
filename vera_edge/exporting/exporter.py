"""What an export target is: an Exporter that turns a Plan into a folder, a Runner that gives logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.bundle.contents import Manifest
from vera_edge.plans.plan import Plan
from vera_edge.progress import Progress, silent
from vera_edge.requantize import Codes, Grid
from vera_edge.requantize.correction import Correction
from vera_edge.text.mixture import Mixture
from vera_edge.text.windows import BUILT_IN
from vera_edge.trained.trained_model import TrainedModel

CALIBRATION = "calibration"  # in a plan's options
EXPORT = "export"  # the purpose of the hidden folder in which one grows,
RESULT = "out"  # and what in it becomes the bundle


class Runner(Protocol):
    """Something that gives a model's logits."""

    @property
    def vocab_size(self) -> int: ...

    def logits(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """Teacher-forced logits (n, vocab_size) of one sequence of n token ids."""


@dataclass(frozen=True)
class ExportRequest:
    """Everything an exporter needs.

    model: with at least one adapter. plan: made for it. options: what the target alone understands; the
    targets here take `projections` ("fp32", "fp16", "int8", "int4") and `head` ("fp32", "fp16", "int8",
    "int4"): how projections and embeddings are stored; `head_activations` ("int8", "int16"): what an integer
    head reads is rounded to; `accuracy_level` ("4": activations are rounded to int8, "0": float32); `vectors`
    ("fp32", "fp16"): what a branch takes its adapter's vectors as; `origin` ("baked", "seed"): whether the
    projections are in the files, or drawn on the device; `run` ("int8"): what 4-bit weights are expanded to
    there; `kv_cache` ("float", "int8"): what keys and values are kept as.
    requantized: by module, weights of the plan's formats that were rounded with care (merged where the plan
    merges); the exporter rounds the others itself. text: what ranges of activations, and of keys and values,
    are calibrated on: texts with shares, or one alone, a UTF-8 file or "built-in".
    drawn: a folder for the graph before its weights are rounded, which the next export of the same inputs in
    the same mode takes from there; None where nothing is to be kept. corrections: by module, what its output
    gets beside the rounded weight's.
    """

    model: TrainedModel
    plan: Plan
    out: Path
    options: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    progress: Progress = silent
    requantized: Mapping[str, Codes] = field(default_factory=dict)
    drawn: Path | None = None
    text: str | Mixture = BUILT_IN
    corrections: Mapping[str, Correction] = field(default_factory=dict)


@dataclass(frozen=True)
class Export:
    """A folder that was exported. `model` is the file a runtime opens; `notes` are for a person to read."""

    target: str
    folder: Path
    model: Path
    size: int
    plan: Plan
    adapters: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "target": self.target,
            "folder": str(self.folder),
            "model": str(self.model),
            "size": self.size,
            "mode": self.plan.mode,
            "weights": self.plan.weights,
            "adapters": {name: str(path) for name, path in self.adapters.items()},
            "notes": list(self.notes),
        }


class RoundedWeights(NamedTuple):
    """What rounding gave. codes: by module. notes: sentences for a person to read.

    model: what to export; its adapters' vectors may have been refitted to the rounded base.
    corrections: by module, what its output is to get beside. device: what rounded, where that isn't the
    processor. calibration: the texts it was calibrated on, by digest, and how many tokens of each, as a plan
    says it.
    """

    codes: Mapping[str, Codes]
    notes: tuple[str, ...]
    model: TrainedModel
    corrections: Mapping[str, Correction] = MappingProxyType({})
    device: str | None = None
    calibration: Sequence[Mapping[str, Any]] = ()


class RoundsWeights(Protocol):
    """Rounds the weights of a plan before the exporter sees them; see `weight_rounding.Rounding`."""

    @property
    def text(self) -> str | Mixture:
        """What is calibrated on: texts with shares, or one alone, a UTF-8 file or "built-in"."""

    def codes(
        self, model: TrainedModel, plan: Plan, out: Path, progress: Progress, *, head: Grid | None = None
    ) -> AbstractContextManager[RoundedWeights]:
        """The weights rounded; codes are kept beside `out` while the context lasts.

        head: what the output head is stored on, where it's to be rounded with care; its codes are HEAD's.
        """


@runtime_checkable
class Exporter(Protocol):
    """A target.

    One may also have `weights`, what linear layers can be asked to be by the names that its users know, each
    with the plan's name of it (without it they are WEIGHTS); and `settle(plan, model)`, which gives the plan
    with every layer's own format where the target doesn't store all layers alike (see `WithFormats`); and
    what it stores where nobody asks (see `WithUsualWeights`; without it "fp32").
    """

    @property
    def name(self) -> str: ...

    def export(self, request: ExportRequest) -> Export:
        """Write `request.out`, whole or not at all. Raises TargetError when the model can't be exported."""


@runtime_checkable
class WithFormats(Exporter, Protocol):
    """A target with weight formats of its own."""

    @property
    def weights(self) -> Mapping[str, str]:
        """What a person can ask for -> the plan's name of it."""

    def settle(self, plan: Plan, model: TrainedModel) -> Plan:
        """`plan` with the format that each layer really gets. Raises TargetError where there is none."""


@runtime_checkable
class PacksAdapters(Exporter, Protocol):
    """A target with a file of its own for an adapter that an exported branch takes."""

    def pack(self, model: TrainedModel, manifest: Manifest, out: Path, name: str) -> None:
        """Write the one adapter of `model` to the file `out`, for the bundle of `manifest`; `name`: its own.

        Raises TargetError when it can't be carried.
        """


@runtime_checkable
class WithUsualWeights(Exporter, Protocol):
    """A target that knows how linear layers are best stored where nobody says so."""

    def usual_weights(self, model: TrainedModel, mode: str, options: Mapping[str, str]) -> str:
        """One of the names that can be asked for."""

    def usual_note(self, request: ExportRequest, weights: str) -> str:
        """A sentence: that nobody asked, what `weights` come to, and what others would."""
