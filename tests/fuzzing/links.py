"""What a server answers to a fetch: one answer is strange, the others are right."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzzing import graphs
from tests.fuzzing.mutate import Form
from tests.fuzzing.target import Seed, Target
from vera_edge.bundle import chunks, contents
from vera_edge.device.deploy.fetch import fetch

_FILES = {"onnx/model.onnx": b"graph", "onnx/model.onnx_data": bytes(range(256)) * 300}
_ASKED = re.compile(rb"GET /(\S+) HTTP")
_RANGE = re.compile(rb"Range: bytes=(\d+)-(\d+)", re.IGNORECASE)


@cache
def _bundle() -> Path:
    folder = graphs.scratch() / "published"
    for name, data in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / chunks.INDEX).write_bytes(chunks.index({n: chunks.split(folder / n) for n in _FILES}))
    facts = contents.ManifestFields(kind="decoder", mode="merged", weights="fp32", base={"digest": "0" * 64})
    contents.write(folder, facts)
    return folder


class _Server:
    """Answers every request for `file` with `answer`, byte for byte, and others as they should be."""

    def __init__(self) -> None:
        self.file, self.answer = b"", b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            link, _ = self._socket.accept()
            with link:
                try:
                    link.settimeout(5)
                    self._one(link)
                except OSError:
                    pass  # who has what it wants may hang up

    def _one(self, link: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            piece = link.recv(1 << 16)
            if not piece:
                return
            request += piece
        asked = _ASKED.match(request)
        name = asked[1] if asked else b""
        link.sendall(self.answer if name == self.file else _right(name.decode("latin-1"), request))
        link.shutdown(socket.SHUT_WR)


def _right(name: str, request: bytes) -> bytes:
    path = _bundle() / name
    if ".." in name or not path.is_file():
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    data, wanted = path.read_bytes(), _RANGE.search(request)
    if wanted is None:
        return _answer(b"200 OK", b"", data)
    start, end = int(wanted[1]), int(wanted[2])
    part = b"Content-Range: bytes %d-%d/%d\r\n" % (start, end, len(data))
    return _answer(b"206 Partial Content", part, data[start : end + 1])


def _answer(status: bytes, headers: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, headers, len(body))
    return head + body


@cache
def _server() -> _Server:
    # The strange answers may name any host, and nothing is to leave this machine.
    os.environ["no_proxy"] = "*"
    ask: Any = socket.getaddrinfo

    def at_home(host: Any, *more: Any, **named: Any) -> Any:
        if host != "127.0.0.1":
            raise socket.gaierror(f"no such host: {host!r}"[:200])
        return ask(host, *more, **named)

    socket.getaddrinfo = at_home
    return _Server()


def _seeds() -> list[Seed]:
    found = []
    for name in (contents.MANIFEST, chunks.INDEX, "onnx/model.onnx_data"):
        data = (_bundle() / name).read_bytes()
        size = b"Content-Range: bytes 0-%d/%d\r\n" % (len(data) - 1, len(data))
        body = b"".join(b"%x\r\n%s\r\n" % (len(data[at : at + 9999]), data[at : at + 9999]) for at in (0,))
        found += [
            Seed(_answer(b"200 OK", b"Server: x\r\nContent-Type: application/json\r\n", data), name),
            Seed(_answer(b"206 Partial Content", size, data), name),
            Seed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n", name),
            Seed(b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n", name),
            Seed(b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n", name),
            Seed(b"HTTP/1.0 200 OK\r\n\r\n" + data, name),
        ]
    return found


def _read(seed: Seed, folder: Path) -> object:
    server = _server()
    server.file, server.answer = seed.beside.encode(), seed.data
    try:
        return fetch(f"http://127.0.0.1:{server.port}", folder / "got")
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path)


_WORDS = (
    "Content-Length: ", "Transfer-Encoding: chunked", "Content-Encoding: gzip", "206", "204", "304",
    "100", "500", "301", "Location: ", "http://[::1", "file:///etc/passwd", "//x/y", "\r\n", "\r\n\r\n",
    "\n", "HTTP/9.9", "bytes 5-", "Connection: keep-alive", "ftp://x/",
)  # fmt: skip
TARGETS = (Target("http-answers", Form.HTTP, _seeds, _read, words=_WORDS),)
