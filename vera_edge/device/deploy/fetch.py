"""Fetch a bundle over a slow link: only the chunks that no older version on this device has, and resumable.

The source is a folder or any static HTTP server that holds the bundle's files as they are (the Hugging Face
Hub's `resolve` URLs, nginx, `python -m http.server`). Byte ranges are used where the server has them; from
one that hasn't, a file of which anything is missing is read once, up to its last missing chunk.
Nothing that comes over the link is used before its SHA-256 was compared, and the target appears only whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vera_edge.bundle import chunks
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.chunks import Chunk
from vera_edge.bundle.contents import FileEntry, Manifest
from vera_edge.device.deploy.source import Answer, Source, source_of
from vera_edge.errors import BundleError
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import (
    PARTIAL_MARK,
    check_output,
    commit_folder,
    make_folder,
    output_error,
    safe_join,
    settle,
    sha256_file,
)
from vera_edge.storage.lock import exclusive

_MOST_AT_ONCE = 8 << 20  # bytes in one range request
_BLOCK = 1 << 18  # bytes held in memory
_SMALL = 32 << 20  # no manifest, index or signature is larger


@dataclass(frozen=True)
class Fetched:
    """What a fetch did: the bundle's digest, its size, and how many bytes came over the link (in bytes)."""

    folder: Path
    digest: str
    size: int
    transferred: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**vars(self), "folder": str(self.folder)}


def fetch(
    source: str,
    target: Path,
    have: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    accept: Callable[[Path], None] | None = None,
) -> Fetched:
    """Bring the bundle at `source` (folder or URL) to `target`, taking from `have` what it already holds.

    An interrupted fetch leaves `.<target>.partial-fetch` beside the target, and the same call goes on from
    it. accept: called with the folder once it is complete and verified; what it raises keeps the target from
    appearing. Raises BundleError when the source isn't a sound bundle or doesn't answer, OutputError when the
    target can't be written, or another fetch into it is at work.
    """
    check_output(target, force, [path for path in (Path(source), have) if path is not None])
    link = _Link(source_of(source))
    place = target.absolute().with_name(f".{target.absolute().name}{PARTIAL_MARK}fetch")
    make_folder(place)
    try:
        with exclusive(place / "lock", f"fetch into {target}"):
            settle(target.absolute())
            check_output(target, force)
            stage = place / "files"
            manifest = _receive(link, stage, have, progress)
            if accept is not None:
                accept(stage)
            commit_folder(stage, target.absolute())
            shutil.rmtree(place, ignore_errors=True)
    except OSError as cause:
        raise output_error(target, cause) from cause
    return Fetched(target, manifest.digest, manifest.size, link.transferred)


def _receive(link: _Link, stage: Path, have: Path | None, progress: Progress) -> Manifest:
    """Make `stage` the bundle, from what is there already, in `have`, and at the other end of the link."""
    stage.mkdir(exist_ok=True)
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
    return manifest


class _Link:
    """The source, counting the bytes that come from it, used or not."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.transferred = 0

    def small_file(self, stage: Path, name: str, required: bool = True) -> Path:
        path = safe_join(stage, name)
        with self._source.open(name) as answer:
            data = None if answer is None else b"".join(self._blocks(answer, _SMALL + 1))
        if data is None or len(data) > _SMALL:
            path.unlink(missing_ok=True)
            if required:
                raise BundleError(f"{self._source.name} has no {name}; give the place of an exported bundle")
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
            raise BundleError(
                f"{self._source.name}/{chunks.INDEX} isn't what the manifest lists; fetch it again"
            )
        return chunks.read_index(path)

    def chunks(self, name: str, pieces: Sequence[Chunk], stream: BinaryIO) -> None:
        """Write `pieces` of the file `name`, which are in order, to their places in `stream`."""
        while pieces:
            run = _run(pieces)
            start = run[0].start
            with self._source.open(name, start, run[-1].start + run[-1].size - start) as answer:
                if answer is None:
                    raise BundleError(f"{name} is gone from {self._source.name}; publish the bundle again")
                asked = pieces if answer.whole else run
                self._take(name, asked, answer, stream)
            pieces = pieces[len(asked) :]

    def _take(self, name: str, pieces: Sequence[Chunk], answer: Answer, stream: BinaryIO) -> None:
        at = answer.start
        for piece in pieces:
            for _ in self._blocks(answer, piece.start - at):
                pass  # on this device already, and sent by a server without ranges
            digest, stream_at, size = hashlib.sha256(), stream.seek(piece.start), 0
            for block in self._blocks(answer, piece.size):
                digest.update(block)
                size += stream.write(block)
            at = stream_at + size
            if size != piece.size:
                raise BundleError(f"{name} ends early at the source; run again, or publish the bundle again")
            if piece.sha256 and digest.hexdigest() != piece.sha256:
                raise BundleError(f"{name} at byte {stream_at} arrived damaged; run again to go on from here")

    def _blocks(self, answer: Answer, size: int) -> Iterator[bytes]:
        """Up to `size` bytes of an answer, less where it ends."""
        while size and (block := answer.stream.read(min(size, _BLOCK))):
            size -= len(block)
            self.transferred += len(block)
            yield block


def _run(pieces: Sequence[Chunk]) -> Sequence[Chunk]:
    """Those of the first pieces that are neighbours, up to what one request should carry."""
    size, end = 0, pieces[0].start
    for count, piece in enumerate(pieces):
        if count and (piece.start != end or size + piece.size > _MOST_AT_ONCE):
            return pieces[:count]
        size, end = size + piece.size, piece.start + piece.size
    return pieces


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
        link.chunks(name, missing, stream)
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


def _drop_strays(stage: Path, manifest: Manifest) -> None:
    """Remove what an interrupted fetch of another version left in the stage."""
    keep = {*manifest.files, bundle.MANIFEST, bundle.SIGNATURE}
    for path in sorted(stage.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(stage).as_posix() not in keep:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)
