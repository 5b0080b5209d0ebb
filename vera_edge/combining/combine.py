"""Several adapters of one base combined into one adapter, layer by layer.

On factors, as PEFT's `add_weighted_adapter`: A and B of LoRA adapters are combined each for itself, with
`sqrt(weight * scale)` on either side, so that their product isn't the sum of the deltas. VeRA adapters that
share projections are combined by their vectors, which for "linear" is the same, and stay VeRA; the factors
of IA3 adapters are summed by "linear", and stay IA3. On deltas:
"cat" is the sum itself, written as a LoRA of as high a rank as it takes; what ends in "svd" combines dense
deltas of any method and keeps the nearest product of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.adapters.reading import title_of
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Float32
from vera_edge.base.trained_as import TrainedAs
from vera_edge.combining import scalings
from vera_edge.combining.arithmetic import combined
from vera_edge.combining.combination import DENSE, EXACT, ON_DELTAS, ON_FACTORS, Combination
from vera_edge.combining.folder import Share, Writing
from vera_edge.combining.low_rank import LowRank, Nearest, nearest_to, nearest_to_product
from vera_edge.combining.sources import DeltaSource, Sources, open_sources
from vera_edge.combining.sums import distance, products_of, sum_of
from vera_edge.combining.written import WrittenAdapter
from vera_edge.errors import MismatchError, PlanError
from vera_edge.merging.terms import quiet
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import check_output

RECORD = "combination.json"
# What to take instead, where there are no factors to combine.
_INSTEAD = {EXACT: "svd", "linear": "svd"} | {kind: f"{kind}_svd" for kind in ON_FACTORS if kind != "linear"}
_SUMS = (EXACT, "svd", "linear")  # what biases take part in


def combine(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    asked: Combination | None = None,
    projection_rounding: str | None = None,
    trained_as: TrainedAs | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> WrittenAdapter:
    """Combine adapters (folders, each with its weight) of one base into the PEFT folder `out`.

    asked: how; None for their sum. projection_rounding, trained_as: as a merge takes them.
    Raises PlanError when that can't be asked of them, MismatchError when they don't fit the base or each
    other.
    """
    asked = asked or Combination()
    asked.check()
    if len(adapters) < 2:
        raise PlanError("a combination takes two adapters or more; give another one")
    check_output(out, force, (base, *(path for path, _ in adapters)))
    sources = open_sources(base, adapters, projection_rounding, trained_as)
    _check_biases(sources, asked.kind)
    work = _Combining(sources, asked)
    writing = Writing(out, force, {RECORD: _record(sources, asked)}, progress)
    if asked.kind in ON_FACTORS and sources.shares_projections:
        with quiet():
            pairs = work.vectors()
        made = writing.vectors(sources, pairs, {"save_projection": bool(_saved(sources))}, _saved(sources))
    elif asked.kind == "linear" and scalings.are_all(sources):
        with quiet():
            pairs = scalings.combined_factors(sources, work.from_sum)
        inputs = [sources.names[module] for module, ends in pairs.items() if len(ends[scalings.FACTORS]) == 1]
        made = writing.vectors(sources, pairs, {"feedforward_modules": sorted(inputs)})
    else:
        made = writing.lora(sources, work.rank, work.layer)
    return replace(made, from_sum=work.from_sum.value)


def _check_biases(sources: Sources, kind: str) -> None:
    """Raise PlanError where biases are to be pruned, which no combination of PEFT's says."""
    biased = next((one.adapter for one in sources.each if one.adapter.biases), None)
    if biased is not None and kind not in _SUMS:
        raise PlanError(
            f"{biased.path} trained or changes biases, which are summed and never pruned, so {kind} doesn't "
            f"take them; choose {', '.join(_SUMS[:-1])} or {_SUMS[-1]}"
        )


def _record(sources: Sources, asked: Combination) -> dict[str, Any]:
    """What the combination was made of, for whoever finds it."""
    of = [
        {"name": one.adapter.name, "digest": one.adapter.digest, "weight": one.weight} for one in sources.each
    ]
    return {"adapters": of, "combination": asked.to_dict()}


def _saved(sources: Sources) -> Mapping[str, Float32]:
    """A and B, where one of the adapters brings them."""
    saved = next((one.adapter.saved for one in sources.each if one.adapter.saved), None)
    return {} if saved is None else {"vera_A": saved[0], "vera_B": saved[1]}


