"""The sum of what the adapters add to one weight, row range by row range, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vera_edge.adapter import Adapter
from vera_edge.projection import Projections
from vera_edge.tensors import Float32


class Delta:
    """`sum_i weight_i * diag(lambda_b_i) B diag(lambda_d_i) A` for one linear (out, in)."""

    def __init__(
        self,
        module: str,
        in_features: int,
        adapters: Sequence[tuple[Adapter, float]],
        projections: Projections,
    ) -> None:
        self._b = projections.b
        self._terms: list[tuple[Float32, Float32]] = []
        for adapter, weight in adapters:
            if module not in adapter.vectors:
                continue
            vectors = adapter.vectors[module]
            projections.check(vectors.lambda_b, vectors.lambda_d, in_features)
            scaled_a = vectors.lambda_d[:, None] * projections.a[:, :in_features]
            self._terms.append((np.float32(weight) * vectors.lambda_b, scaled_a))

    @property
    def is_zero(self) -> bool:
        """Whether no adapter changes this layer: it isn't adapted, or lambda_b was never trained."""
        return not any(lambda_b.any() for lambda_b, _ in self._terms)

    def rows(self, start: int, stop: int) -> Float32:
        """Rows `start` to `stop` (stop - start, in), by the products in PEFT's order (`get_delta_weight`)."""
        total = self._product(0, start, stop)
        for term in range(1, len(self._terms)):
            np.add(total, self._product(term, start, stop), out=total)
        return total

    def _product(self, term: int, start: int, stop: int) -> Float32:
        lambda_b, scaled_a = self._terms[term]
        product: Float32 = np.matmul(lambda_b[start:stop, None] * self._b[start:stop], scaled_a)
        return product
