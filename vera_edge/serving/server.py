"""The port that is listened on, and the end of the server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from vera_edge.device.runtime.encoder import CLASSES, Encoder
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, PlanError
from vera_edge.progress import Tell
from vera_edge.serving.app import App
from vera_edge.serving.connection import BoundedConnection
from vera_edge.serving.guard import is_loopback
from vera_edge.serving.models import Models
from vera_edge.serving.settings import Settings

_GRACE = 5  # seconds for answers to end once the server is to
_SPARE = 64  # connections beside those of requests that are answered or wait


def listen(host: str, port: int, api_key: str | None) -> socket.socket:
    """A socket that listens on `port` of `host`; 0 is a free one.

    Raises PlanError when the port is in use or can't be had, or when others could ask without a key.
    """
    if not 0 <= port < 1 << 16:
        raise PlanError(f"port {port} is none; give one from 0 (a free one) to 65535")
    if api_key is None and not is_loopback(host):
        raise PlanError(
            f"{host} is reached by others than this machine, so an API key is needed: give --api-key-file, "
            "or VERA_EDGE_API_KEY in the environment"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=128)
    except OSError as cause:
        if cause.errno == errno.EADDRINUSE:
            raise PlanError(f"port {port} of {host} is in use; choose another with --port") from None
        raise PlanError(f"port {port} of {host} can't be listened on: {cause.strerror}") from None
    return listening


def address(listening: socket.socket) -> str:
    """The URL that clients take as their base, without a slash at the end."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def model_name(folder: Path) -> str:
    """What a bundle is called: its folder, or where it's installed if that is the link `current`."""
    folder = folder.absolute()
    return folder.parent.name if folder.name == "current" else folder.name


def run(
    opened: Session | Encoder, name: str, listening: socket.socket, settings: Settings, tell: Tell
) -> None:
    """Serve until the process is told to end. Raises BundleError for what the protocol has no request for."""
    if isinstance(opened, Encoder) and opened.gives == CLASSES:
        raise BundleError(
            f"{opened.manifest.folder} gives classes, which OpenAI's protocol has no request for"
        )
    names = Models(opened, name)
    app = App(opened, names, settings)
    config = uvicorn.Config(
        _until_the_end(app.asgi),
        http=BoundedConnection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
        limit_concurrency=2 * settings.open + _SPARE,
    )
    app.start()
    try:
        if threading.current_thread() is threading.main_thread():
            # A shell that starts it in the background has it ignore Ctrl-C, and uvicorn listens later.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # from the moment that it's said to be there
            tell(f"serving {', '.join(each.name for each in names)} on {address(listening)}")
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        app.stop()


def _until_the_end(app: ASGIApp) -> ASGIApp:
    """The app, whose requests end in silence where the server's end cancels them."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return quiet
