"""A plan tried out: exported for real, its folder weighed, its logits held against the model as trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vera_edge.device.runtime.session import Session
from vera_edge.exporting import plan_options
from vera_edge.exporting import target as targets
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.merging import Prepared
from vera_edge.plans.plan import Plan
from vera_edge.precision.changes import Replaying
from vera_edge.progress import Progress
from vera_edge.requantize import Codes
from vera_edge.rounding.weight_rounding import Rounding


@dataclass(frozen=True)
class MeasuredTrial:
    """What was found. size: bytes of all files of the export in `folder`. kl: mean KL in nats."""

    folder: Path
    size: int
    kl: float


@dataclass(frozen=True)
class Trials:
    """Exports plans to `target`, into folders of `work`, where the float graph that all share is kept."""

    ready: Prepared
    target: str
    work: Path

    def weigh(self, plan: Plan, progress: Progress) -> int:
        """Bytes of all files of an export, which don't depend on how weights are rounded."""
        return _size(self._export(plan, {}, self.work / "weighed", progress))

    def measure(
        self, plan: Plan, rounding: Rounding, number: int, replay: Replaying, progress: Progress
    ) -> MeasuredTrial:
        """Round and export as trial `number`, as `vera-edge export` does; measure on the text of `replay`.

        Raises as the rounding and the exporter do.
        """
        ready, out = self.ready, self.work / f"trial-{number}"
        grid = targets.head_grid(targets.find(self.target), self._request(plan, {}, out, progress))
        with rounding.codes(ready.model, plan, out, progress, head=grid) as rounded:
            self._export(plan, rounded.codes, out, progress)
        return MeasuredTrial(out, _size(out), replay.kl_of(Session.open(out, four_bit="kept"), progress))

    def _export(self, plan: Plan, codes: Mapping[str, Codes], out: Path, progress: Progress) -> Path:
        targets.find(self.target).export(self._request(plan, codes, out, progress))
        return out

    def _request(
        self, plan: Plan, codes: Mapping[str, Codes], out: Path, progress: Progress
    ) -> ExportRequest:
        return ExportRequest(
            self.ready.model,
            plan,
            out,
            options=plan_options.stored(plan),
            progress=progress,
            requantized=codes,
            drawn=self.work / "drawn",
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
