"""What a merge did: layer by layer and in total, with the warning when rounding drowned the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vera_edge.adapters.adapter import VERA
from vera_edge.merging.measure import Survival, total


@dataclass(frozen=True)
class LayerReport:
    """One layer that an adapter changed."""

    module: str
    source: str
    result: str
    survival: Survival

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"source": self.source, "result": self.result, **self.survival.to_dict()}


@dataclass(frozen=True)
class MergeReport:
    """A folder that was merged.

    weights: the format asked for, or "same". results: number of linears by the format they have now.
    size: bytes of all files. notes: sentences for a person to read. warning: one sentence that names a better
    format when the adapter is drowned, else None.
    """

    folder: Path
    weights: str
    layers: tuple[LayerReport, ...]
    results: Mapping[str, int]
    size: int
    base_digest: str
    adapters: tuple[tuple[str, str, float], ...]  # name, digest, weight
    projection: Mapping[str, Any] | None  # None for a method without projections
    notes: tuple[str, ...] = ()
    warning: str | None = None
    unchanged: tuple[str, ...] = field(default=())  # adapted by vectors of zeros
    method: str = VERA  # of the adapters

    @property
    def survival(self) -> Survival:
        """All changed layers taken as one."""
        return total(layer.survival for layer in self.layers)

    @property
    def drowned(self) -> tuple[LayerReport, ...]:
        """The layers in which rounding hides the adapter, the noisiest first."""
        found = [layer for layer in self.layers if layer.survival.drowned]
        return tuple(sorted(found, key=lambda layer: (-(layer.survival.noise or 0), layer.module)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return {
            "folder": str(self.folder),
            **self.facts(),
            "size": self.size,
            "layers": {layer.module: layer.to_dict() for layer in self.layers},
        }

    def facts(self) -> dict[str, Any]:
        """What doesn't depend on where the output lies."""
        return {
            "weights": self.weights,
            "formats": dict(self.results),
            "base": {"digest": self.base_digest},
            "adapters": [
                {"name": name, "digest": digest, "weight": weight} for name, digest, weight in self.adapters
            ],
            "projection": None if self.projection is None else dict(self.projection),
            "total": self.survival.to_dict(),
            "merged_layers": len(self.layers),
            "drowned_layers": len(self.drowned),
            "unchanged_layers": list(self.unchanged),
            "notes": list(self.notes),
            "warning": self.warning,
        }
