"""Whether a model is held whole in memory, in float32, or one layer at a time."""

from __future__ import annotations

import math
from pathlib import Path

from vera_edge.base.checkpoint import Checkpoint

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


def free_memory() -> int | None:
    """Bytes that this process can still have; None on systems that don't say."""
    return min((free for free in (_available(), _left_in_group()) if free is not None), default=None)


def note(checkpoint: Checkpoint) -> str:
    """That a model was run layer by layer, for a person to read."""
    size = float32_size(checkpoint) / 1e9
    return f"the weights of {checkpoint.path}, {size:,.1f} GB in float32, were read layer by layer"


def _available() -> int | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_group() -> int | None:
    """Within the limit of this process's own control group (version 2)."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            folder = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
            limit, held = _read(folder / "memory.max"), _read(folder / "memory.current")
            if limit.strip().isdigit() and held.strip().isdigit():
                return max(0, int(limit) - int(held))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
