"""An adapter that was written: what a combination or a conversion gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WrittenAdapter:
    """An adapter that was written: its folder, PEFT's name of its method, layers, rank, bytes of weights.

    error: how far it is from what was asked for, of all layers: the Frobenius norm of what is missing, by
        that of the delta; None where nothing had to be left out. layer_errors: the same of each layer.
    from_sum: how far a combination is from the weighted sum of the deltas, alike; None of a single adapter.
    notes: sentences for a person to read.
    """

    folder: Path
    method: str
    layers: int
    rank: int
    size: int
    error: float | None = None
    layer_errors: Mapping[str, float] = field(default_factory=dict)
    from_sum: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**vars(self), "folder": str(self.folder), "layer_errors": dict(self.layer_errors)}
