"""What ONNX Runtime rounds while it runs: the activations of `MatMulNBits` at accuracy level 4.

The kernel gives every block of a layer's inputs, as long as the weight's blocks, a scale of its own:
`s = max |x| / 127`, `q = round(x / s)` to nearest, ties to even, and multiplies the integers. Here the same
values go into a product in floats, which differs from that by the order of sums alone.
Source: onnxruntime's mlas, `QuantizeARow_CompInt8`; read, and held against the runtime by a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.formats import Int8Weight
from vera_edge.formats.affine import HoldsIntegers
from vera_edge.formats.blocks import BITS, block_filling

INT8 = "int8"
_LEVELS = 127
_ROWS = 32  # block of a row-wise int8 weight (plans' own for graphs)


def round_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (..., in) rounded to int8 by blocks of inputs, in x's dtype; the last block may be short."""
    inside = x.shape[-1]
    padded = functional.pad(x.float(), (0, -inside % block))
    parts = padded.reshape(*x.shape[:-1], -1, block)
    largest = parts.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, _LEVELS / largest, torch.zeros_like(largest))
    rounded = torch.round(parts * inverse) * (largest / _LEVELS)
    return rounded.flatten(-2)[..., :inside].to(x.dtype)


@dataclass(frozen=True)
class RoundInputs:
    """A forward pre-hook of a linear layer: it reads what the runtime's kernel would, and the gradient
    passes as if it didn't (straight-through).
    """

    block: int

    def __call__(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return (x + (round_activations(x.detach(), self.block) - x.detach()), *rest)


def runtime_block(checkpoint: Checkpoint, module: str) -> int | None:
    """The block of inputs that the runtime rounds for a layer exported as it is stored; None: none at all.

    Raises PlanError where the runtime puts the inputs in another order first (act-order, short groups).
    """
    weight = checkpoint.load(module)
    if isinstance(weight, Int8Weight):
        return None if weight.shape[1] % _ROWS else _ROWS
    if not isinstance(weight, HoldsIntegers):
        return None
    found = weight.integers()
    if found.index is not None:
        raise PlanError(
            f"the inputs of {module} lie in another order than their groups (act-order), and what the "
            "runtime rounds then isn't known here; load it without activations"
        )
    if found.bits not in BITS:
        return None
    groups = found.grid.scales.shape[1]
    return block_filling(np.full(groups, weight.shape[1] // groups))
