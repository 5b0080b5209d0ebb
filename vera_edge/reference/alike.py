"""Whether two runs of a model gave the same."""

from __future__ import annotations

from typing import Any

import torch


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output."""
    values = output.values() if hasattr(output, "values") else output
    return [value for value in values if isinstance(value, torch.Tensor)]


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, bit for bit in tensors; what has no equality isn't."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and (one is other or (one.dtype == other.dtype and torch.equal(one, other)))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
