"""What is asked of a combination of adapters: PEFT's types of it, and what each of them takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vera_edge.errors import PlanError

# As `add_weighted_adapter` calls them: what works on the factors of a LoRA, on dense deltas, on their sum.
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
ON_DELTAS = ("svd", *DENSE)
EXACT = "cat"
KINDS = (EXACT, *ON_DELTAS, *ON_FACTORS)
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """One way of combining adapters.

    kind: one of KINDS. density: the share of values that pruning keeps. majority_sign: whose sign wins in
    TIES: that of the sum ("total", which None means), or of most adapters ("frequency"). rank: what an SVD
    cuts to; None for the largest of the adapters'. seed: of DARE's draws; None for 0.
    """

    kind: str = EXACT
    density: float | None = None
    majority_sign: str | None = None
    rank: int | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raise PlanError for what isn't known, is missing, or would have no effect."""
        if self.kind not in KINDS:
            raise PlanError(f"the combination {self.kind!r} isn't known; choose from {', '.join(KINDS)}")
        if self.prunes and self.density is None:
            raise PlanError(f"{self.kind} needs a density, the share of values that it keeps, like 0.5")
        if self.density is not None and not (0 < self.density <= 1 and math.isfinite(self.density)):
            raise PlanError(f"the density is {self.density}; it must be above 0 and at most 1")
        if self.majority_sign not in (None, *SIGNS):
            raise PlanError(f"the majority sign is {self.majority_sign!r}; choose total or frequency")
        if self.rank is not None and self.rank < 1:
            raise PlanError(f"the rank is {self.rank}; it must be at least 1")
        if self.seed is not None and self.seed < 0:
            raise PlanError(f"the seed is {self.seed}; it must be 0 or more")
        for name, value, taken in (
            ("density", self.density, self.prunes),
            ("majority sign", self.majority_sign, self.elects),
            ("rank", self.rank, self.kind in ON_DELTAS),
            ("seed", self.seed, self.is_random),
        ):
            if value is not None and not taken:
                raise PlanError(f"{self.kind} takes no {name}; leave it out")

    @property
    def prunes(self) -> bool:
        """Whether only some values of each adapter take part."""
        return self.kind.startswith(("ties", "dare", "magnitude_prune"))

    @property
    def is_random(self) -> bool:
        """Whether those are drawn (DARE), not the largest."""
        return self.kind.startswith("dare")

    @property
    def elects(self) -> bool:
        """Whether adapters whose sign isn't the majority's are left out (TIES), value by value."""
        return self.kind.startswith(("ties", "dare_ties"))

    def to_dict(self) -> dict[str, Any]:
        """What is given of it, as a JSON object."""
        return {name: value for name, value in vars(self).items() if value is not None}
