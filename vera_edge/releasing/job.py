"""One bundle that a release has to make, as data that any worker can be sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vera_edge.releasing.adapter_entry import AdapterEntry
from vera_edge.releasing.recipe import Recipe
from vera_edge.releasing.variant import Variant


@dataclass(frozen=True)
class ReleaseJob:
    """One bundle to make. Picklable, so that any worker can do it; `rank` is its place in the recipe.

    fresh: the name of a run that takes nothing from earlier ones (see `Store`); None takes what is there.
    """

    recipe: Recipe
    adapter: AdapterEntry
    variant: Variant
    out: Path
    store: Path
    rank: int = 0
    fresh: str | None = None

    @property
    def name(self) -> str:
        """The bundle's folder within the release."""
        return f"{self.adapter.id}/{self.variant.name}"
