"""The PEFT folder that a job's adapter is read from: the recipe's, or out of the store a combination's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.adapters.projection import ProjectionDtype
from vera_edge.adapters.reading import CONFIG_NAME
from vera_edge.combining.combine import RECORD, combine
from vera_edge.errors import AdapterError
from vera_edge.releasing.cache import Store
from vera_edge.releasing.job import ReleaseJob
from vera_edge.storage.json_text import read_json


@dataclass(frozen=True)
class TrainedFolder:
    """A PEFT folder. rounding: what VeRA's projections were rounded to, where the recipe says so.

    combination: what it was made of, as a JSON object; None of an adapter that was trained.
    """

    path: Path
    rounding: ProjectionDtype | None
    combination: dict[str, Any] | None = None


def folder_of(job: ReleaseJob, store: Store, tools: dict[str, str]) -> TrainedFolder:
    """The folder of a job's adapter; a combination is made where the store hasn't got it.

    tools: versions that may change its bytes. Raises a VeraEdgeError where adapters can't be combined.
    """
    entry, recipe = job.adapter, job.recipe
    if entry.path is not None:
        return TrainedFolder(recipe.path(entry.path), entry.projection_dtype)
    base = recipe.base(entry.base)
    base_path = recipe.path(base.path)
    parts = [(recipe.path(part.path), part.weight) for part in entry.combine or ()]
    facts = {
        "stage": "combination",
        "base": store.folder_digest(base_path),
        "adapters": [[path.resolve().name, store.folder_digest(path), weight] for path, weight in parts],
        "combination": entry.asked.to_dict(),
        "rounding": entry.projection_dtype,
        "trained_as": None if base.spec is None else str(base.spec),
        "tools": tools,
    }

    def make(stage: Path) -> None:
        combine(base_path, parts, stage / entry.id, entry.asked, entry.projection_dtype, base.spec)

    found, _ = store.build(facts | {"id": entry.id}, make)
    path = found / entry.id
    config = read_json(path / CONFIG_NAME, AdapterError)
    rounding = entry.projection_dtype if config["peft_type"] == "VERA" else None
    return TrainedFolder(path, rounding, read_json(path / RECORD, AdapterError))
