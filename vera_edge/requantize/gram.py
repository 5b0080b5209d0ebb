"""The Gram matrix of a layer's inputs, prepared once for all the weights that read the same input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from vera_edge.arrays import Float32
from vera_edge.cores import available_cores
from vera_edge.errors import DataError

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_SMALL = 256  # a triangle whose general inverse costs less than the calls that would save it
T = TypeVar("T")
R = TypeVar("R")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


_limits: list[Any] = []  # what holds BLAS to one thread, for each block that runs
_limits_lock = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run BLAS on one thread: how many it has changes how it sums, and so the last bits of a product.

    The limit is the process's: of blocks that run in several threads the last to end lifts it.
    """
    with _limits_lock:
        limit = _controller().limit(limits=1, user_api="blas") if not _limits else _limits[-1]
        _limits.append(limit)
    try:
        yield
    finally:
        with _limits_lock:
            _limits.pop()
            if not _limits:
                limit.restore_original_limits()


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """`work(item)` for every item, in their order, by so many threads, and no more than cores.

    Each thread's BLAS has one of its own, so that a sum is the same whatever their number.
    """
    with one_blas_thread():
        if threads <= 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(threads, available_cores())) as pool:
            return list(pool.map(work, items))


@dataclass(frozen=True, eq=False)
class Gram:
    """`values`: float32 (in, in), symmetric: X^T X / n, plus `damp` times its mean diagonal on the diagonal.

    Damping stands for what calibration didn't see, keeps the factor defined, and keeps inputs that were
    always zero from being free to take any weight.
    """

    values: Float32
    act_order: bool = False

    @classmethod
    def of(cls, values: Floats, damp: float = 0.01, act_order: bool = False) -> Gram:
        """Prepare X^T X (in, in). Raises DataError when it holds NaN or infinities, or nothing but zeros."""
        wide = np.asarray(values, np.float64)
        mean = float(np.trace(wide)) / max(1, wide.shape[0])
        if not np.isfinite(wide).all() or mean <= 0:
            raise DataError("the calibration statistics hold NaN or are all zero; use other calibration text")
        wide = (wide + wide.T) / (2 * mean)
        wide[np.diag_indices_from(wide)] += damp
        return cls(wide.astype(np.float32), act_order)

    @property
    def size(self) -> int:
        return int(self.values.shape[0])

    @cached_property
    def importance(self) -> Float32:
        """The diagonal (in,): how much an error in each input's weights costs."""
        return np.ascontiguousarray(np.diag(self.values))

    @cached_property
    def order(self) -> npt.NDArray[np.intp]:
        """The order in which columns are rounded: as they come, or the most important first."""
        if self.act_order:
            return np.argsort(-self.importance, kind="stable")
        return np.arange(self.size)

    @property
    def feedback(self) -> Float32:
        """How a column's error is made up for by the ones after it: float32 (in, in), unit upper triangle.

        Rows of the upper Cholesky factor of the inverse, over their diagonal (Frantar et al., GPTQ,
        https://arxiv.org/abs/2210.17323, equation 3), in the order of `order`.
        """
        return self._factor[0]

    @property
    def conditional(self) -> Float32:
        """What an error in an input's weights costs once all later ones make up for it: (in,), in `order`."""
        return self._factor[1]

    @cached_property
    def _factor(self) -> tuple[Float32, Float32]:
        with one_blas_thread():
            ordered = self.values[np.ix_(self.order, self.order)].astype(np.float64)
            # The factor of the reversed matrix gives that of the inverse without forming the inverse.
            lower = np.linalg.cholesky(ordered[::-1, ::-1]).astype(np.float64, copy=False)
            upper = triangular_inverse(lower)[::-1, ::-1]
        diagonal = np.diag(upper)
        feedback = np.ascontiguousarray((upper / diagonal[:, None]).astype(np.float32))
        return feedback, (diagonal**-2.0).astype(np.float32)


def triangular_inverse(lower: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The inverse of a lower triangular matrix (n, n), by halves: n^3 / 3 multiplications, mostly products.

    A general inverse takes six times as many.
    """
    size = len(lower)
    if size <= _SMALL:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half] = triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = triangular_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def output_error(weight: Float32, quantized: Float32, gram: Floats | Gram | None) -> float:
    """tr((W - Q) H (W - Q)^T); without a Gram matrix the squared error of the weight."""
    difference = weight - quantized
    if gram is None:
        return float(np.square(difference).sum(dtype=np.float64))
    values: npt.NDArray[Any] = gram.values if isinstance(gram, Gram) else gram
    with one_blas_thread():
        return float(((difference @ values) * difference).sum(dtype=np.float64))
