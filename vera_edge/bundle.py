"""The bundle: an exported folder, and its manifest `vera_edge.json`: what is in it and how it was made.

The manifest lists every other file with its size and SHA-256, and is canonical JSON that carries its own
digest, so one changed byte anywhere is found. It isn't a signature: who can write the folder can write a new
manifest. docs/bundle.md specifies the format, bundle.schema.json beside this file is its JSON Schema.
Standard library only: a device reads it before anything else is imported.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from vera_edge.errors import BundleError
from vera_edge.files import canonical_json, read_json, safe_join, sha256_bytes, sha256_file, write_atomic
from vera_edge.progress import Progress, silent

FORMAT = 1
MANIFEST = "vera_edge.json"
SIGNATURE = "model.sig"  # signs the manifest too, so the manifest can't list it
_UNLISTED = frozenset({MANIFEST, SIGNATURE})
KINDS = ("decoder", "encoder")
MODES = ("merged", "branch")
_MAX_MANIFEST = 16 << 20  # bytes
_MAX_FILES = 10_000
_QUICK = 64 << 20  # bytes
_MAX_SIZE = 1 << 53  # the largest integer every JSON reader keeps exact
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,3}")

# What a JSON reader hands over; the manifest's free-form records keep this type.
Json: TypeAlias = Any


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its size in bytes and the hex SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the exporter knows and the files alone don't tell.

    `weights` is the stored weight format ("fp32", "int8", "int4", "nf4"); its options are in `plan`.
    `model` is the ONNX graph. `base` holds at least `digest`; `adapters` maps a name to at least `file` (an
    .onnx_adapter of the bundle, or null once it is merged) and `digest`. `default_adapter` is what runs
    when nothing else is asked for. `projection` is the ProjectionSpec with the `digest` of A and B.
    `limits` are the drift limits that `validate` holds the device to; `golden` is the file of golden
    vectors. `requires` maps a runtime's distribution name to the oldest version that runs the graph.
    `model_version` is what every .onnx_adapter for this graph carries; None when that isn't recorded.
    """

    kind: str
    mode: str
    weights: str
    base: Mapping[str, Json]
    model: str = "onnx/model.onnx"
    adapters: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    default_adapter: str | None = None
    projection: Mapping[str, Json] | None = None
    model_version: int | None = None
    plan: Mapping[str, Json] | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    golden: str | None = None
    requires: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest(Facts):
    """A manifest that was read and found sound. `digest` covers every file's digest: it names the bundle."""

    folder: Path
    files: Mapping[str, FileEntry]
    digest: str

    def path(self, name: str) -> Path:
        """Where the listed file `name` lies; raises BundleError when the manifest doesn't list it."""
        if name not in self.files:
            raise BundleError(f"{self.folder / MANIFEST} lists no file {name!r}; export the bundle again")
        return safe_join(self.folder, name)

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size for entry in self.files.values())


