"""The weighted sum of what adapters add to a layer, as a product, and how far another product is from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vera_edge.adapters.vera import LambdaVectors
from vera_edge.combining.low_rank import LowRank, joined, nearest_to_product
from vera_edge.combining.sources import DeltaSource, Sources


def products_of(sources: Sources, module: str) -> list[LowRank] | None:
    """The deltas of those that change a layer, in their order; None where one isn't a product."""
    inside = sources.checkpoint.linear(module).in_features
    found = [source.product(module, inside) for source in sources.of(module)]
    known = [product for product in found if product is not None]
    return known if len(known) == len(found) else None


def sum_of(sources: Sources, module: str, products: Sequence[LowRank]) -> LowRank:
    """The weighted sum of `products_of`: of the ranks of all together, or with one A of that of one."""
    each = sources.of(module)
    if sources.shares_projections:
        return _with_one_a(each, module, products)
    return joined(products, [source.weight for source in each])


def _with_one_a(each: Sequence[DeltaSource], module: str, products: Sequence[LowRank]) -> LowRank:
    """VeRA's: `sum_i w_i diag(b_i) B diag(d_i) A` is what stands before A, times A."""
    left = np.zeros_like(products[0].left)
    for source, product in zip(each, products, strict=True):
        change = source.adapter.vectors[module]
        assert isinstance(change, LambdaVectors)
        left += np.float32(source.weight) * product.left * change.lambda_d
    projections = each[0].projections
    assert projections is not None
    return LowRank(left, projections.a[:, : products[0].right.shape[1]])


def distance(made: LowRank, whole: LowRank) -> tuple[float, float]:
    """The Frobenius norms of the difference of two products and of the second; neither is made dense."""
    difference = nearest_to_product(joined([made, whole], [1.0, -1.0]), 0)
    return difference.norm, nearest_to_product(whole, 0).norm
