"""What a report says of a folder that was measured: its name, its kind, its size."""

from __future__ import annotations

from pathlib import Path

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.measuring.result import Artefact


def weights_of(checkpoint: Checkpoint) -> str:
    return "/".join(sorted({linear.format for linear in checkpoint.linears.values()})) or "no linear"


def artefact(path: Path, kind: str) -> Artefact:
    return Artefact(path.resolve().name, str(path), kind, folder_bytes(path))


def folder_bytes(path: Path) -> int:
    """Bytes of all files under `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
