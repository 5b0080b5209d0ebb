"""Verification before a start: of what was read once and hasn't been written to since, the digest counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.bundle import contents
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import PlanError
from vera_edge.storage.digest_notes import DigestNotes


@dataclass(frozen=True)
class Verified:
    """What a bundle's verification looked at. size: bytes of all files; deep: whether large ones were too.

    remembered, remembered_size: files that weren't read, since they are unchanged after they were read
    once, and their bytes. trouble: why nothing is remembered, where somebody should hear of it.
    """

    files: int
    size: int
    deep: bool
    remembered: int
    remembered_size: int
    trouble: str | None

    @property
    def told(self) -> str | None:
        """What a person should hear of it, if anything."""
        if self.trouble is not None:
            return self.trouble
        if not self.remembered:
            return None
        return (
            f"verified; {self.remembered} of {self.files} files ({self.remembered_size / 1e6:.1f} MB) "
            "haven't changed since they were read once, and weren't read again (--reread: read them)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))


def verify(folder: Path, deep: bool = True, reread: bool = False) -> tuple[Manifest, Verified]:
    """`contents.verify`, whose digests are remembered in the user's cache folder between two starts.

    reread: read every file, whatever is remembered. Raises as `contents.verify`, and PlanError for `reread`
    without `deep`.
    """
    if reread and not deep:
        raise PlanError("fast (deep=False) and reread contradict each other; leave one of them out")
    notes = DigestNotes(reread=reread)
    manifest = contents.verify(folder, deep, notes=notes)
    files = [manifest.path(name) for name in (*manifest.files, *manifest.drawn)]
    there = [path.stat().st_size for path in files if path.is_file()]
    found = notes.remembered
    verified = Verified(len(there), sum(there), deep, len(found), sum(found.values()), notes.trouble)
    return manifest, verified
