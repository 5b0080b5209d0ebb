"""[[adapter]] of a recipe: an adapter's folder, or several combined into one."""

from __future__ import annotations

from pydantic import Field, model_validator

from vera_edge.adapters.projection import ProjectionDtype
from vera_edge.combining.combination import EXACT, Combination
from vera_edge.errors import PlanError
from vera_edge.releasing.names import Id, Line, RecipeTable

_OF_A_COMBINATION = ("combination", "density", "majority_sign", "rank", "seed")


class CombinedPart(RecipeTable):
    """One of the adapters that are combined, and its weight."""

    path: Line
    weight: float = Field(default=1.0, strict=False)


class AdapterEntry(RecipeTable):
    """[[adapter]]: an adapter and the base it was trained on.

    path: its folder; or combine: several, which become one as `vera-edge adapter combine` makes it, by the
    keys from `combination` on.
    """

    id: Id
    base: Id
    path: Line | None = None
    projection_dtype: ProjectionDtype | None = None
    licence: Line | None = None
    combine: tuple[CombinedPart, ...] | None = Field(default=None, strict=False, min_length=2)
    combination: Line | None = None
    density: float | None = Field(default=None, strict=False)
    majority_sign: Line | None = None
    rank: int | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _one_way(self) -> AdapterEntry:
        if (self.path is None) == (self.combine is None):
            raise ValueError("needs a path, or combine with several")
        given = [name for name in _OF_A_COMBINATION if getattr(self, name) is not None]
        if self.combine is None and given:
            raise ValueError(f"has {given[0]}, which belongs to combine")
        try:
            self.asked.check()
        except PlanError as cause:
            raise ValueError(str(cause)) from None
        return self

    @property
    def asked(self) -> Combination:
        """How the adapters are combined."""
        kind = self.combination or EXACT
        return Combination(kind, self.density, self.majority_sign, self.rank, self.seed)

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders it is made of."""
        parts = () if self.combine is None else tuple(part.path for part in self.combine)
        return parts if self.path is None else (self.path,)
