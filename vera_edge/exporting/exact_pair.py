"""A matrix of low rank as the pair of thin ones that it is the product of."""

from __future__ import annotations

import numpy as np

from vera_edge.adapters.lora import LoraPair
from vera_edge.arrays import Float32
from vera_edge.requantize.gram import one_blas_thread

_SHARE = 4  # a pair of more than a quarter of the shorter side's rank saves too little
_MOST = 256
_MORE = 8  # columns that are drawn beyond that, so that a larger rank shows
# Of the largest singular value: what float32 makes of a sum. What is left out has to be as little.
_NOTHING, _LEFT = 1e-6, 1e-5


def pair_of(matrix: Float32) -> LoraPair | None:
    """The pair of the least rank that is `matrix` (out, in) to float32's precision; None where that is large.

    By the range that products with drawn columns span, and the SVD within it (Halko, Martinsson and Tropp,
    SIAM Review 2011, algorithm 5.1); the same bytes at every call.
    """
    most = min(_MOST, max(1, min(matrix.shape) // _SHARE))
    wide = matrix.astype(np.float64)
    drawn = np.random.default_rng(0).standard_normal((matrix.shape[1], min(most + _MORE, min(matrix.shape))))
    with one_blas_thread():
        spanned, _ = np.linalg.qr(wide @ drawn)
        within = spanned.T @ wide
        u, values, v = np.linalg.svd(within, full_matrices=False)
        rank = max(1, int((values > _NOTHING * values[0]).sum()))
        left = np.linalg.norm(wide - spanned @ within)
        if rank > most or left > _LEFT * np.linalg.norm(wide):
            return None
        b = (spanned @ u[:, :rank]) * values[:rank]
    return LoraPair(v[:rank].astype(np.float32), b.astype(np.float32), 1.0)
