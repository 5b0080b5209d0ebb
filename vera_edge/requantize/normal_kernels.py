"""The compiled loops of refitting scales; lanes are rows of the weight, as in kernels.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.requantize.compiled import compiled

_TINY = np.float32(1e-30)
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def add_to_normal(products: Float32, levels: Float32, width: int, row: int, first: int, matrix: Any) -> None:
    """matrix[lane, row, first + k] = the sum of products * levels over the k-th `width` inputs of n.

    products, levels (n, lanes); matrix (lanes, blocks, blocks).
    """
    count, lanes = products.shape
    sums = np.zeros((-(-count // width), lanes), np.float32)
    for index in range(count):
        total, product, level = sums[index // width], products[index], levels[index]
        for lane in range(lanes):
            total[lane] += product[lane] * level[lane]
    for lane in range(lanes):
        for block in range(sums.shape[0]):
            matrix[lane, row, first + block] = sums[block, lane]


@compiled
def finish_normal(matrix: Any, ridge: Any, ridges: Float32) -> None:
    """Mirror what lies above the diagonals of matrix (lanes, n, n); add `ridge` times the mean diagonal.

    Writes what was added to ridges (lanes,).
    """
    size = matrix.shape[1]
    for lane in range(matrix.shape[0]):
        one = matrix[lane]
        total = np.float64(0)
        for row in range(size):
            total += np.float64(one[row, row])
            for column in range(row + 1, size):
                one[column, row] = one[row, column]
        ridges[lane] = np.float32(ridge * total / size) + _TINY
        for row in range(size):
            one[row, row] += ridges[lane]


@compiled
def solve_normal(matrix: Any, wanted: Float32, found: Float32) -> None:
    """found[lane] = the solution of matrix[lane] x = wanted[lane], (lanes, n), by Cholesky's factor.

    Reads nothing below the diagonals of matrix (lanes, n, n). Where one isn't positive definite: zeros.
    """
    lanes, size = wanted.shape
    factor = np.empty((size, size), np.float32)
    for lane in range(lanes):
        for row in range(size):
            factor[row, row:] = matrix[lane, row, row:]
        one = found[lane]
        one[:] = wanted[lane]
        if not _factor(factor):
            one[:] = _ZERO
            continue
        for row in range(size):  # U^T y = b
            known = one[row] / factor[row, row]
            one[row] = known
            rest, shares = one[row + 1 :], factor[row, row + 1 :]
            for column in range(rest.size):
                rest[column] -= shares[column] * known
        for row in range(size - 1, -1, -1):  # U x = y
            total = np.float64(one[row])
            for column in range(row + 1, size):
                total -= np.float64(factor[row, column] * one[column])
            one[row] = np.float32(total) / factor[row, row]


@compiled
def _factor(matrix: Float32) -> bool:
    """The upper triangle U (n, n) with U^T U = matrix, in its place; four rows at a time."""
    size = matrix.shape[0]
    for begin in range(0, size, 4):
        end = min(begin + 4, size)
        for row in range(begin, end):
            pivot = matrix[row, row]
            if not pivot > _ZERO:
                return False
            share = _ONE / np.sqrt(pivot)
            whole = matrix[row, row:]
            for column in range(whole.size):
                whole[column] *= share
            for below in range(row + 1, end):
                share = matrix[row, below]
                rest, first = matrix[below, below:], matrix[row, below:]
                for column in range(rest.size):
                    rest[column] -= share * first[column]
        if end - begin < 4:
            break
        for below in range(end, size):
            rest = matrix[below, below:]
            first, second = matrix[begin, below:], matrix[begin + 1, below:]
            third, fourth = matrix[begin + 2, below:], matrix[begin + 3, below:]
            a, b, c, d = first[0], second[0], third[0], fourth[0]
            for column in range(rest.size):
                rest[column] -= (a * first[column] + b * second[column]) + (
                    c * third[column] + d * fourth[column]
                )
    return True
