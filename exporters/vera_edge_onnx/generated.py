"""Leaves files out of an export that the device makes itself: projections by seed, 4-bit weights expanded.

The graph is the same as with everything in its files but for the files' names. What the device writes is
written here once, compared with what the graph was saved with, listed as generated, and removed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest, ManifestFields
from vera_edge.device.runtime import generated, int8_products
from vera_edge.errors import TargetError
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.progress import Progress
from vera_edge.storage.files import sha256_file
from vera_edge_onnx.branch import seed
from vera_edge_onnx.graph import storage
from vera_edge_onnx.graph.spool import Spool
from vera_edge_onnx.graph.weaver import Range
from vera_edge_onnx.weights.expanded import SHIPPED, Shipped


@dataclass(frozen=True)
class Apart:
    """Initializers that lie in a file of their own, which isn't shipped.

    layout: how the manifest says to make that file, from the model as it was saved and the file's name.
    """

    initializers: Collection[str]
    layout: Callable[[ir.Model, str], Mapping[str, Any]]


def save(
    request: ExportRequest,
    stage: Path,
    model: ir.Model,
    file: str,
    shared: Mapping[str, Range],
    shipped: Shipped,
    spool: Spool | None = None,
) -> tuple[Apart, ...]:
    """Write `model` to `file` in `stage`, what the device makes apart from the rest, and what it is made of.

    shared, spool: see `storage.save`. Returns what lies apart, in the order of its files. Raises OutputError
    when the disk refuses.
    """
    found = []
    if seed.wanted(request):
        found.append(Apart(seed.tensors(model), seed.layout))
    if shipped.sites:
        found.append(Apart(shipped.initializers, lambda saved, _: shipped.entry(saved, SHIPPED)))
    initializers = [group.initializers for group in found]
    storage.save(model, stage / file, shared, request.progress, initializers, spool)
    if shipped.sites:
        shipped.write(stage / SHIPPED)
    return tuple(found)


def write(
    stage: Path,
    model: ir.Model,
    file: str,
    groups: Sequence[Apart],
    facts: ManifestFields,
    progress: Progress,
) -> Manifest:
    """Write the manifest of `stage`, whose graph `file` was saved with `groups` apart; remove their files.

    What the graph asks of a processor is read off the graph.

    model: as it was saved. Raises TargetError when the device would make another file.
    """
    facts = replace(facts, cpu=int8_products.needs(stage / file))
    if not groups:
        return bundle.write(stage, facts, progress)
    entries = {}
    for number, group in enumerate(groups):
        path = storage.more_file(stage / file, number)
        entry = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        entries[path.relative_to(stage).as_posix()] = entry | dict(group.layout(model, path.name))
    manifest = bundle.write(stage, replace(facts, generated=entries), progress)
    with tempfile.TemporaryDirectory(prefix=".made-", dir=stage) as made:
        generated.write(manifest, Path(made), progress)
        for name, entry in entries.items():
            if sha256_file(Path(made) / name) != entry["sha256"]:
                raise TargetError(f"what a device would write as {name} isn't what the graph was made with")
            (stage / name).unlink()
    return manifest
