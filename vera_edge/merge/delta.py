"""The sum of what the adapters add to one weight, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vera_edge.adapter import Adapter
from vera_edge.formats import row_chunks
from vera_edge.projection import Projections
from vera_edge.tensors import Float32

_MATMUL_ROWS = 512  # fewer make the product slow


class Delta:
    """`sum_i weight_i * diag(lambda_b_i) B diag(lambda_d_i) A` for one linear (out, in).

    Raises MismatchError when an adapter's vectors don't fit the projections.
    """

    def __init__(
        self,
        module: str,
        in_features: int,
        adapters: Sequence[tuple[Adapter, float]],
        projections: Projections,
    ) -> None:
        self._projections = projections
        self._terms: list[tuple[Float32, Float32]] = []
        for adapter, weight in adapters:
            if module in adapter.vectors:
                vectors = adapter.vectors[module]
                projections.check(vectors.lambda_b, vectors.lambda_d, in_features)
                self._terms.append((np.float32(weight) * vectors.lambda_b, vectors.lambda_d))

    @property
    def is_zero(self) -> bool:
        """Whether no adapter changes this layer: it isn't adapted, or lambda_b was never trained."""
        return not any(lambda_b.any() for lambda_b, _ in self._terms)

    def into(self, out: Float32) -> None:
        """Write the delta (out, in) over `out`, by the products in PEFT's order (`get_delta_weight`).

        The first product needs no memory of its own, further ones a piece of some MiB.
        """
        rows, columns = out.shape
        for number, (lambda_b, lambda_d) in enumerate(self._terms):
            scaled_a = lambda_d[:, None] * self._projections.a[:, :columns]
            if number == 0:
                np.matmul(self._scaled_b(lambda_b, 0, rows), scaled_a, out=out)
                continue
            for start, stop in row_chunks((rows, columns), multiple=_MATMUL_ROWS):
                out[start:stop] += np.matmul(self._scaled_b(lambda_b, start, stop), scaled_a)

    def _scaled_b(self, lambda_b: Float32, start: int, stop: int) -> Float32:
        return lambda_b[start:stop, None] * self._projections.b[start:stop]
