"""What stands behind a bundle: drift measured against the model as trained, and the gates it had to pass."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.check.golden import FILE as GOLDEN
from vera_edge.errors import VeraEdgeError
from vera_edge.exporting import golden_vectors
from vera_edge.measuring import assess, charts, limits, measurable, svg
from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport
from vera_edge.progress import Progress
from vera_edge.releasing.cache import Store, key_of, link
from vera_edge.releasing.inputs import ReleaseInputs
from vera_edge.releasing.job import ReleaseJob
from vera_edge.releasing.trained import TrainedFolder
from vera_edge.storage.json_text import canonical_json, read_json
from vera_edge.text import windows

REPORT = "drift.json"
PLOTS = {"kl_histogram.svg": charts.kl_histogram, "kl_by_position.svg": charts.kl_by_position}
_DIGITS = 4


@dataclass(frozen=True)
class Evidence:
    """The measured drift (`report`, canonical JSON), and whether every gate was passed.

    `plots`: SVG files of it by name. `breaches`: a sentence for each gate that wasn't. `kl` in nats, None
    where none is measured (embeddings, values); `retained` is a share, None when the adapter has no effect on
    the text that could be retained.
    """

    report: bytes
    plots: Mapping[str, bytes]
    breaches: tuple[str, ...]
    verdict: str
    kl: float | None
    retained: float | None
    limits: Mapping[str, float]

    @property
    def passed(self) -> bool:
        return not self.breaches


@dataclass(frozen=True)
class Question:
    """What is to be measured of a job's export, beside what was trained. `key` names all that decides it."""

    job: ReleaseJob
    trained: TrainedFolder
    text: str
    bounds: Mapping[str, float]
    facts: Mapping[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.facts)


def question(job: ReleaseJob, inputs: ReleaseInputs) -> Question:
    """What the recipe asks. Raises a VeraEdgeError when its text or limits can't be used."""
    entry = job.recipe.file.limits
    text = job.recipe.text(entry.data)
    bounds = limits.gather(None, entry.bounds)
    facts = {
        "export": key_of(inputs.facts),
        "limits": bounds,
        "stage": "evidence and plots",
        "text": windows.read_text(text).sha256,
        "tokens": entry.tokens,
        "window": entry.window,
    }
    return Question(job, inputs.trained, text, bounds, facts)


def check(asked: Question) -> None:
    """Before the export: raise a VeraEdgeError when drift isn't measured of such a base, or not so."""
    recipe, adapter = asked.job.recipe, asked.job.adapter
    measurable.check(Checkpoint.open(recipe.path(recipe.base(adapter.base).path)), asked.bounds)


def measure(asked: Question, store: Store, folder: Path, progress: Progress) -> Evidence:
    """Measure the exported `folder`, or find it measured."""
    recipe, adapter = asked.job.recipe, asked.job.adapter
    entry = recipe.file.limits

    def make(stage: Path) -> None:
        request = assess.DriftRequest(
            reference=asked.trained.path,
            candidate=folder,
            data=asked.text,
            base=recipe.path(recipe.base(adapter.base).path),
            projection_rounding=asked.trained.rounding,
            tokens=entry.tokens,
            window=entry.window,
            trained_as=recipe.base(adapter.base).spec,
        )
        with _one_thread():
            report = limits.hold(assess.assess_any(request, progress), asked.bounds)
        (stage / REPORT).write_bytes(canonical_json(_portable(report, entry.data)))
        if isinstance(report, DriftReport):
            drawn = {name: draw(report) for name, draw in PLOTS.items()}
            for name, chart in drawn.items():
                if chart:
                    (stage / name).write_bytes(svg.as_file(chart))

    found, _ = store.build(asked.facts, make)
    return read(found, asked)


def golden(asked: Question, store: Store, folder: Path, progress: Progress) -> Path:
    """The file of golden vectors for the exported `folder`, made by the model as trained, or found made."""
    recipe, adapter = asked.job.recipe, asked.job.adapter

    def make(stage: Path) -> None:
        copy = stage / "bundle"
        for name in [*bundle.read(folder).files, bundle.MANIFEST]:
            link(folder / name, copy / name)
        base, trained = recipe.base(adapter.base), [(asked.trained.path, None)]
        with _one_thread():
            golden_vectors.ask(
                copy,
                recipe.path(base.path),
                trained,
                projection_rounding=asked.trained.rounding,
                progress=progress,
                trained_as=base.spec,
            )
        (copy / GOLDEN).rename(stage / GOLDEN)
        shutil.rmtree(copy)

    found, _ = store.build({"export": asked.facts["export"], "stage": "golden"}, make)
    return found / GOLDEN


@contextmanager
def _one_thread() -> Iterator[None]:
    """With one thread the last digits don't depend on how many this machine has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _portable(report: DriftReport | EncoderReport, data: str) -> dict[str, Any]:
    """The report without this machine's names and paths, its figures rounded beyond what is reproducible."""
    value = _rounded(report.to_dict())
    for side, name in (("reference", "as trained"), ("candidate", "bundle"), ("base", "base")):
        if value.get(side):
            value[side] |= {"name": name, "path": "."}
    value["text"]["source"] = data
    return dict(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _divergence(report: Mapping[str, Any]) -> float | None:
    """The mean KL of a report's dict, where there is one."""
    if "fidelity" in report:
        return float(report["fidelity"]["kl"]["mean"]["value"])
    answered = report["classes"] or report["labels"]
    return None if answered is None else float(answered["kl"]["value"])


def read(folder: Path, asked: Question) -> Evidence:
    """The answer in a folder. Raises VeraEdgeError when it isn't there or isn't one."""
    value = read_json(folder / REPORT, VeraEdgeError)
    retained = value.get("retained")
    return Evidence(
        report=(folder / REPORT).read_bytes(),
        plots={name: (folder / name).read_bytes() for name in PLOTS if (folder / name).is_file()},
        breaches=tuple(o["sentence"] for o in value["outcomes"] if o["state"] != "kept"),
        verdict=value["verdict"]["sentence"],
        kl=_divergence(value),
        retained=None if retained is None else retained["value"],
        limits=asked.bounds,
    )
