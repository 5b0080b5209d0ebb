"""What stands behind a bundle: drift measured against the model as trained, and the gates it had to pass."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge import golden_vectors
from vera_edge.device.golden import FILE as GOLDEN
from vera_edge.drift import assess, limits, windows
from vera_edge.drift.result import DriftReport
from vera_edge.errors import VeraEdgeError
from vera_edge.files import canonical_json, read_json, write_atomic
from vera_edge.progress import Progress
from vera_edge.release.cache import Store, key_of
from vera_edge.release.job import Job
from vera_edge.release.recipe import LimitsEntry

REPORT = "drift.json"
_DIGITS = 4


@dataclass(frozen=True)
class Evidence:
    """The measured drift (`report`, canonical JSON), and whether every gate was passed.

    `breaches`: a sentence for each gate that wasn't. `kl` in nats; `retained` is a share, None when the
    adapter has no effect on the text that could be retained. `key` names all that determined it.
    """

    report: bytes
    breaches: tuple[str, ...]
    verdict: str
    kl: float
    retained: float | None
    limits: Mapping[str, float]
    key: str

    @property
    def passed(self) -> bool:
        return not self.breaches


def gather_evidence(
    job: Job,
    store: Store,
    folder: Path,
    facts: Mapping[str, Any],
    progress: Progress,
) -> Evidence:
    """Measure the exported `folder`, or find it measured. `facts` determine the export.

    Raises a VeraEdgeError when the text or an input can't be used.
    """
    recipe, adapter = job.recipe, job.adapter
    entry = recipe.file.limits
    source = entry.data if entry.data == windows.BUILT_IN else str(recipe.path(entry.data))
    bounds = limits.gather(None, _bounds(entry))
    asked = {
        "export": key_of(facts),
        "limits": bounds,
        "stage": "evidence",
        "text": windows.read_text(source).sha256,
        "tokens": entry.tokens,
        "window": entry.window,
    }

    def make(stage: Path) -> None:
        request = assess.Request(
            reference=recipe.path(adapter.path),
            candidate=folder,
            data=source,
            base=recipe.path(recipe.base(adapter.base).path),
            projection_dtype=adapter.projection_dtype,
            tokens=entry.tokens,
            window=entry.window,
        )
        report = limits.hold(assess.assess(request, progress), bounds)
        write_atomic(stage / REPORT, canonical_json(_portable(report, entry.data)))

    found, _ = store.build(asked, make)
    return _read(found / REPORT, bounds, key_of(asked))


def golden(job: Job, store: Store, folder: Path, facts: Mapping[str, Any], progress: Progress) -> Path:
    """The file of golden vectors for the exported `folder`, made by the model as trained, or found made."""

    def make(stage: Path) -> None:
        import torch

        copy = stage / "bundle"
        shutil.copytree(folder, copy)
        recipe, adapter = job.recipe, job.adapter
        # With one thread the last digits don't depend on how many this machine has.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            golden_vectors.ask(
                copy,
                recipe.path(recipe.base(adapter.base).path),
                [(recipe.path(adapter.path), 1.0)],
                projection_dtype=adapter.projection_dtype,
                progress=progress,
            )
        finally:
            torch.set_num_threads(threads)
        (copy / GOLDEN).rename(stage / GOLDEN)
        shutil.rmtree(copy)

    found, _ = store.build({"export": key_of(facts), "stage": "golden"}, make)
    return found / GOLDEN


def _bounds(entry: LimitsEntry) -> dict[str, float | None]:
    return {"max_kl": entry.max_kl, "min_top1": entry.min_top1, "min_retained": entry.min_retained}


def _portable(report: DriftReport, data: str) -> dict[str, Any]:
    """The report without this machine's paths, its figures rounded beyond what thread counts change."""
    value = _rounded(report.to_dict())
    for side in ("reference", "candidate", "base"):
        if value.get(side):
            value[side]["path"] = Path(value[side]["path"]).name
    value["candidate"]["path"] = "."
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


def _read(path: Path, bounds: Mapping[str, float], key: str) -> Evidence:
    value = read_json(path, VeraEdgeError)
    retained = value.get("retained")
    return Evidence(
        report=path.read_bytes(),
        breaches=tuple(o["sentence"] for o in value["outcomes"] if o["state"] != "kept"),
        verdict=value["verdict"]["sentence"],
        kl=value["fidelity"]["kl"]["mean"]["value"],
        retained=None if retained is None else retained["value"],
        limits=bounds,
        key=key,
    )
