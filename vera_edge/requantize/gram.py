"""The Gram matrix of a layer's inputs, prepared once for all the weights that read the same input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from vera_edge.arrays import Float32
from vera_edge.cores import available_cores
from vera_edge.errors import DataError

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_BLOCK = 256  # rows or columns of a matrix that are worked on at a time
_ROWS = 512  # of a weight that equations are solved for at a time
T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F", np.float32, np.float64)


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
    """`values`: float32 (in, in), symmetric: X^T X / n over its mean diagonal `mean`, `damp` on its diagonal.

    Damping stands for what calibration didn't see, keeps the factor defined, and keeps inputs that were
    always zero from being free to take any weight. device: what torch calls the one that computes with it;
    None: numpy and compiled loops do.
    """

    values: Float32
    act_order: bool = False
    mean: float = 1.0
    device: ClassVar[str | None] = None

    @classmethod
    def of(cls, values: Floats, damp: float = 0.01, act_order: bool = False, in_place: bool = False) -> Gram:
        """Prepare X^T X (in, in). Raises DataError when it holds NaN or infinities, or nothing but zeros.

        in_place: in the memory of `values`, float32, which are used up.
        """
        size = values.shape[0]
        diagonal = np.diag(values).astype(np.float64)
        mean = float(diagonal.sum()) / max(1, size)
        prepared = values if in_place else np.empty((size, size), np.float32)
        finite = bool(np.isfinite(mean)) and mean > 0
        for begin in range(0, size if finite else 0, _BLOCK):  # by tiles, for float64 takes twice the memory
            for other in range(begin, size, _BLOCK):
                rows, columns = slice(begin, begin + _BLOCK), slice(other, other + _BLOCK)
                both = values[rows, columns].astype(np.float64) + values[columns, rows].T
                finite = finite and bool(np.isfinite(both).all())
                prepared[rows, columns] = both / (2 * mean)
                prepared[columns, rows] = prepared[rows, columns].T
        if not finite:
            raise DataError("the calibration statistics hold NaN or are all zero; use other calibration text")
        prepared[np.diag_indices(size)] = (diagonal / mean + damp).astype(np.float32)
        return cls(prepared.astype(np.float32, copy=False), act_order, mean)

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
        """How much of a column's error each later one makes up for: float32 (in, in), unit upper triangle.

        With `H = R R^T`, R upper triangular, the output error of residuals e is `|e R|^2`: column i is best
        rounded to `w_i + sum_(j<i) e_j R_ji / R_ii`. That is what GPTQ's recursion over the inverse comes to
        (Frantar et al., https://arxiv.org/abs/2210.17323, equation 3; Chee et al., QuIP,
        https://arxiv.org/abs/2307.13304, theorem 6), without an inverse. In the order of `order`.
        """
        return self._factor[0]

    @property
    def conditional(self) -> Float32:
        """What an error in an input's weights costs once all later ones make up for it: (in,), in `order`."""
        return self._factor[1]

    @cached_property
    def _factor(self) -> tuple[Float32, Float32]:
        ordered = self.values[np.ix_(self.order, self.order)] if self.act_order else self.values
        try:
            factor = upper_factor(ordered.copy())
        except np.linalg.LinAlgError:  # too near to singular for float32
            factor = upper_factor(ordered.astype(np.float64)).astype(np.float32)
        diagonal = np.diag(factor).copy()
        factor /= diagonal
        return factor, np.square(diagonal)

    def prepare(self) -> None:
        """Compute what several threads will ask for."""
        _ = self.feedback

    def shift(
        self, weight: Float32, moved: Float32 | None, stream: Float32 | None, threads: int = 1
    ) -> Float32:
        """(weight moved + stream) times the inverse of the damped X^T X / n, (out, in); either may be None.

        threads: that rows are shared out among, which changes no bit.
        """
        self.prepare()

        def shifted(begin: int) -> Float32:
            rows = slice(begin, begin + _ROWS)
            pull = np.zeros_like(weight[rows]) if moved is None else weight[rows] @ moved
            if stream is not None:
                pull += stream[rows]
            return self.solve(pull)

        return np.concatenate(in_threads(shifted, range(0, len(weight), _ROWS), threads))

    def solve(self, rows: Float32) -> Float32:
        """rows (k, in) times the inverse of the damped X^T X / n: float32, by the factor that rounding has.

        2 k in^2 operations, all of them products.
        """
        with one_blas_thread():
            found, factor, size = np.ascontiguousarray(rows[:, self.order]), self.feedback, self.size
            starts = range(0, size, _BLOCK)
            for begin in reversed(starts):
                at, after = slice(begin, begin + _BLOCK), slice(begin + _BLOCK, size)
                left = found[:, at] - found[:, after] @ factor[at, after].T
                found[:, at] = left @ self._corners[begin].T
            found /= self.conditional
            for begin in starts:
                at, before = slice(begin, begin + _BLOCK), slice(0, begin)
                found[:, at] = (found[:, at] - found[:, before] @ factor[before, at]) @ self._corners[begin]
        if self.act_order:
            ordered, found = found, np.empty_like(found)
            found[:, self.order] = ordered
        found /= np.float32(self.mean)
        return found

    @cached_property
    def _corners(self) -> dict[int, Float32]:
        """The inverses of the blocks on the factor's diagonal, by where each begins."""
        factor = self.feedback
        corners: dict[int, Float32] = {}
        for begin in range(0, self.size, _BLOCK):
            at = slice(begin, begin + _BLOCK)
            corners[begin] = np.linalg.inv(factor[at, at].astype(np.float64)).astype(np.float32)
        return corners


def upper_factor(matrix: npt.NDArray[F]) -> npt.NDArray[F]:
    """The upper triangular R (n, n) with `R R^T = matrix`, in the memory of `matrix`: n^3 / 3 operations.

    Almost all of them are products in the matrix's own type; blocks on the diagonal are factored in float64.
    Raises LinAlgError where the matrix isn't positive definite.
    """
    size = len(matrix)
    with one_blas_thread():
        for begin in reversed(range(0, size, _BLOCK)):
            end = min(begin + _BLOCK, size)
            above = matrix[:end, begin:end]
            if end < size:
                above -= matrix[:end, end:] @ matrix[begin:end, end:].T
            # Cholesky's lower factor of the reversed block, reversed, is its upper one.
            reverse = above[begin:].astype(np.float64)[::-1, ::-1]
            corner = np.linalg.cholesky(reverse)[::-1, ::-1]
            above[:begin] = above[:begin] @ np.linalg.inv(corner).T.astype(matrix.dtype)
            above[begin:] = corner
            matrix[end:, begin:end] = 0
    return matrix


def output_error(weight: Float32, quantized: Float32, gram: Floats | Gram | None) -> float:
    """tr((W - Q) H (W - Q)^T); without a Gram matrix the squared error of the weight."""
    difference = weight - quantized
    if gram is None:
        return float(np.square(difference).sum(dtype=np.float64))
    values: npt.NDArray[Any] = gram.values if isinstance(gram, Gram) else gram
    with one_blas_thread():
        return float(((difference @ values) * difference).sum(dtype=np.float64))
