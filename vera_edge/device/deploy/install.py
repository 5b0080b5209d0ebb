"""Versions of a bundle on a device: installed whole, switched atomically, rolled back.

Every change is staged beside its place, flushed, renamed, and the link is replaced last (`versions`): a power
loss leaves the old version or the new one. Standard library only, and numpy where projections are drawn from
the seed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.device.deploy import versions
from vera_edge.errors import BundleError, OutputError
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import (
    PARTIAL_MARK,
    check_output,
    fsync_folder,
    output_error,
    staged_folder,
    write_atomic,
)

_CHUNK = 1 << 20
_SPARE = 1 << 20  # bytes left free on the disk for folders and the manifest
Accept = Callable[[Path], None]


@dataclass(frozen=True)
class Installed:
    """What runs from now on. changed: False when it was what ran already."""

    folder: Path
    digest: str
    previous: Path | None
    changed: bool
    copied: int = 0  # bytes that came with it; the rest was on the device

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        previous = None if self.previous is None else self.previous.name
        return {**vars(self), "folder": str(self.folder), "previous": previous}


def install(
    src: Path, dst: Path, accept: Accept | None = None, partial: bool = False, progress: Progress = silent
) -> Installed:
    """Install the bundle `src` into `dst` and make it current; the one that ran before is kept.

    accept: called with the complete folder before the switch, also where that version runs already; what it
    raises leaves everything as it is. partial: files that `src` lists but doesn't bring are taken from the
    current version. Raises BundleError when `src` is damaged, OutputError when the disk is too small or can't
    be written.
    """
    manifest = bundle.read(src) if partial else bundle.verify(src, deep=False)
    if dst.resolve().is_relative_to(src.resolve()):
        raise OutputError(
            f"{dst} is in {src} itself, which holds nothing but the bundle; choose another place"
        )
    if partial and not (dst / versions.VERSIONS).is_dir():
        _sources(manifest, None)  # all must come with it, or nothing is made of the place
    with versions.locked(dst):
        running = versions.running_in(dst)
        versions.tidy(dst, running)
        if running is not None and _is_sound(running, manifest.digest, progress):
            _seal_anew(running, src, accept)
            return Installed(running, manifest.digest, versions.before(dst, running), changed=False)
        sources = _sources(manifest, running if partial else None)
        coming = sum(manifest.files[name].size for name, path in sources.items() if path.is_relative_to(src))
        _check_space(dst, coming + sum(entry.size for entry in manifest.drawn.values()))
        folder = _stage(manifest, sources, dst, running, accept, progress)
        versions.switch(dst, folder)
        if running is not None:
            versions.forget_before(dst, running)
    return Installed(folder, manifest.digest, running, changed=True, copied=coming)


def rollback(dst: Path, progress: Progress = silent, accept: Accept | None = None) -> Installed:
    """Make the version before the current one current again, once every byte of it is verified.

    Raises BundleError when there is none or it is damaged, and what `accept` raises: then nothing changes.
    """
    if not (dst / versions.VERSIONS).is_dir():
        raise BundleError(f"nothing is installed in {dst}; give the folder that `vera-edge install` wrote to")
    with versions.locked(dst):
        running = versions.running_in(dst)
        before = versions.before(dst, running) if running else None
        if before is None:
            raise BundleError(
                f"{dst} holds no version before the current one; there is nothing to roll back to"
            )
        manifest = bundle.verify(before, progress=progress, complete=True)
        if accept is not None:
            accept(before)
        versions.switch(dst, before)
        return Installed(before, manifest.digest, versions.before(dst, before), changed=True)


def make_patch(old: Path, new: Path, out: Path, force: bool = False, progress: Progress = silent) -> int:
    """Write to `out` what a device that runs `old` needs to run `new`; returns the bytes of its files.

    That is the new manifest and the files whose content isn't in `old`. Install it with `partial`.
    """
    check_output(out, force, (old, new))
    had = {entry.sha256 for entry in bundle.verify(old, progress=progress).files.values()}
    manifest = bundle.verify(new, progress=progress)
    size = 0
    with staged_folder(out, force) as stage:
        for name, entry in manifest.files.items():
            if entry.sha256 not in had:
                _copy(manifest.path(name), stage / name, progress)
                size += entry.size
        _copy_seals(new, stage)
    return size


def _is_sound(folder: Path, digest: str, progress: Progress) -> bool:
    try:
        found = bundle.read(folder).digest
        return found == digest and bundle.verify(folder, progress=progress, complete=True).digest == digest
    except BundleError:
        return False


def _seal_anew(running: Path, src: Path, accept: Accept | None) -> None:
    """Take over the signature that `src` brings for the version that runs, if `accept` lets it pass."""
    came = _signature(src)
    if came is None or came == _signature(running):
        if accept is not None:
            accept(running)
        return
    with tempfile.TemporaryDirectory(prefix=f".{running.name}{PARTIAL_MARK}", dir=running.parent) as place:
        for path in running.rglob("*"):
            if path.is_file():
                _link(path, Path(place) / path.relative_to(running), silent)
        write_atomic(Path(place) / bundle.SIGNATURE, came)
        if accept is not None:
            accept(Path(place))
    write_atomic(running / bundle.SIGNATURE, came)


def _signature(folder: Path) -> bytes | None:
    path = folder / bundle.SIGNATURE
    return path.read_bytes() if path.is_file() and not path.is_symlink() else None


def _sources(manifest: Manifest, running: Path | None) -> dict[str, Path]:
    """Where each listed file comes from: the source, or a file of the same content that is installed."""
    installed = bundle.read(running).files if running is not None else {}
    by_content = {entry.sha256: running / name for name, entry in installed.items() if running is not None}
    sources = {}
    for name, entry in manifest.files.items():
        path = manifest.path(name)
        if not path.is_file() and entry.sha256 in by_content:
            path = by_content[entry.sha256]
        if not path.is_file() or path.stat().st_size != entry.size:
            raise BundleError(
                f"{manifest.folder} doesn't bring {name} and the version that runs doesn't have it; "
                "install the whole bundle"
            )
        sources[name] = path
    return sources


def _check_space(dst: Path, needed: int) -> None:
    free = shutil.disk_usage(dst).free
    if needed + _SPARE > free:
        raise OutputError(
            f"{dst} has {free / 1e6:.0f} MB free and the version needs {needed / 1e6:.0f} MB; make room"
        )


def _stage(
    manifest: Manifest,
    sources: dict[str, Path],
    dst: Path,
    running: Path | None,
    accept: Accept | None,
    progress: Progress,
) -> Path:
    """Bring a version into its folder, complete, verified and flushed to the disk; returns the folder."""
    last = max((versions.number(path.name) or 0 for path in versions.versions(dst)), default=0)
    folder = dst / versions.VERSIONS / f"{last + 1:06d}-{manifest.digest[:12]}"
    with staged_folder(folder) as stage:
        for name, path in sources.items():
            if running is not None and path.is_relative_to(running):
                _link(path, stage / name, progress)
            else:
                _copy(path, stage / name, progress)
        _copy_seals(manifest.folder, stage)
        if manifest.generated:
            from vera_edge.device.runtime import generated

            generated.write(manifest, stage, progress)
        if bundle.verify(stage, progress=progress, complete=True).digest != manifest.digest:
            raise BundleError(f"{manifest.folder} changed while it was installed; install it again")
        if accept is not None:
            accept(stage)
        for path in [*stage.rglob("*"), stage]:
            if path.is_dir():
                fsync_folder(path)
    return folder


def _copy_seals(source: Path, target: Path) -> None:
    """The manifest, and the signature where there is one: what says what the other files are."""
    for name in (bundle.MANIFEST, bundle.SIGNATURE):
        path = source / name
        if path.is_file() and not path.is_symlink():
            write_atomic(target / name, path.read_bytes())


def _copy(source: Path, target: Path, progress: Progress) -> None:
    size, done = source.stat().st_size, 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader, target.open("wb") as writer:
            while chunk := reader.read(_CHUNK):
                writer.write(chunk)
                done += len(chunk)
                progress(f"copying {source.name}", done, size)
    except OSError as cause:
        raise output_error(target, cause) from cause


def _link(source: Path, target: Path, progress: Progress) -> None:
    """A second name for a file that no version ever changes; a copy where the disk can't."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        _copy(source, target, progress)
