"""What an export takes, told before the work: what it writes, the memory and the disk, and about how long."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vera_edge.errors import OutputError, PlanError
from vera_edge.memory import free_memory


@dataclass(frozen=True)
class ExportCost:
    """Estimates. size: bytes of the folder. memory: bytes of the process at its peak. disk: bytes at its
    peak, `size` among them. seconds: on this machine, by the time that one layer took; 0 where none was.
    """

    size: int
    memory: int
    disk: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def check_room(cost: ExportCost, out: Path, held: int = 0) -> None:
    """Raise OutputError when the disk of `out` doesn't suffice for an export, PlanError when memory doesn't.

    held: bytes on that disk that an earlier run of it has written already.
    """
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if cost.disk > free + held:
        raise OutputError(
            f"the export takes about {cost.disk / 1e6:,.0f} MB of the disk of {folder}, which has "
            f"{(free + held) / 1e6:,.0f} MB for it; free some, write elsewhere, or choose "
            "smaller --weights or --head"
        )
    memory = free_memory()
    if memory is not None and cost.memory > memory:
        raise PlanError(
            f"the export takes about {cost.memory / 1e6:,.0f} MB of memory, and {memory / 1e6:,.0f} MB are "
            "free; end other programs, or raise the limit that this process has"
        )