def write(folder: Path, facts: Facts, progress: Progress = silent) -> Manifest:
    """Hash every file of `folder`, write its manifest atomically and return it as read back.

    A manifest that is there already is replaced. Raises BundleError when `facts` contradict the files or the
    folder holds a link, OutputError when the manifest can't be written.
    """
    names = sorted(name for name in _walk(folder) if name not in _UNLISTED)
    entries: dict[str, Json] = {}
    for done, name in enumerate(names):
        progress("hashing the bundle", done, len(names))
        path = safe_join(folder, name)
        entries[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    value = {"format": FORMAT, "files": entries} | {key: getattr(facts, key) for key in _FIELDS}
    value["digest"] = _digest(value)
    _parse(value, folder, folder / MANIFEST)
    write_atomic(folder / MANIFEST, canonical_json(value))
    return read(folder)


def read(folder: Path) -> Manifest:
    """The manifest of `folder`, checked in itself; whether the files match is `verify`'s question.

    Raises BundleError when it is missing, damaged, of a newer format, or names a path outside the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder} isn't a folder; give the folder that `vera-edge export` wrote")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BundleError(f"{path} isn't a plain file; copy the bundle again")
    if path.is_file() and path.stat().st_size > _MAX_MANIFEST:
        raise BundleError(
            f"{path} is over {_MAX_MANIFEST >> 20} MiB, which no manifest is; copy the bundle again"
        )
    value = read_json(path, BundleError)
    version: Json = value.get("format")
    if type(version) is int and version > FORMAT:
        raise BundleError(f"{path} has bundle format {version}, newer than {FORMAT}; update vera-edge")
    if type(version) is not int or version != FORMAT:
        raise BundleError(f"{path} has no bundle format that vera-edge knows ({version!r}); export again")
    try:
        sound = canonical_json(value) == path.read_bytes() and value.get("digest") == _digest(value)
    except (ValueError, RecursionError):  # NaN, lone surrogates, nesting: nothing that `write` writes
        sound = False
    if not sound:
        raise BundleError(f"{path} was changed after it was written; copy or download the bundle again")
    return _parse(value, folder, path)


def change(manifest: Manifest, **changes: Json) -> Facts:
    """The facts of `manifest` with some of them changed, to write it anew."""
    return Facts(**{key: getattr(manifest, key) for key in _FIELDS} | changes)


def verify(folder: Path, deep: bool = True, progress: Progress = silent) -> Manifest:
    """Check that `folder` holds exactly the listed files, in size and in SHA-256.

    Without `deep` the content of files over 64 MiB isn't read: quick enough to come before every run.
    Raises BundleError naming the first file that is missing, damaged, a link, or not listed.
    """
    manifest = read(folder)
    present = set(_walk(folder)) - _UNLISTED
    if missing := sorted(manifest.files.keys() - present):
        raise BundleError(f"{folder / missing[0]} is missing; copy or download the bundle again")
    if extra := sorted(present - manifest.files.keys()):
        raise BundleError(f"{folder / extra[0]} isn't listed in {MANIFEST}; remove it or export again")
    sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    for name, entry in manifest.files.items():
        if sizes[name] != entry.size:
            raise BundleError(
                f"{folder / name} holds {sizes[name]} bytes and the manifest says {entry.size}; copy it again"
            )
    done = 0
    for name, entry in manifest.files.items():
        progress("verifying the bundle", done, manifest.size)
        if (deep or entry.size <= _QUICK) and sha256_file(folder / name) != entry.sha256:
            raise BundleError(f"{folder / name} is damaged: its SHA-256 isn't the manifest's; copy it again")
        done += entry.size
    return manifest


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files under `folder`, with forward slashes; raises BundleError on links and devices."""
    for top, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(top, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise BundleError(f"{path} is a link or a device; a bundle holds plain files only")
        for name in names:
            yield Path(top, name).relative_to(folder).as_posix()


def _digest(value: Mapping[str, Json]) -> str:
    return sha256_bytes(canonical_json({key: item for key, item in value.items() if key != "digest"}))


def _is_count(value: Json) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _is_hash(value: Json) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _parse(value: Mapping[str, Json], folder: Path, path: Path) -> Manifest:
    """A Manifest out of the JSON object, every field's type and meaning checked. Unknown keys are ignored."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise BundleError(f"{path}: {what}; export the bundle again")

    files = _parse_files(value.get("files"), folder, need)
    for key, (holds, what) in _FIELDS.items():
        need(key in value or key in _OPTIONAL, f"{key} is missing")
        need(key not in value or holds(value[key]), f"{key} {what}")
    need(value["model"] in files, "model names no listed file")
    need(value["golden"] is None or value["golden"] in files, "golden names no listed file")
    _check_adapters(value, files, need)
    facts = {key: value[key] for key in _FIELDS if key in value}
    return Manifest(folder=folder, files=files, digest=value["digest"], **facts)


def _is_int32(value: Json) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_map(value: Json, holds: Callable[[Json], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(holds(item) for item in value.values())


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _has_digest(value: Json) -> bool:
    return isinstance(value, dict) and isinstance(value.get("digest"), str)


def _is_version(text: Json) -> bool:
    return isinstance(text, str) and _VERSION.fullmatch(text) is not None


def _is_number(value: Json) -> bool:
    return type(value) in (int, float)


# field of Facts -> (what must hold, what to say when it doesn't)
_FIELDS: Mapping[str, tuple[Callable[[Json], bool], str]] = {
    "kind": (lambda value: value in KINDS, f"isn't one of {', '.join(KINDS)}"),
    "mode": (lambda value: value in MODES, f"isn't one of {', '.join(MODES)}"),
    "weights": (_is_text, "isn't the name of a weight format"),
    "base": (_has_digest, "isn't an object with a digest"),
    "model": (_is_text, "isn't a file name"),
    "adapters": (lambda value: _is_map(value, _has_digest), "isn't an object of adapters with digests"),
    "default_adapter": (lambda value: value is None or _is_text(value), "isn't the name of an adapter"),
    "projection": (lambda value: value is None or _has_digest(value), "isn't an object with a digest"),
    "model_version": (
        lambda value: value is None or _is_int32(value),
        "isn't an integer from 1 to 2**31 - 1",
    ),
    "plan": (lambda value: value is None or _is_map(value), "isn't an object"),
    "limits": (lambda value: _is_map(value, _is_number), "isn't an object of numbers"),
    "golden": (lambda value: value is None or _is_text(value), "isn't a file name"),
    "requires": (lambda value: _is_map(value, _is_version), "isn't an object of version numbers"),
    "tools": (lambda value: _is_map(value, _is_text), "isn't an object of versions"),
}


# Fields that came after format 1 was first written; a manifest without them means their defaults.
_OPTIONAL = frozenset({"model_version"})


def _parse_files(value: Json, folder: Path, need: Callable[[bool, str], None]) -> dict[str, FileEntry]:
    need(_is_map(value) and 0 < len(value) <= _MAX_FILES, "files isn't an object of 1 to 10000 files")
    files: dict[str, FileEntry] = {}
    folded: set[str] = set(_UNLISTED)
    for name, entry in value.items():
        need(len(name) <= 512 and name.isprintable(), f"the file name {name[:80]!r} isn't a plain name")
        safe_join(folder, name)
        # Windows and macOS hold names that differ in case as one file.
        need(
            name.casefold() not in folded,
            f"the file {name!r} is listed twice, or is the manifest or its signature",
        )
        folded.add(name.casefold())
        sound = isinstance(entry, dict) and _is_count(entry.get("size")) and _is_hash(entry.get("sha256"))
        need(sound, f"the entry of {name!r} has no size and sha256")
        files[name] = FileEntry(entry["size"], entry["sha256"])
    return files


def _check_adapters(
    value: Mapping[str, Json], files: Mapping[str, FileEntry], need: Callable[[bool, str], None]
) -> None:
    for name, entry in value["adapters"].items():
        need(_ADAPTER_NAME.fullmatch(name) is not None, f"the adapter name {name[:80]!r} isn't a plain name")
        file = entry.get("file")
        need(file is None or (_is_text(file) and file in files), f"adapter {name} names no listed file")
        need(file is not None or value["mode"] == "merged", f"adapter {name} of a branch bundle has no file")
    default = value["default_adapter"]
    need(default is None or default in value["adapters"], f"default_adapter {default!r} isn't an adapter")


def as_json(manifest: Manifest) -> dict[str, Json]:
    """The manifest as the JSON object it was read from, without the digest that covers it."""
    files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in manifest.files.items()}
    return {"format": FORMAT, "files": files} | {key: getattr(manifest, key) for key in _FIELDS}
