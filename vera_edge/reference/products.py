"""X^T Y / n over a text, summed up window by window in float32; and the mean of X."""

from __future__ import annotations

from itertools import pairwise

import torch

from vera_edge.arrays import Float32

# Tokens at once: a product of fewer takes longer to add to the sum than to compute.
_TOKENS = 2048
_BLOCKS = 4  # of a symmetric product's columns; 10 of 16 are computed


class Mean:
    """The mean over all tokens of the X (tokens, in) that are added."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, x: torch.Tensor) -> None:
        total = x.sum(0)
        self._sum = total if self._sum is None else self._sum.add_(total)
        self._count += x.shape[0]

    def value(self) -> Float32:
        """(in,)."""
        assert self._sum is not None
        found: Float32 = (self._sum / self._count).numpy()
        return found


class MeanProduct:
    """X^T Y / n for the X (tokens, in) and Y (tokens, out) that are added, always the same one or always two.

    Where Y is X, half of it is computed and mirrored. device: torch's, that multiplies.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._sum: torch.Tensor | None = None
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._symmetric = False
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._symmetric = x is y
        self._waiting.append((x, y))
        self.count += x.shape[0]
        if sum(len(one) for one, _ in self._waiting) >= _TOKENS:
            self._multiply()

    def value(self) -> Float32:
        """X^T Y / n (in, out); nothing can be added any more."""
        self._multiply()
        assert self._sum is not None
        if self._symmetric:
            for rows in _blocks(len(self._sum)):
                self._sum[rows.stop :, rows] = self._sum[rows, rows.stop :].T
        found: Float32 = self._sum.div_(self.count).cpu().numpy()
        return found

    def _multiply(self) -> None:
        if not self._waiting:
            return
        x = torch.cat([one for one, _ in self._waiting]).to(self._device)
        y = x if self._symmetric else torch.cat([other for _, other in self._waiting]).to(self._device)
        self._waiting = []
        if self._sum is None:
            self._sum = x.new_zeros(x.shape[1], y.shape[1])
        if not self._symmetric:
            self._sum.addmm_(x.T, y)
            return
        for rows in _blocks(x.shape[1]):
            self._sum[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])


def _blocks(size: int) -> list[slice]:
    """The blocks that the rows of a square are computed in, each from its own columns on."""
    edges = [size * number // _BLOCKS for number in range(_BLOCKS + 1)]
    return [slice(*pair) for pair in pairwise(edges)]
