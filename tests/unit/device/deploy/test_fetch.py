"""Fetching a bundle: over real HTTP with and without ranges, from an older version, interrupted, damaged."""

from __future__ import annotations

import re
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
            data = data[: kind.broken_after - kind.sent]
            self.close_connection = True
        kind.sent += len(data)
        with suppress(ConnectionError):  # who has what it wants may hang up
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
    facts = bundle.ManifestFields(
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


def test_a_server_without_ranges_sends_each_byte_once(tmp_path: Path) -> None:
    """And what came over the link is what is told, whether it was of use or not."""
    data = np.random.RandomState(2).bytes(40_000_000)
    source = make_bundle(tmp_path / "source", data)
    with serve(source, Plain) as (url, handler):
        tracemalloc.start()
        fetched = fetch(url, tmp_path / "target")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert same(source, tmp_path / "target")
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    assert handler.sent == fetched.transferred == size
    assert peak < 2 * len(data)  # the server's thread reads the file whole; the client must not


def test_an_edit_costs_a_server_without_ranges_the_file_once(tmp_path: Path, weights: bytes) -> None:
    old = make_bundle(tmp_path / "old", weights)
    new = make_bundle(tmp_path / "new", weights[:1_000_000] + b"edit" + weights[1_000_000:])
    with serve(new, Plain) as (url, handler):
        fetched = fetch(url, tmp_path / "target", have=old)
    assert same(new, tmp_path / "target")
    assert fetched.transferred <= handler.sent <= BIG + 100_000


@pytest.mark.parametrize("kind", [Plain, Ranged])
def test_a_link_that_breaks_leaves_what_arrived(tmp_path: Path, kind: type[Plain]) -> None:
    """In the midst of a chunk, with fewer bytes than were announced."""
    source = make_bundle(tmp_path / "source", np.random.RandomState(3).bytes(20_000_000))
    with (
        serve(source, kind, broken_after=11_111_111) as (url, _),
        pytest.raises(BundleError, match="run again to go on"),
    ):
        fetch(url, tmp_path / "target")
    left = tmp_path / ".target.partial-fetch" / "files" / "onnx" / "model.onnx_data"
    assert left.stat().st_size > 10_000_000
    with serve(source, Ranged) as (url, handler):
        fetch(url, tmp_path / "target")
    assert same(source, tmp_path / "target") and handler.sent < 20_000_000 - 10_000_000 + chunks.MAXIMUM


def test_what_a_kill_left_of_a_replaced_target_is_not_lost(tmp_path: Path) -> None:
    """It stands again under its name, and is replaced when that is asked for."""
    source = make_bundle(tmp_path / "source", b"new" * 1000)
    old = tmp_path / ".target.partial-old-7"
    old.mkdir()
    (old / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="isn't empty"):
        fetch(str(source), tmp_path / "target")
    assert (tmp_path / "target" / "mine.txt").read_text() == "keep"
    fetch(str(source), tmp_path / "target", force=True)
    assert same(source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def answering(*answers: bytes) -> tuple[str, threading.Thread]:
    """A server that gives each connection the next of these, as they are, and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve_all() -> None:
        with server:
            for answer in answers:
                connection, _ = server.accept()
                with connection, suppress(ConnectionError):
                    connection.recv(1 << 16)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve_all, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{server.getsockname()[1]}", thread


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "doesn't answer"),
        (b"", "doesn't answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "broke"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{}", "broke"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}", "broke"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n{}", "doesn't answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n{}", "doesn't answer"),
        (b"HTTP/1.1 500 Out of\x1b[31m order\r\n\r\n", "answers 500"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "answers 302"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n", "doesn't answer"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", r"has no vera_edge\.json"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "isn't valid JSON"),
    ],
)
def test_whatever_a_server_says_is_one_sentence(tmp_path: Path, answer: bytes, says: str) -> None:
    url, _ = answering(answer, answer)
    with pytest.raises(BundleError, match=says) as refusal:
        fetch(url, tmp_path / "target")
    assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "address",
    ["http://host:99x", "http://a b/c", "http://", "http://[::1", "http://host:999999", "ftp://host/x"],
)
def test_what_is_no_address_is_said(tmp_path: Path, address: str) -> None:
    with pytest.raises(BundleError, match="address"):
        fetch(address, tmp_path / "target")
    assert not any(tmp_path.iterdir())


def test_two_fetches_into_one_place_are_kept_apart(tmp_path: Path, weights: bytes) -> None:
    source = make_bundle(tmp_path / "source", weights)
    refused: list[pytest.ExceptionInfo[OutputError]] = []

    def second(what: str, done: int, total: int) -> None:
        if not refused:
            with pytest.raises(OutputError, match="another fetch into") as refusal:
                fetch(str(source), tmp_path / "target")
            refused.append(refusal)

    fetch(str(source), tmp_path / "target", progress=second)
    assert refused and same(source, tmp_path / "target")


def test_what_a_fetch_refuses_does_not_appear(tmp_path: Path, weights: bytes) -> None:
    def accept(folder: Path) -> None:
        assert bundle.verify(folder).digest == bundle.read(source).digest
        raise BundleError("not signed")

    source = make_bundle(tmp_path / "source", weights)
    with pytest.raises(BundleError, match="not signed"):
        fetch(str(source), tmp_path / "target", accept=accept)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"302 Found\r\nLocation: /x\r\nContent-Length: 90071992547409930", "redirect"),
        (b"302 Found\r\nLocation: ftp://127.0.0.1/x\r\nContent-Length: 0", "no address of http|not allowed"),
    ],
)
def test_a_redirect_is_neither_read_whole_nor_followed_to_another_protocol(
    head: bytes, said: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    link, _ = server.accept()
                    with link:
                        link.recv(1 << 16)
                        link.sendall(b"HTTP/1.1 " + head + b"\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(BundleError, match=said):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path / "got")
