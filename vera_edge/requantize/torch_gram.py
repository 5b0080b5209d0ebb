"""A Gram matrix on an accelerator, or on torch's own processor device, which tests hold numpy's way against.

The matrix is prepared where it came from and copied; its factor is computed in float64 where the device has
that, else by the processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vera_edge.arrays import Float32
from vera_edge.requantize.gram import Gram


@dataclass(frozen=True, eq=False)
class Matrices:
    """What `Gram` has under the same names, as tensors on a device; columns as they come."""

    values: torch.Tensor
    feedback: torch.Tensor
    conditional: torch.Tensor
    order: npt.NDArray[np.intp]
    act_order: bool = False


@dataclass(frozen=True, eq=False)
class TorchGram(Gram):
    """A Gram matrix that torch's device `place` computes with."""

    place: str = "cpu"

    @classmethod
    def placed(cls, gram: Gram, place: str) -> TorchGram:
        """The same matrix on a device."""
        return cls(gram.values, gram.act_order, gram.mean, place)

    @property
    def device(self) -> str | None:  # type: ignore[override]
        # A device's loops take columns as they come.
        return None if self.act_order else self.place

    @property
    def wide(self) -> torch.dtype:
        """The widest floats that the device has."""
        return torch.float32 if self.place.startswith("mps") else torch.float64

    @cached_property
    def matrices(self) -> Matrices:
        values = torch.from_numpy(self.values).to(self.place)
        return Matrices(values, *self._factored(values), self.order)

    def _factored(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`Gram.feedback` and `Gram.conditional`."""
        if self.wide is torch.float64:
            # Cholesky's lower factor of the reversed matrix, reversed, is the upper one.
            lower, failed = torch.linalg.cholesky_ex(values.to(torch.float64).flip(0, 1))
            if not failed.any():
                factor = lower.flip(0, 1)
                diagonal = factor.diagonal().clone()
                return (factor / diagonal).float(), diagonal.square().float()
        feedback, conditional = (torch.from_numpy(part) for part in (self.feedback, self.conditional))
        return feedback.to(self.place), conditional.to(self.place)

    def prepare(self) -> None:
        _ = super().prepare() if self.device is None else self.matrices

    def shift(
        self, weight: Float32, moved: Float32 | None, stream: Float32 | None, threads: int = 1
    ) -> Float32:
        if self.device is None:
            return super().shift(weight, moved, stream, threads)
        place, factor = self.place, self.matrices.feedback
        if moved is None:
            pull = torch.zeros(weight.shape, device=place)
        else:
            pull = torch.from_numpy(weight).to(place) @ torch.from_numpy(moved).to(place)
        if stream is not None:
            pull += torch.from_numpy(stream).to(place)
        # x R R^T = pull, with R = U sqrt(c), U `feedback` and c `conditional`
        pull = torch.linalg.solve_triangular(factor.T, pull, upper=False, left=False, unitriangular=True)
        pull /= self.matrices.conditional
        pull = torch.linalg.solve_triangular(factor, pull, upper=True, left=False, unitriangular=True)
        found: Float32 = (pull / self.mean).cpu().numpy()
        return found
