"""Whether a model is held whole in memory, in float32, or one layer at a time."""

from __future__ import annotations

import math

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.memory import free_memory

_SHARE = 2  # a model takes no more than this part of the memory: its text and its results take some too


def float32_size(checkpoint: Checkpoint) -> int:
    """Bytes of the whole checkpoint in float32."""
    linears = sum(math.prod(linear.shape) for linear in checkpoint.linears.values())
    others = sum(math.prod(checkpoint.tensors[name].shape) for name in checkpoint.other_names)
    return 4 * (linears + others)


def fits(checkpoint: Checkpoint, max_memory: int | None = None) -> bool:
    """Whether the model in float32 takes at most half of `max_memory`, or of the memory that is free.

    max_memory: bytes. It holds on systems that don't say how much is free.
    """
    limits = [limit for limit in (max_memory, free_memory()) if limit is not None]
    return not limits or float32_size(checkpoint) <= min(limits) // _SHARE


def note(checkpoint: Checkpoint) -> str:
    """That a model was run layer by layer, for a person to read."""
    size = float32_size(checkpoint) / 1e9
    return f"the weights of {checkpoint.path}, {size:,.1f} GB in float32, were read layer by layer"
