"""What a rounded layer can be given beside its weight: a low-rank term and a bias, both in closed form.

With what rounding left undone, `E = target - Q`, and `H = X^T X / n` of the inputs, the best term of rank k
for the outputs is `P P^T E`, P the k first eigenvectors of `E H E^T`, the covariance of the output's error.
That is the truncated SVD of `E H^(1/2)`, as QERA has it (https://arxiv.org/abs/2410.06040), without a root of
H. The bias is the mean of what is then still missing from the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.requantize.gram import Gram, one_blas_thread


@dataclass(frozen=True, eq=False)
class Correction:
    """What a layer's output gets: `up (down x) + bias`.

    up: (out, k) and down: (k, in), float32, or both None. bias: (out,) float32, or None.
    """

    up: Float32 | None = None
    down: Float32 | None = None
    bias: Float32 | None = None

    @property
    def weight(self) -> Float32 | None:
        """The low-rank term as a matrix (out, in)."""
        return None if self.up is None or self.down is None else self.up @ self.down


def low_rank(error: Float32, gram: Gram, rank: int) -> tuple[Float32, Float32]:
    """The best `up` (out, rank) and `down` (rank, in) for the outputs of an error (out, in).

    Rank is at most the smaller side. Rounded to float16, as they are stored.
    """
    rank = min(rank, *error.shape)
    with one_blas_thread():
        covariance = (error @ gram.values) @ error.T
        up = np.linalg.eigh(((covariance + covariance.T) / 2).astype(np.float64))[1][:, -rank:]
        up = np.ascontiguousarray(up[:, ::-1], np.float16).astype(np.float32)
        down = (up.T @ error).astype(np.float16).astype(np.float32)
    return up, down
