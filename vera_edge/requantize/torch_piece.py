"""Some rows of a weight on their way to the grid, on a device: `Piece` with tensors for arrays."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from vera_edge.arrays import Float32, Float64
from vera_edge.requantize import torch_kernels
from vera_edge.requantize.grids import Grid
from vera_edge.requantize.piece import Piece, State
from vera_edge.requantize.refit import RIDGE, Place, one_after_the_other
from vera_edge.requantize.search import FACTORS, TURNS, kind_of
from vera_edge.requantize.torch_gram import TorchGram

_TINY = 1e-30


class TorchPiece(Piece):
    """As `Piece`; what goes in and comes out is numpy's. errors: float64 where the device has that."""

    def __init__(self, weight: Float32, grid: Grid, scales: Float32, zeros: Float32, gram: TorchGram) -> None:
        super().__init__(weight, grid, scales, zeros, gram)
        self._wide, self._place = gram.wide, gram.place
        own: Any = self
        own.gram = gram.matrices
        own.weight, own.scales, own.zeros = (self._sent(part) for part in (own.weight, own.scales, own.zeros))
        own.levels, own.residual = torch.empty_like(own.weight), torch.empty_like(own.weight)
        own.errors = torch.zeros(weight.shape[0], dtype=self._wide, device=self._place)
        table, bounds, top = self.kernel_grid
        own.kernel_grid = (self._sent(table), self._sent(bounds), float(top))

    def _sent(self, values: Any) -> Any:
        """A numpy array on the device; its own memory, so that nothing writes to what it was."""
        return torch.tensor(np.ascontiguousarray(values), device=self._place)

    @property
    def kernels(self) -> Any:
        return torch_kernels

    @staticmethod
    def copied(values: Any) -> Any:
        return values.clone()

    @staticmethod
    def contiguous(values: Any) -> Any:
        return values.contiguous()

    def search_block(self, block: int, weight: Any, costs: Any) -> None:
        own: Any = self
        table, bounds, top = own.kernel_grid
        facts = (float(self.grid.middle), top, float(self.grid.least_zero), kind_of(self.grid), table, bounds)
        found = torch.empty_like(weight[0]), torch.empty_like(weight[0])
        torch_kernels.search_block(weight, costs, self._sent(FACTORS), TURNS, *facts, *found)
        own.scales[block], own.zeros[block] = self._stored(found[0]), found[1]

    def _stored(self, scales: Any) -> Any:
        """The scales nearest to these that the format can store."""
        if not (self.grid.half or self.grid.bfloat16):
            return scales
        return self._sent(self.grid.stored(scales.cpu().numpy()))

    def set_levels(self, levels: Float32, errors: Float64) -> None:
        own: Any = self
        own.levels, own.errors = self._sent(levels.T), self._sent(errors).to(self._wide)
        self._subtract()

    @cached_property
    def wanted(self) -> Any:
        values: Any = self.gram.values
        return values @ self.weight

    def state(self) -> State:
        own: Any = self
        errors = own.errors.cpu().numpy().astype(np.float64)
        levels, scales, zeros = (part.cpu().numpy() for part in (own.levels, own.scales, own.zeros))
        return State(levels, scales, zeros, errors)

    def take(self, other: Piece, rows: Any) -> None:
        super().take(other, self._sent(rows))

    def best_scales(self) -> Float32:
        found: Float32 = _TorchNormal(self).solve().cpu().numpy()
        return found

    def refit(self, place: Place | None = None) -> None:
        own: Any = self
        normal = _TorchNormal(self)
        best = normal.solve()
        scales = self._stored(best) if place is None else self._sent(normal.placed(best, place))
        own.errors = own.errors + normal.rise(scales)
        own.scales = scales.T.contiguous()
        self._subtract()

    def _subtract(self) -> None:
        own: Any = self
        torch_kernels.subtract(own.weight, own.levels, own.scales, self.blocks, own.residual)


class _TorchNormal:
    """As `refit.Normal`, of a piece: (rows, blocks, blocks) and (rows, blocks)."""

    def __init__(self, piece: Any) -> None:
        self._wide, self._solves = piece._wide, piece._wide is torch.float64
        inside, rows = piece.levels.shape
        blocks, width = len(piece.scales), piece.width
        pad = blocks * width - inside
        levels = torch.nn.functional.pad(piece.levels, (0, 0, 0, pad))
        matrix = torch.empty((blocks, blocks, rows), device=levels.device)
        for row in range(blocks):
            at = slice(row * width, min((row + 1) * width, inside))
            products = piece.gram.values[:, at] @ piece.levels[at]
            products = torch.nn.functional.pad(products, (0, 0, 0, pad)) * levels
            matrix[row] = products.view(blocks, width, rows).sum(1)
        self.matrix = matrix.permute(2, 0, 1).contiguous()
        del matrix
        self.ridge = RIDGE * self.matrix.diagonal(dim1=1, dim2=2).mean(1) + _TINY
        self.matrix.diagonal(dim1=1, dim2=2).add_(self.ridge[:, None])
        self.scales = piece.scales.T.contiguous()
        wanted = torch.nn.functional.pad(piece.wanted * piece.levels, (0, 0, 0, pad))
        target = wanted.view(blocks, width, rows).sum(1).T
        self.slope = target - self._times(self.scales)

    def _times(self, scales: Any) -> Any:
        return (self.matrix @ scales[..., None])[..., 0] - self.ridge[:, None] * scales

    def solve(self) -> Any:
        """The best scales (rows, blocks); those that are there where a row's equations can't be solved."""
        place = self.matrix.device
        matrix, slope = (self.matrix, self.slope) if self._solves else (self.matrix.cpu(), self.slope.cpu())
        factor, failed = torch.linalg.cholesky_ex(matrix)
        change = torch.cholesky_solve(slope[..., None], factor)[..., 0]
        change = torch.where((failed == 0)[:, None], change, torch.zeros_like(change))
        return self.scales + change.to(place)

    def rise(self, scales: Any) -> Any:
        """By how much these scales (rows, blocks) raise each row's error (rows,)."""
        change = scales - self.scales
        return (change * (self._times(change) - 2 * self.slope)).to(self._wide).sum(1)

    def placed(self, best: Any, place: Place) -> Float32:
        """Put `best` onto a grid, block by block, the rest making up for it: `refit.Normal.place`."""
        matrix = self.matrix if self._solves else self.matrix.cpu()
        upper = torch.linalg.cholesky(matrix.double().flip(1, 2)).flip(1, 2).cpu().numpy()
        return one_after_the_other(best.cpu().numpy(), upper, place)
