"""The projections of a bundle that ships only their seed: drawn into the file its graph reads, or in memory.

The manifest's `generated` lists, for each such file, the dtype and, by initializer of the graph, which rows
of A transposed or of B lie at which offset:

    {"onnx/model.onnx_data_1": {"size": 884736, "sha256": "...", "dtype": "float32", "tensors": {
        "vera.A[0:576]": {"matrix": "A.T", "start": 0, "stop": 576, "offset": 0}, ...}}}

Rows are little-endian and dense; bytes between tensors are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vera_edge.adapters.projection import Projections, ProjectionSpec, regenerate
from vera_edge.arrays import Array
from vera_edge.bundle.manifest import Json, Manifest
from vera_edge.errors import AdapterError, BundleError
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import open_atomic, safe_join

_DTYPES: Mapping[str, str] = {"float32": "<f4", "float16": "<f2"}
_MATRICES: Mapping[str, Callable[[Projections], Array]] = {
    "A.T": lambda pair: pair.a.T,
    "B": lambda pair: pair.b,
}


@dataclass(frozen=True)
class ProjectionRows:
    """Rows `start` to `stop` of "A.T" (in_max, rank) or "B" (out_max, rank), from byte `offset` of a file."""

    matrix: str
    start: int
    stop: int
    offset: int


def draw(manifest: Manifest) -> Projections:
    """The projections of the manifest's spec. Raises BundleError when they aren't those of its digest."""
    value = dict(manifest.projection or {})
    digest = value.pop("digest", None)
    try:
        found = regenerate(ProjectionSpec.from_dict(value))
    except AdapterError as cause:
        raise BundleError(f"{manifest.folder} doesn't say how to draw its projections: {cause}") from None
    except MemoryError:
        raise BundleError(f"the projections of {manifest.folder} don't fit this machine's memory") from None
    if found.digest != digest:
        raise BundleError(
            f"the projections drawn from seed {value['seed']} aren't those that {manifest.folder} was made "
            "with: their digest differs; copy the bundle again"
        )
    return found


def in_memory(manifest: Manifest) -> dict[str, Array]:
    """By initializer of the graph, what the generated files that aren't there would hold; often nothing."""
    absent = [name for name in _files(manifest) if not manifest.path(name).is_file()]
    if not absent:
        return {}
    drawn = draw(manifest)
    found: dict[str, Array] = {}
    for name in absent:
        dtype, tensors = _layout(manifest, name)
        for tensor, rows in tensors.items():
            found[tensor] = _cut(drawn, rows, dtype, manifest)
    return found


def write(manifest: Manifest, folder: Path, progress: Progress = silent) -> None:
    """Draw every file of projections that `manifest` lists into `folder`, each whole or not at all.

    Whether it is what the manifest lists is for `bundle.verify` to say. Raises BundleError when the
    manifest's layout or spec isn't sound, OutputError when the disk refuses.
    """
    files = _files(manifest)
    drawn = draw(manifest) if files else None
    for done, name in enumerate(files):
        progress("drawing the projections", done, len(files))
        assert drawn is not None
        dtype, tensors = _layout(manifest, name)
        size = manifest.drawn[name].size
        with open_atomic(safe_join(folder, name)) as stream:
            for tensor, rows in tensors.items():
                data = _cut(drawn, rows, dtype, manifest).tobytes()
                if rows.offset + len(data) > size:
                    raise BundleError(f"{tensor} reaches past the end of {name}; export the bundle again")
                stream.seek(rows.offset)
                stream.write(data)
            stream.truncate(size)


def _files(manifest: Manifest) -> list[str]:
    return [name for name in manifest.generated if name not in manifest.expanded]


def _cut(drawn: Projections, rows: ProjectionRows, dtype: str, manifest: Manifest) -> Array:
    matrix = _MATRICES[rows.matrix](drawn)
    if not 0 <= rows.start < rows.stop <= len(matrix) or rows.offset < 0:
        raise BundleError(
            f"{manifest.folder} asks for rows {rows.start} to {rows.stop} of the {len(matrix)} of "
            f"{rows.matrix}; export the bundle again"
        )
    return np.ascontiguousarray(matrix[rows.start : rows.stop], dtype)


def _layout(manifest: Manifest, name: str) -> tuple[str, dict[str, ProjectionRows]]:
    """The numpy dtype and the tensors of a generated file."""
    entry = manifest.generated[name]
    try:
        return _DTYPES[entry["dtype"]], {tensor: _rows(value) for tensor, value in entry["tensors"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BundleError(
            f"{manifest.folder} doesn't say how {name} is laid out in a way that vera-edge knows; update it"
        ) from None


def _rows(value: Json) -> ProjectionRows:
    found = ProjectionRows(value["matrix"], value["start"], value["stop"], value["offset"])
    if found.matrix not in _MATRICES or any(
        type(n) is not int for n in (found.start, found.stop, found.offset)
    ):
        raise ValueError
    return found
