"""The files a bundle doesn't bring because others determine them: projections by seed, weights expanded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy.typing as npt

from vera_edge.bundle.manifest import Manifest
from vera_edge.device.runtime import projections
from vera_edge.progress import Progress, silent


def in_memory(manifest: Manifest, only: Collection[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """By initializer of the graph, what the generated files that aren't there would hold; often nothing.

    only: of these initializers. Raises a VeraEdgeError when the manifest doesn't say soundly how to make
    them.
    """
    drawn = projections.in_memory(manifest)
    found = {name: array for name, array in drawn.items() if only is None or name in only}
    if manifest.expanded:
        from vera_edge.device.runtime import expansion

        found |= expansion.in_memory(manifest, only)
    return found


def write(manifest: Manifest, folder: Path, progress: Progress = silent) -> None:
    """Make every generated file in `folder`, which may hold the bundle's own, each whole or not at all.

    Whether it is what the manifest lists is for `bundle.verify` to say. Raises a VeraEdgeError when the
    manifest doesn't say soundly how to make one, or the disk refuses.
    """
    projections.write(manifest, folder, progress)
    if manifest.expanded:
        from vera_edge.device.runtime import expansion

        expansion.write(manifest, folder, progress)
