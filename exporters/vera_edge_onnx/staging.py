"""Where an export grows: a hidden folder beside its target, of a fixed name, so that the next run finds it.

    .<target>.partial-export/<key>/out/            the bundle; in the end this folder becomes the target
    .<target>.partial-export/<key>/initializers/   weights that aren't in its data file yet
    .<target>.partial-export/<key>/journal         what is finished of both
    .<target>.partial-export/<key>/work/           the graph as it was drawn, and that it was compared

The key is a digest of all that decides the bytes, the base's own bytes among it, so nothing else goes on from
here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters.adapter import Adapter
from vera_edge.errors import CheckpointError
from vera_edge.exporting.exporter import EXPORT, RESULT, ExportRequest
from vera_edge.merging.work import key_of as merge_key
from vera_edge.requantize.correction import Correction
from vera_edge.storage import resumable
from vera_edge.storage.files import (
    check_output,
    commit_folder,
    output_error,
    sha256_bytes,
)
from vera_edge.storage.json_text import canonical_json
from vera_edge.text.mixture import Mixture
from vera_edge_onnx.graph import spool as spools
from vera_edge_onnx.graph.computed import rows_file
from vera_edge_onnx.graph.spool import Spool
from vera_edge_onnx.manifest_fields import tools


@dataclass(frozen=True)
class ExportStage:
    """`out`: the folder to write the bundle to. `work`: for what it's made with. `spool`: for weights."""

    out: Path
    work: Path
    spool: Spool


@contextmanager
def opened(request: ExportRequest, kind: str) -> Iterator[ExportStage]:
    """The stage of an export, with what an earlier run of it left; the bundle takes its place in the end.

    kind: "decoder" or "encoder". Raises OutputError when the target is taken, or can't be written,
    CheckpointError when a file of the base or of an adapter changed meanwhile.
    """
    resumable.tidy(request.out, EXPORT, f"*/{RESULT}")
    check_output(request.out, request.force)
    stamps = _stamps(request)
    target, key = request.out.absolute(), key_of(request, kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            resumable.resumable_folder(target, EXPORT, key, _has_progress) as folder,
            spools.opened(folder, key) as spool,
        ):
            stage = ExportStage(folder / RESULT, folder / "work", spool)
            _tidy(stage)
            yield stage
            _check_unchanged(stamps, _stamps(request))
            commit_folder(stage.out, target)
    except OSError as cause:
        raise output_error(target, cause) from cause


def _stamps(request: ExportRequest) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file that the model is read from."""
    folders = [folder for folder in request.model.folders if folder.is_dir()]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return {path: ((stat := path.stat()).st_size, stat.st_mtime_ns) for path in files}


def _check_unchanged(before: Mapping[Path, object], after: Mapping[Path, object]) -> None:
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path):
            raise CheckpointError(
                f"{path} changed while it was exported; export again when nothing writes there"
            )


def _has_progress(folder: Path) -> bool:
    return (folder / "journal").read_bytes().count(b"\n") > 1


def _tidy(stage: ExportStage) -> None:
    """Remove what an earlier run left half-done: all but noted weights, and graphs that were drawn."""
    stage.out.mkdir(exist_ok=True)
    stage.work.mkdir(exist_ok=True)
    for path in list(stage.out.rglob("*")):
        if path.is_file() and path not in stage.spool.files:
            path.unlink()
    for path in stage.work.iterdir():
        if not path.is_dir() or not any(path.glob(rows_file("*"))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def key_of(request: ExportRequest, kind: str) -> str:
    """Hex SHA-256 of all that decides what an export writes. Reads the base, and codes that were rounded."""
    checkpoint = request.model.checkpoint
    parts = {
        "merge": merge_key(request.plan, request.requantized, 0),
        "base": checkpoint.digest,
        "config": checkpoint.layout_digest,
        "overlay": checkpoint.overlay.digests if checkpoint.overlay is not None else None,
        "files": checkpoint.files.digest,
        "adapters": [[_of_adapter(adapter), float(weight)] for adapter, weight in request.model.adapters],
        "projections": request.model.projection_digest,
        "options": dict(request.options),
        "corrections": {name: _of_correction(one) for name, one in request.corrections.items()},
        "text": Mixture.either(request.text).digest(),
        "tools": tools(kind),
        "kind": kind,
    }
    return sha256_bytes(canonical_json(parts))


def _of_adapter(adapter: Adapter) -> Mapping[str, Any]:
    """Its vectors as they are, which may have been refitted since they were read."""
    vectors = {name: _of_arrays(*change.arrays.values()) for name, change in adapter.vectors.items()}
    return {"digest": adapter.digest, "name": adapter.name, "vectors": vectors}


def _of_correction(correction: Correction) -> str:
    return _of_arrays(correction.up, correction.down, correction.bias)


def _of_arrays(*arrays: npt.NDArray[Any] | None) -> str:
    parts = [
        None if array is None else [list(array.shape), sha256_bytes(np.ascontiguousarray(array).tobytes())]
        for array in arrays
    ]
    return sha256_bytes(canonical_json(parts))