@dataclass
class _Combining:
    """from_sum: how far the combination is from the weighted sum, of the layers so far."""

    sources: Sources
    asked: Combination
    from_sum: Share = field(default_factory=Share)

    @cached_property
    def rank(self) -> int:
        """The rank of the LoRA. Raises where it has to be given, or where factors differ in theirs."""
        kind, ranks = self.asked.kind, [source.adapter.rank for source in self.sources.each]
        full = next((one.adapter for one in self.sources.each if self._is_full(one)), None)
        if full is not None and kind in _INSTEAD:
            raise PlanError(
                f"{full.path} ({title_of(full)}) is read as what it makes of whole weights, so it has no "
                f"factors for {kind}; take {_INSTEAD[kind]}, with a rank"
            )
        if kind in ON_DELTAS:
            if self.asked.rank is None and full is not None:
                raise PlanError(
                    f"{full.path} ({title_of(full)}) has no rank to go by; give the combination's (--rank)"
                )
            return self.asked.rank or max(ranks)
        if kind == EXACT:
            return ranks[0] if self.sources.shares_projections else sum(ranks)
        self._check_one_rank(ranks, "the adapters")
        return ranks[0]

    def _is_full(self, source: DeltaSource) -> bool:
        module = next(iter(source.adapter.vectors))
        return source.product(module, self.sources.checkpoint.linear(module).in_features) is None

    def _check_one_rank(self, ranks: Sequence[int], where: str) -> None:
        if len(set(ranks)) > 1:
            raise MismatchError(
                f"{self.asked.kind} combines factors, and those of {where} have ranks "
                f"{', '.join(map(str, ranks))}; take cat or svd"
            )

    def layer(self, module: str) -> Nearest | LowRank:
        """A layer's pair, and where something had to be left out, how much."""
        products = products_of(self.sources, module)
        if products is None or self.asked.kind in DENSE:
            return self._dense(module)
        whole = sum_of(self.sources, module, products)
        if self.asked.kind == EXACT:
            return whole
        if self.asked.kind == "svd":
            found = nearest_to_product(whole, self.rank)
            self.from_sum.add(found.error, found.norm)
            return found
        made = self._of_factors(module, products)
        self.from_sum.add(*distance(made, whole))
        return made

    def _of_factors(self, module: str, products: Sequence[LowRank]) -> LowRank:
        """A and B combined each for itself, as PEFT does."""
        self._check_one_rank([product.rank for product in products], module)
        pairs = zip(self.sources.of(module), products, strict=True)
        right, left = _on_either_side([source.weight * one.scale for source, one in pairs])
        return LowRank(
            combined([one.left for one in products], left, self.asked, f"{module} B"),
            combined([one.right for one in products], right, self.asked, f"{module} A"),
        )

    def _dense(self, module: str) -> Nearest:
        """Whole deltas, combined value by value and cut to the rank."""
        each = self.sources.of(module)
        weights = [source.weight for source in each]
        deltas = [source.delta(module, self.sources.checkpoint) for source in each]
        mixed = combined(deltas, weights, self.asked, module)
        found = nearest_to(mixed, self.rank)
        plain = mixed if self.asked.kind == "svd" else combined(deltas, weights, Combination("svd"), module)
        self.from_sum.add(float(np.linalg.norm(found.product.dense() - plain)), float(np.linalg.norm(plain)))
        return found

    def vectors(self) -> dict[str, dict[str, Float32]]:
        """The vectors of VeRA adapters with one A and B, combined as their factors would be, by module."""
        pairs = {}
        for module in self.sources.modules:
            each = self.sources.of(module)
            right, left = _on_either_side([source.weight for source in each])
            changes = [source.adapter.vectors[module] for source in each]
            found = [change for change in changes if isinstance(change, LambdaVectors)]
            b = combined([one.lambda_b for one in found], left, self.asked, f"{module} B")
            d = combined([one.lambda_d for one in found], right, self.asked, f"{module} A")
            pairs[module] = {"vera_lambda_b": b, "vera_lambda_d": d}
            made = replace(each[0], adapter=replace(each[0].adapter, vectors={module: LambdaVectors(b, d)}))
            products = products_of(self.sources, module) or []
            product = made.product(module, self.sources.checkpoint.linear(module).in_features)
            if product is not None:
                self.from_sum.add(*distance(product, sum_of(self.sources, module, products)))
        return pairs


def _on_either_side(weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Weights of A and of B, whose products are `weights`, as PEFT splits them: the sign is A's."""
    right = [math.copysign(math.sqrt(abs(weight)), weight) for weight in weights]
    return right, [abs(root) for root in right]
