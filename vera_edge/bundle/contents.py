"""The bundle: an exported folder, and its manifest `vera_edge.json`: what is in it and how it was made.

The manifest lists every other file with its size and SHA-256, and is canonical JSON that carries its own
digest, so one changed byte anywhere is found. It isn't a signature: who can write the folder can write a new
manifest. docs/bundle.md specifies the format, bundle.schema.json beside this file is its JSON Schema.
Standard library only: a device reads it before anything else is imported.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from vera_edge.bundle.manifest import (
    FIELDS,
    FORMAT,
    KINDS,
    MANIFEST,
    MODES,
    NO_ADAPTER,
    SIGNATURE,
    UNLISTED,
    FileEntry,
    Json,
    Manifest,
    ManifestFields,
    check_limits,
    parse,
)
from vera_edge.errors import BundleError, OutputError
from vera_edge.progress import Progress, silent
from vera_edge.storage.digest_notes import DigestNotes
from vera_edge.storage.files import (
    PARTIAL_MARK,
    output_error,
    safe_join,
    sha256_bytes,
    sha256_file,
    write_atomic,
)
from vera_edge.storage.json_text import Bound, canonical_json, read_json

__all__ = [
    "FORMAT",
    "KINDS",
    "MANIFEST",
    "MODES",
    "NO_ADAPTER",
    "SIGNATURE",
    "FileEntry",
    "Manifest",
    "ManifestFields",
    "add",
    "change",
    "check_limits",
    "read",
    "verify",
    "write",
]

# The digest is of the text without this line. Two spaces: a key of the manifest itself, not of one inside;
# and never the last of them, so that a comma ends it ("files" and "format" follow it in the order of names).
_DIGEST_LINE = re.compile(rb'^  "digest": "[0-9a-f]*",\n', re.MULTILINE)
_LARGEST = Bound(16 << 20, 600_000)
_QUICK = 64 << 20  # bytes
_PENDING = f"{PARTIAL_MARK}add"


def write(
    folder: Path,
    facts: ManifestFields,
    progress: Progress = silent,
    known: Mapping[str, FileEntry] = MappingProxyType({}),
) -> Manifest:
    """Hash every file of `folder`, write its manifest atomically and return it as `read` does.

    A manifest that is there already is replaced. known: files that were hashed on their way into the folder.
    Raises BundleError when `facts` contradict the files or the folder holds a link, OutputError when the
    manifest can't be written.
    """
    return _write(folder, facts, progress, known, {})


def _write(
    folder: Path,
    facts: ManifestFields,
    progress: Progress,
    known: Mapping[str, FileEntry],
    coming: Mapping[str, Path],
) -> Manifest:
    """As `write`. coming: where the content of some files lies until the manifest lists them."""
    apart = UNLISTED | facts.generated.keys() | {_name(folder, path) for path in coming.values()}
    names = sorted(coming.keys() | {name for name in _walk(folder) if name not in apart})
    entries: dict[str, Json] = {}
    for done, name in enumerate(names):
        progress("hashing the bundle", done, len(names))
        path = coming.get(name) or safe_join(folder, name)
        sha256 = known[name].sha256 if name in known else sha256_file(path)
        entries[name] = {"size": path.stat().st_size, "sha256": sha256}
    value = {"format": FORMAT, "files": entries, "digest": ""} | {key: getattr(facts, key) for key in FIELDS}
    text = canonical_json(value)
    text = text.replace(b'\n  "digest": ""', f'\n  "digest": "{_digest(text)}"'.encode(), 1)
    manifest = parse(json.loads(text), folder, folder / MANIFEST)
    write_atomic(folder / MANIFEST, text)
    return manifest


def check_folder(folder: Path) -> None:
    """Raise BundleError where there is none."""
    if not folder.is_dir():
        raise BundleError(f"{folder} isn't a folder; give the folder that `vera-edge export` wrote")


def read(folder: Path) -> Manifest:
    """The manifest of `folder`, checked in itself; whether the files match is `verify`'s question.

    Raises BundleError when it is missing, damaged, of a newer format, or names a path outside the folder.
    """
    path = folder / MANIFEST
    check_folder(folder)
    if not path.exists() and (folder / "current").is_dir():
        raise BundleError(f"{folder} is where bundles are installed; give {folder}/current, which runs")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BundleError(f"{path} isn't a plain file; copy the bundle again")
    value = read_json(path, BundleError, _LARGEST)
    version: Json = value.get("format")
    if type(version) is int and version > FORMAT:
        raise BundleError(f"{path} has bundle format {version}, newer than {FORMAT}; update vera-edge")
    if type(version) is not int or version != FORMAT:
        raise BundleError(f"{path} has no bundle format that vera-edge knows ({version!r}); export again")
    try:
        text = path.read_bytes()
        sound = canonical_json(value) == text and value.get("digest") == _digest(text)
    except (ValueError, RecursionError):  # NaN, lone surrogates, nesting: nothing that `write` writes
        sound = False
    if not sound:
        raise BundleError(f"{path} was changed after it was written; copy or download the bundle again")
    return parse(value, folder, path)


def change(manifest: Manifest, **changes: Json) -> ManifestFields:
    """The facts of `manifest` with some of them changed, to write it anew."""
    return ManifestFields(**{key: getattr(manifest, key) for key in FIELDS} | changes)


def check_unsigned(folder: Path, advice: str) -> None:
    """Raise OutputError when a bundle is signed: what is added to it would make the signature wrong."""
    if (folder / SIGNATURE).exists():
        raise OutputError(f"{folder} is signed, so nothing can be added to it; {advice}")


def add(
    manifest: Manifest,
    name: str,
    data: bytes,
    progress: Progress = silent,
    known: Mapping[str, FileEntry] = MappingProxyType({}),
    **changes: Json,
) -> Manifest:
    """Put the file `name` into a bundle, or replace it, and list it: wholly or not at all.

    The content waits under a hidden name until the manifest lists it, so that an end at any moment leaves the
    bundle as it was, or what `verify` makes into the new one. known: see `write`. changes: of the manifest's
    facts. Raises as `write`.
    """
    pending = _pending(safe_join(manifest.folder, name))
    write_atomic(pending, data)
    try:
        added = _write(manifest.folder, change(manifest, **changes), progress, known, {name: pending})
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    _finish(added)
    return added


def _pending(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PENDING}")


def _finish(manifest: Manifest) -> None:
    """Put what `add` left under a hidden name in its place if the manifest lists it, and remove it if not."""
    for pending in [path for path in manifest.folder.rglob(f".*{_PENDING}") if path.is_file()]:
        place = pending.with_name(pending.name[1 : -len(_PENDING)])
        entry = manifest.files.get(_name(manifest.folder, place))
        try:
            if entry is not None and sha256_file(pending) == entry.sha256:
                pending.replace(place)
            else:
                pending.unlink()
        except OSError as cause:
            raise output_error(place, cause) from cause


def verify(
    folder: Path,
    deep: bool = True,
    progress: Progress = silent,
    complete: bool = False,
    notes: DigestNotes | None = None,
) -> Manifest:
    """Check that `folder` holds exactly the listed files, in size and in SHA-256.

    Without `deep` the content of files over 64 MiB isn't looked at. notes: files that they vouch for aren't
    read, and others are noted; without them every file is read.
    Generated files are checked where they are there, and must be there when it is to be `complete`. An `add`
    that was cut off is ended first. Raises BundleError naming the first file that is missing, damaged, a
    link, or not listed.
    """
    manifest = read(folder)
    _finish(manifest)
    present = set(_walk(folder)) - UNLISTED
    drawn = manifest.drawn
    if missing := sorted(manifest.files.keys() - present):
        raise BundleError(f"{folder / missing[0]} is missing; copy or download the bundle again")
    if complete and (missing := sorted(drawn.keys() - present)):
        raise BundleError(f"{folder / missing[0]} isn't made yet; `vera-edge install` makes it")
    if extra := sorted(present - manifest.files.keys() - drawn.keys()):
        raise BundleError(f"{folder / extra[0]} isn't listed in {MANIFEST}; remove it or export again")
    entries = dict(manifest.files) | {name: entry for name, entry in drawn.items() if name in present}
    sizes = {name: (folder / name).stat().st_size for name in entries}
    for name, entry in entries.items():
        if sizes[name] != entry.size:
            raise BundleError(
                f"{folder / name} holds {sizes[name]} bytes and the manifest says {entry.size}; copy it again"
            )
    has = _has if notes is None else notes.has
    done, total = 0, sum(sizes.values())
    for name, entry in entries.items():
        progress("verifying the bundle", done, total)
        if (deep or entry.size <= _QUICK) and not has(folder / name, entry.sha256):
            raise BundleError(f"{folder / name} is damaged: its SHA-256 isn't the manifest's; copy it again")
        done += entry.size
    return manifest


def _has(path: Path, sha256: str) -> bool:
    return sha256_file(path) == sha256


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files under `folder`, with forward slashes; raises BundleError on links and devices."""
    for top, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(top, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise BundleError(f"{path} is a link or a device; a bundle holds plain files only")
        for name in names:
            yield _name(folder, Path(top, name))


def _name(folder: Path, path: Path) -> str:
    """What the manifest of `folder` calls a file in it."""
    return path.relative_to(folder).as_posix()


def _digest(text: bytes) -> str:
    """The digest of a manifest in canonical JSON: of all of it but the line that holds the digest."""
    return sha256_bytes(_DIGEST_LINE.sub(b"", text, count=1))
