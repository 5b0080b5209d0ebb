"""A plan tried out: exported for real, its folder weighed, its logits held against the model as trained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vera_edge import target as targets
from vera_edge.device.session import Session
from vera_edge.drift.metrics import compare
from vera_edge.merge import Prepared
from vera_edge.plan import Plan
from vera_edge.progress import Progress
from vera_edge.requantize import Codes
from vera_edge.target import ExportRequest, stored_options
from vera_edge.tensors import Float32

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """What was found: bytes of all files of the export, and its mean KL in nats."""

    size: int
    kl: float


@dataclass(frozen=True)
class Trials:
    """Exports plans to `target` and measures them on `windows`, where the model as trained gives `reference`.

    work: a folder to export in; each export is deleted once it's measured.
    """

    ready: Prepared
    target: str
    work: Path
    windows: Sequence[Int64] = ()
    reference: Sequence[Float32] = ()

    def weigh(self, plan: Plan, progress: Progress) -> int:
        """Bytes of all files of an export, which don't depend on how weights are rounded."""
        with self._exported(plan, {}, progress) as out:
            return _size(out)

    def measure(self, plan: Plan, codes: Mapping[str, Codes], progress: Progress) -> Measured:
        """Export and measure. Raises as the exporter does."""
        with self._exported(plan, codes, progress) as out:
            return Measured(_size(out), self._kl(out, progress))

    @contextmanager
    def _exported(self, plan: Plan, codes: Mapping[str, Codes], progress: Progress) -> Iterator[Path]:
        ready = self.ready
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self.work) as folder:
            out = Path(folder) / "export"
            facts = (ready.checkpoint, ready.adapters, ready.projections, plan, out)
            request = ExportRequest(
                *facts, options=stored_options(plan), progress=progress, requantized=codes
            )
            targets.find(self.target).export(request)
            yield out

    def _kl(self, out: Path, progress: Progress) -> float:
        session, found = Session.open(out), []
        for number, (tokens, logits) in enumerate(zip(self.windows, self.reference, strict=True)):
            progress("measuring the plan", number, len(self.windows))
            # The last position has no true token to be judged by.
            found.append(compare(logits[:-1], session.logits(tokens)[:-1], tokens[1:]).kl)
        return float(np.concatenate(found).mean())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
