"""Packs an adapter for a GGUF branch bundle, as the GGUF LoRA that llama.cpp swaps in."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vera_edge.base.trained_as import TrainedAs
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import MismatchError, PlanError
from vera_edge.exporting import target
from vera_edge.exporting.exporter import PacksAdapters
from vera_edge.storage.files import make_folder, output_error, sha256_file
from vera_edge.trained.trained_model import TrainedModel, open_model


def pack(model: TrainedModel, manifest: Manifest, path: Path, name: str) -> None:
    """Write the one adapter of `model` for the bundle that `manifest` describes.

    Raises MismatchError when the bundle is of another base or projections, or has its adapter merged,
    TargetError when no LoRA can stand for the adapter.
    """
    if manifest.mode != "branch":
        raise MismatchError(f"the adapter is merged into {manifest.folder}; export with --mode branch")
    if model.checkpoint.digest != manifest.base["digest"]:
        raise MismatchError(
            f"{manifest.folder} was made of another base than {model.checkpoint.path}; name its own"
        )
    exporter = target.find("gguf")
    if not isinstance(exporter, PacksAdapters):
        raise PlanError(f"the target {exporter.name} has no file for an adapter alone")
    exporter.pack(model, manifest, path, name)


def pack_folder(
    adapter: Path,
    manifest: Manifest,
    path: Path,
    weight: float = 1.0,
    base: Path | None = None,
    trained_as: TrainedAs | None = None,
) -> str:
    """`pack` for a PEFT folder; the hex SHA-256 of the file. base: its folder, which is needed.

    trained_as: how the base was loaded in training. Raises as `pack`, and MismatchError without a base.
    """
    if base is None:
        raise MismatchError(
            f"{manifest.folder} is for llama.cpp, whose LoRA files hold factors of their own: the base says "
            "how large they are; give --base"
        )
    model = open_model(base, [(adapter, weight)], None, trained_as)
    make_folder(path.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as place:
            draft = Path(place) / path.name
            pack(model, manifest, draft, path.stem)
            draft.replace(path)
    except OSError as cause:
        raise output_error(path, cause) from cause
    return sha256_file(path)
