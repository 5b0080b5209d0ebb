"""Fetching a bundle: over real HTTP with and without ranges, from an older version, interrupted, damaged."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from vera_edge.bundle import chunks
from vera_edge.bundle import contents as bundle
from vera_edge.device.deploy.fetch import fetch
from vera_edge.errors import BundleError, OutputError

BIG = 3_000_000


class Plain(SimpleHTTPRequestHandler):
    """The standard library's server: no ranges. Counts the bytes of bodies it sends."""

    sent = 0
    broken_after: int | None = None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        data = source.read()  # type: ignore[attr-defined]
        self.send_body(data)

    def send_body(self, data: bytes) -> None:
        kind = type(self)
        if kind.broken_after is not None and kind.sent + len(data) > kind.broken_after:
            self.close_connection = True
            return
        kind.sent += len(data)
        self.wfile.write(data)


class Ranged(Plain):
    """The same with byte ranges, as nginx and the Hub answer them."""

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        path = Path(self.translate_path(self.path))
        if match is None or not path.is_file():
            super().do_GET()
            return
        start, end = int(match[1]), int(match[2])
        data = path.read_bytes()[start : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.send_body(data)


@contextmanager
def serve(
    folder: Path, kind: type[Plain], broken_after: int | None = None
) -> Iterator[tuple[str, type[Plain]]]:
    handler = type("Handler", (kind,), {"sent": 0, "broken_after": broken_after})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


def make_bundle(folder: Path, weights: bytes, adapter: bytes = b"vectors") -> Path:
    (folder / "onnx").mkdir(parents=True)
    (folder / "adapters").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    (folder / "onnx" / "model.onnx_data").write_bytes(weights)
    (folder / "adapters" / "default.onnx_adapter").write_bytes(adapter)
    names = ["onnx/model.onnx", "onnx/model.onnx_data", "adapters/default.onnx_adapter"]
    (folder / chunks.INDEX).write_bytes(chunks.index({name: chunks.split(folder / name) for name in names}))
    entry = {"digest": "0" * 64, "file": "adapters/default.onnx_adapter"}
    facts = bundle.Facts(
        kind="decoder", mode="branch", weights="nf4", base={"digest": "0" * 64}, adapters={"default": entry}
    )
    bundle.write(folder, facts)
    return folder


@pytest.fixture
def weights() -> bytes:
    return np.random.RandomState(0).bytes(BIG)


def same(left: Path, right: Path) -> bool:
    def files(top: Path) -> dict[str, bytes]:
        return {
            path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file()
        }

    return files(left) == files(right)


@pytest.mark.parametrize("kind", [Plain, Ranged])
def test_fetch_over_http(tmp_path: Path, weights: bytes, kind: type[Plain]) -> None:
    source = make_bundle(tmp_path / "source", weights)
    with serve(source, kind) as (url, _):
        fetched = fetch(url, tmp_path / "target")
    assert same(source, tmp_path / "target")
    assert fetched.digest == bundle.read(source).digest


def test_an_update_carries_the_adapter_and_not_the_weights(tmp_path: Path, weights: bytes) -> None:
    old = make_bundle(tmp_path / "old", weights)
    new = make_bundle(tmp_path / "new", weights, b"better vectors")
    with serve(new, Ranged) as (url, handler):
        fetched = fetch(url, tmp_path / "target", have=old)
    assert same(new, tmp_path / "target")
    assert fetched.transferred < 20_000
    assert handler.sent < 20_000


def test_an_edit_in_the_weights_carries_the_chunks_near_it(tmp_path: Path, weights: bytes) -> None:
    old = make_bundle(tmp_path / "old", weights)
    new = make_bundle(tmp_path / "new", weights[:1_000_000] + b"edit" + weights[1_000_000:])
    fetched = fetch(str(new), tmp_path / "target", have=old)
    assert same(new, tmp_path / "target")
    assert fetched.transferred < 4 * chunks.MAXIMUM + 20_000


def test_an_interrupted_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "source", np.random.RandomState(1).bytes(20_000_000))
    with serve(source, Ranged, broken_after=12_000_000) as (url, _), pytest.raises(BundleError):
        fetch(url, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    with serve(source, Ranged) as (url, handler):
        fetch(url, tmp_path / "target")
    assert same(source, tmp_path / "target")
    assert handler.sent < 20_000_000
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_damage_on_the_way_is_found(tmp_path: Path, weights: bytes) -> None:
    source = make_bundle(tmp_path / "source", weights)
    data = bytearray(weights)
    data[1_234_567] ^= 1
    (source / "onnx" / "model.onnx_data").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx_data at byte \d+ arrived damaged"):
        fetch(str(source), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_refusals(tmp_path: Path, weights: bytes) -> None:
    source = make_bundle(tmp_path / "source", weights)
    with pytest.raises(BundleError, match=r"has no vera_edge\.json"):
        fetch(str(tmp_path), tmp_path / "target")
    with pytest.raises(BundleError, match="doesn't answer"):
        fetch("http://127.0.0.1:9", tmp_path / "target")
    fetch(str(source), tmp_path / "target")
    with pytest.raises(OutputError, match="--force"):
        fetch(str(source), tmp_path / "target")
    with pytest.raises(OutputError, match="would delete"):
        fetch(str(source), tmp_path / "target", tmp_path / "target", force=True)
