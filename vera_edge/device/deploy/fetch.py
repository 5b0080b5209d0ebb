"""Fetch a bundle over a slow link: only the chunks that no older version on this device has, and resumable.

The source is a folder or any static HTTP server that holds the bundle's files as they are (the Hugging Face
Hub's `resolve` URLs, nginx, `python -m http.server`); ranges are used where the server has them. Nothing that
comes over the link is used before its SHA-256 was compared, and the target appears only whole.
"""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vera_edge.bundle import chunks
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.chunks import Chunk
from vera_edge.bundle.contents import FileEntry, Manifest
from vera_edge.errors import BundleError
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import (
    PARTIAL_MARK,
    check_output,
    commit_folder,
    output_error,
    safe_join,
    sha256_file,
)

_TIMEOUT = 30.0  # seconds without a byte
_MOST_AT_ONCE = 8 << 20  # bytes in one range request
_SMALL = 64 << 20  # no manifest, index or signature is larger


@dataclass(frozen=True)
class Fetched:
    """What a fetch did: the bundle's digest, its size, and how many bytes came over the link (in bytes)."""

    folder: Path
    digest: str
    size: int
    transferred: int


# (file name, start, size or None for the whole file) -> bytes; None when there is no such file
Read = Callable[[str, int, int | None], bytes | None]


def fetch(
    source: str, target: Path, have: Path | None = None, force: bool = False, progress: Progress = silent
) -> Fetched:
    """Bring the bundle at `source` (folder or URL) to `target`, taking from `have` what it already holds.

    An interrupted fetch leaves `.<target>.partial-fetch` beside the target, and the same call goes on from
    it. Raises BundleError when the source isn't a sound bundle or doesn't answer, OutputError when the
    target can't be written.
    """
    check_output(target, force, [path for path in (Path(source), have) if path is not None])
    link = _Link(_reader(source), source)
    stage = target.absolute().with_name(f".{target.name}{PARTIAL_MARK}fetch")
    try:
        stage.mkdir(parents=True, exist_ok=True)
        manifest = link.manifest(stage)
        index = link.index(stage, manifest)
        local = _local_chunks(have, stage, index)
        done = 0
        for name, entry in manifest.files.items():
            progress("fetching the bundle", done, manifest.size)
            _bring(stage, name, entry, index.get(name), local, link)
            done += entry.size
        link.small_file(stage, bundle.SIGNATURE, required=False)
        _drop_strays(stage, manifest)
        bundle.verify(stage)
        commit_folder(stage, target.absolute())
    except OSError as cause:
        raise output_error(target, cause) from cause
    return Fetched(target, manifest.digest, manifest.size, link.transferred)


class _Link:
    """The source, counting the bytes that come from it."""

    def __init__(self, read: Read, source: str) -> None:
        self._read = read
        self._source = source
        self.transferred = 0

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes | None:
        data = self._read(name, start, size)
        self.transferred += len(data or b"")
        return data

    def small_file(self, stage: Path, name: str, required: bool = True) -> Path:
        data = self.read(name)
        path = safe_join(stage, name)
        if data is None or len(data) > _SMALL:
            path.unlink(missing_ok=True)
            if required:
                raise BundleError(f"{self._source} has no {name}; give the place of an exported bundle")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def manifest(self, stage: Path) -> Manifest:
        self.small_file(stage, bundle.MANIFEST)
        return bundle.read(stage)

    def index(self, stage: Path, manifest: Manifest) -> Mapping[str, tuple[Chunk, ...]]:
        entry = manifest.files.get(chunks.INDEX)
        if entry is None:
            return {}
        path = self.small_file(stage, chunks.INDEX)
        if sha256_file(path) != entry.sha256:
            raise BundleError(f"{self._source}/{chunks.INDEX} isn't what the manifest lists; fetch it again")
        return chunks.read_index(path)


def _reader(source: str) -> Read:
    if urllib.parse.urlsplit(source).scheme in ("http", "https"):
        return _http_reader(source.rstrip("/"))
    folder = Path(source)

    def read(name: str, start: int, size: int | None) -> bytes | None:
        path = safe_join(folder, name)
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(-1 if size is None else size)

    return read


