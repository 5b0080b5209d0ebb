"""Products of two thin matrices, and the nearest one of a given rank (Eckart and Young, 1936)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError
from vera_edge.requantize.gram import one_blas_thread


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale * left @ right`: left (out, r), right (r, in), float32."""

    left: Float32
    right: Float32
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return len(self.right)

    def dense(self) -> Float32:
        """The matrix (out, in), float32."""
        with one_blas_thread():
            found: Float32 = self.left @ self.right
        found *= np.float32(self.scale)
        return found

    def padded(self, rank: int) -> LowRank:
        """The same with zeros up to an inner dimension `rank`, its scale in `right`."""
        more = rank - self.rank
        left = np.pad(self.left, ((0, 0), (0, more)))
        return LowRank(left, np.pad(np.float32(self.scale) * self.right, ((0, more), (0, 0))))


def joined(products: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum, of the ranks of all together; scales and weights are in `right`, as in PEFT's cat."""
    right = [
        np.float32(weight * one.scale) * one.right for one, weight in zip(products, weights, strict=True)
    ]
    return LowRank(np.hstack([one.left for one in products]), np.vstack(right))


@dataclass(frozen=True, eq=False)
class Nearest:
    """A product of the rank that was asked for, as near as one can be.

    error: the Frobenius norm of what it lacks. norm: that of the matrix.
    """

    product: LowRank
    error: float
    norm: float


def nearest_to_product(whole: LowRank, rank: int) -> Nearest:
    """The nearest product of rank `rank`, by the QR decompositions of both factors, and the SVD between."""
    check_finite(whole.left, whole.right)
    with one_blas_thread():
        left, upper = np.linalg.qr(np.float64(whole.scale) * whole.left.astype(np.float64))
        right, lower = np.linalg.qr(whole.right.T.astype(np.float64))
        u, values, v = np.linalg.svd(upper @ lower.T)
        kept = min(rank, len(values))
        product = LowRank(
            (left @ (u[:, :kept] * values[:kept])).astype(np.float32),
            (v[:kept] @ right.T).astype(np.float32),
        )
    return Nearest(product, float(np.linalg.norm(values[kept:])), float(np.linalg.norm(values)))


def nearest_to(matrix: Float32, rank: int) -> Nearest:
    """The nearest product of rank `rank` to a matrix (out, in).

    By the eigenvectors of its smaller Gram matrix in float64, which loses only what is 1e-8 of the largest
    singular value; the error is that of the product itself.
    """
    check_finite(matrix)
    with one_blas_thread():
        tall = matrix.shape[0] > matrix.shape[1]
        wide = (matrix.T if tall else matrix).astype(np.float64)
        _, vectors = np.linalg.eigh(wide @ wide.T)
        top = vectors[:, ::-1][:, :rank]
        other = top.T @ wide
        values = np.linalg.norm(other, axis=1)
        unit = np.divide(other, values[:, None], out=np.zeros_like(other), where=values[:, None] > 0)
        left, right = (unit.T * values, top.T) if tall else (top * values, unit)
        product = LowRank(left.astype(np.float32), right.astype(np.float32))
        error = float(np.linalg.norm(matrix - product.left @ product.right))
    return Nearest(product, error, float(np.linalg.norm(matrix)))


def check_finite(*arrays: Float32) -> None:
    """Raise AdapterError for infinite values, which no decomposition takes."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise AdapterError(
            "what the adapters add is beyond float32; their vectors or weights are too large for anything "
            "sound"
        )
