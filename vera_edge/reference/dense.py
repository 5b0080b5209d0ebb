"""A checkpoint's tensors as the unquantized model would store them, one at a time."""

from __future__ import annotations

import numpy as np
import torch

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.storage.tensors import FLOATS


def dense_names(checkpoint: Checkpoint) -> list[str]:
    """The tensors of the unquantized model."""
    return [*(f"{module}.weight" for module in checkpoint.linears), *checkpoint.other_names]


def dense_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor as the unquantized model would store it, floats in float32."""
    module = name.removesuffix(".weight")
    if module in checkpoint.linears and name == f"{module}.weight":
        weight = checkpoint.dequantize(module)
        conv1d = checkpoint.is_conv1d(module)
        return torch.from_numpy(np.ascontiguousarray(weight.T) if conv1d else weight)
    if checkpoint.tensors[name].dtype in FLOATS:
        return torch.from_numpy(checkpoint.tensors.float32(name))
    return torch.from_numpy(checkpoint.tensors.read(name).array())


def matrices_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of the float matrices of a checkpoint, as the unquantized model stores them."""
    found: dict[str, tuple[int, ...]] = {}
    for module, linear in checkpoint.linears.items():
        found[f"{module}.weight"] = linear.shape[::-1] if checkpoint.is_conv1d(module) else linear.shape
    for name in checkpoint.other_names:
        info = checkpoint.tensors[name]
        if len(info.shape) >= 2 and 0 not in info.shape and info.dtype in FLOATS:
            found[name] = tuple(info.shape)
    return found
