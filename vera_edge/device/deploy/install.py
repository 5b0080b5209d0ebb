"""Versions of a bundle on a device: installed whole, switched atomically, rolled back.

    DST/versions/000001-3f0c91ab2d4e/    a bundle each, numbered in the order they came
    DST/current -> versions/000002-...   the one that runs; where links can't be made, a file with the name

Nothing else is kept: the last good version is the highest number below the current one. Every change is
staged beside its place, flushed, renamed, and the link is replaced last: a power loss leaves the old version
or the new one. Standard library only, and numpy where projections are drawn from the seed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import BundleError, OutputError
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import (
    PARTIAL_MARK,
    check_output,
    fsync_folder,
    make_folder,
    output_error,
    staged_folder,
    write_atomic,
)
from vera_edge.storage.lock import exclusive

CURRENT = "current"
_VERSIONS = "versions"
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


def current(dst: Path) -> Path | None:
    """The folder of the version that runs, None when nothing is installed. Raises BundleError when broken."""
    link = dst / CURRENT
    if link.is_symlink():
        name = str(link.readlink())
    elif link.is_file():
        name = link.read_text("utf-8", errors="replace").strip()
    else:
        return None
    parts = Path(name).parts
    if len(parts) != 2 or parts[0] != _VERSIONS or _number(parts[1]) is None or not (dst / name).is_dir():
        raise BundleError(f"{link} doesn't lead to a version in {dst / _VERSIONS}; install the bundle again")
    return dst / name


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
    if partial and not (dst / _VERSIONS).is_dir():
        _sources(manifest, None)  # all must come with it, or nothing is made of the place
    with _locked(dst):
        running = _running(dst)
        _tidy(dst, running)
        if running is not None and _is_sound(running, manifest.digest, progress):
            _seal_anew(running, src, accept)
            return Installed(running, manifest.digest, _before(dst, running), changed=False)
        sources = _sources(manifest, running if partial else None)
        coming = sum(manifest.files[name].size for name, path in sources.items() if path.is_relative_to(src))
        _check_space(dst, coming + sum(entry.size for entry in manifest.drawn.values()))
        folder = _stage(manifest, sources, dst, running, accept, progress)
        _switch(dst, folder)
        if running is not None:
            _forget_before(dst, running)
    return Installed(folder, manifest.digest, running, changed=True, copied=coming)


def rollback(dst: Path, progress: Progress = silent, accept: Accept | None = None) -> Installed:
    """Make the version before the current one current again, once every byte of it is verified.

    Raises BundleError when there is none or it is damaged, and what `accept` raises: then nothing changes.
    """
    if not (dst / _VERSIONS).is_dir():
        raise BundleError(f"nothing is installed in {dst}; give the folder that `vera-edge install` wrote to")
    with _locked(dst):
        running = _running(dst)
        before = _before(dst, running) if running else None
        if before is None:
            raise BundleError(
                f"{dst} holds no version before the current one; there is nothing to roll back to"
            )
        manifest = bundle.verify(before, progress=progress, complete=True)
        if accept is not None:
            accept(before)
        _switch(dst, before)
        return Installed(before, manifest.digest, _before(dst, before), changed=True)


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


def _running(dst: Path) -> Path | None:
    """As `current`, with None for a link that leads nowhere: an install mends it."""
    try:
        return current(dst)
    except BundleError:
        return None


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


def _number(name: str) -> int | None:
    head, _, tail = name.partition("-")
    return int(head) if len(head) == 6 and head.isascii() and head.isdigit() and tail else None


def _versions(dst: Path) -> list[Path]:
    """The version folders, oldest first."""
    root = dst / _VERSIONS
    return sorted(path for path in root.iterdir() if _number(path.name) is not None) if root.is_dir() else []


def _before(dst: Path, running: Path) -> Path | None:
    earlier = [path for path in _versions(dst) if path.name < running.name]
    return earlier[-1] if earlier else None


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
    last = max((_number(path.name) or 0 for path in _versions(dst)), default=0)
    folder = dst / _VERSIONS / f"{last + 1:06d}-{manifest.digest[:12]}"
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


def _switch(dst: Path, folder: Path) -> None:
    """Make `folder` current, in one rename."""
    name = f"{_VERSIONS}/{folder.name}"
    fsync_folder(dst / _VERSIONS)
    temporary = Path(tempfile.mkdtemp(prefix=f".{CURRENT}{PARTIAL_MARK}", dir=dst))
    try:
        (temporary / CURRENT).symlink_to(name, target_is_directory=True)
        (temporary / CURRENT).replace(dst / CURRENT)
        fsync_folder(dst)
    except (OSError, NotImplementedError):  # no links here: Windows without the right, FAT
        write_atomic(dst / CURRENT, f"{name}\n".encode())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tidy(dst: Path, running: Path | None) -> None:
    """Remove what an interrupted install left, and versions that were rolled back."""
    for root in (dst, dst / _VERSIONS):
        for path in root.iterdir() if root.is_dir() else ():
            if path.name.startswith(".") and PARTIAL_MARK in path.name:
                shutil.rmtree(path, ignore_errors=True)
    for path in _versions(dst):
        if running is not None and path.name > running.name:
            _remove(path)


def _forget_before(dst: Path, kept: Path) -> None:
    for path in _versions(dst):
        if path.name < kept.name:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a version: renamed first, so that one that is half deleted isn't taken for a version."""
    doomed = path.with_name(f".{path.name}{PARTIAL_MARK}removed")
    path.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _locked(dst: Path) -> Iterator[None]:
    """One install at a time. A `dst` that is new is gone again when nothing was installed."""
    new = not dst.exists()
    make_folder(dst / _VERSIONS)
    try:
        with exclusive(dst / ".lock", f"install into {dst}"):
            try:
                yield
            finally:
                if new and not _versions(dst):
                    shutil.rmtree(dst, ignore_errors=True)
    except OSError as cause:
        raise output_error(dst, cause) from cause
