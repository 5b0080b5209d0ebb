"""Connections that send half a request, or read nothing, are cut off; others aren't."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from vera_edge.serving import connection
from vera_edge.serving.connection import BoundedConnection

_MOST = 64 << 20  # bytes, more than any system keeps for a socket


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """Answer /small at once, and anything else with more than the client can be made to hold."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(0 if scope["path"] == "/small" else _MOST >> 16):
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
    await send({"type": "http.response.body", "body": b"end", "more_body": False})


@contextmanager
def listening() -> Iterator[int]:
    """A server on a thread of its own; its port."""
    config = uvicorn.Config(flood, http=BoundedConnection, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield taken.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def is_cut_off(wire: socket.socket) -> bool:
    """Whether the other side ends the connection within a while."""
    wire.settimeout(30)
    with contextlib.suppress(ConnectionResetError):
        while wire.recv(1 << 20):
            pass
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /small HTTP/1.1\r\nHost: x\r\n\r\nGET /small HT"])
def test_half_of_a_request_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    with listening() as port, socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(sent)
        assert is_cut_off(wire)


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.3)
    with listening() as port, socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(3)
        read = 0
        with contextlib.suppress(ConnectionResetError):
            while part := wire.recv(1 << 20):
                read += len(part)
        assert read < _MOST


def test_one_that_reads_gets_all_of_it_and_may_ask_again() -> None:
    with listening() as port:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(2):
            client.request("GET", "/small")
            assert client.getresponse().read() == b"end"
        client.request("GET", "/")
        assert len(client.getresponse().read()) == _MOST + 3
        client.close()