def _http_reader(base: str) -> Read:
    def read(name: str, start: int, size: int | None) -> bytes | None:
        request = urllib.request.Request(f"{base}/{urllib.parse.quote(name)}")
        if size is not None:
            request.add_header("Range", f"bytes={start}-{start + size - 1}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                if size is None:
                    return bytes(answer.read(_SMALL + 1))
                if answer.status != 206:  # a server without ranges sends the whole file
                    answer.read(start)
                return bytes(answer.read(size))
        except urllib.error.HTTPError as cause:
            if cause.code == 404:
                return None
            raise BundleError(f"{base}/{name} answers {cause.code} {cause.reason}; try again later") from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as cause:
            raise BundleError(f"{base} doesn't answer ({cause}); run again to go on from here") from None

    return read


# sha256 of a chunk -> (file, start) on this device
_Local = Mapping[str, tuple[Path, int]]


def _local_chunks(have: Path | None, stage: Path, index: Mapping[str, tuple[Chunk, ...]]) -> _Local:
    """Where chunks lie on this device: in the older bundle, and in what an interrupted fetch left."""
    found: dict[str, tuple[Path, int]] = {}
    if have is not None:
        older = have / chunks.INDEX
        listed = chunks.read_index(older) if older.is_file() else {}
        names = listed or {name: tuple(chunks.split(have / name)) for name in bundle.read(have).files}
        for name, pieces in names.items():
            for piece in pieces:
                found[piece.sha256] = (safe_join(have, name), piece.start)
    for name, pieces in index.items():
        if (left := safe_join(stage, name)).is_file():
            for piece in pieces:
                found.setdefault(piece.sha256, (left, piece.start))
    return found


def _bring(
    stage: Path, name: str, entry: FileEntry, pieces: tuple[Chunk, ...] | None, local: _Local, link: _Link
) -> None:
    """Write one file of the bundle into the stage, unless it's there already and sound."""
    path = safe_join(stage, name)
    if path.is_file() and path.stat().st_size == entry.size and sha256_file(path) == entry.sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if pieces is None or sum(piece.size for piece in pieces) != entry.size:
        pieces = tuple(
            Chunk(start, min(_MOST_AT_ONCE, entry.size - start), "")
            for start in range(0, entry.size, _MOST_AT_ONCE)
        )
    with path.open("r+b" if path.exists() else "w+b") as stream:
        missing = []
        for piece in pieces:
            data = _from_device(piece, local)
            if data is None:
                missing.append(piece)
            else:
                stream.seek(piece.start)
                stream.write(data)
        for run in _runs(missing):
            start, size = run[0].start, sum(piece.size for piece in run)
            data = link.read(name, start, size)
            if data is None or len(data) != size:
                raise BundleError(f"{name} ends early at the source; run again, or publish the bundle again")
            _check_run(name, run, data)
            stream.seek(start)
            stream.write(data)
        stream.truncate(entry.size)
    if sha256_file(path) != entry.sha256:
        path.unlink()
        raise BundleError(f"{name} arrived damaged: its SHA-256 isn't the manifest's; run again")


def _from_device(piece: Chunk, local: _Local) -> bytes | None:
    where = local.get(piece.sha256)
    if where is None:
        return None
    try:
        with where[0].open("rb") as stream:
            stream.seek(where[1])
            data = stream.read(piece.size)
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == piece.sha256 else None


def _runs(pieces: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Neighbouring chunks together, up to what one request should carry."""
    run: list[Chunk] = []
    for piece in pieces:
        size = sum(one.size for one in run)
        if run and (run[-1].start + run[-1].size != piece.start or size + piece.size > _MOST_AT_ONCE):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _check_run(name: str, run: list[Chunk], data: bytes) -> None:
    for piece in run:
        part = data[piece.start - run[0].start :][: piece.size]
        if piece.sha256 and hashlib.sha256(part).hexdigest() != piece.sha256:
            raise BundleError(f"{name} at byte {piece.start} arrived damaged; run again to go on from here")


def _drop_strays(stage: Path, manifest: Manifest) -> None:
    """Remove what an interrupted fetch of another version left in the stage."""
    keep = {*manifest.files, bundle.MANIFEST, bundle.SIGNATURE}
    for path in sorted(stage.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(stage).as_posix() not in keep:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)
