"""Who may ask, and how much: API keys, the host that a browser thinks it talks to, the length of a body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from vera_edge.serving.fields import parse
from vera_edge.serving.refusal import RefusedRequestError

_BODY_SECONDS = 60.0  # for a body to arrive
T = TypeVar("T")


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_caller(request: Request, api_key: str | None) -> None:
    """Raise RefusedRequestError (401) without the key; (403), where there is none, when a web page asks.

    A page in a browser on this machine reaches loopback too, by a name that it has made to lead here or
    straight away; either way its requests carry a host or an origin that isn't this machine's.
    """
    if api_key is not None:
        given = request.headers.get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), api_key.encode()):
            raise RefusedRequestError(
                401,
                "send the server's API key as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return
    origin = request.headers.get("origin")
    if not _is_local(f"//{request.headers.get('host', '')}") or not (origin is None or _is_local(origin)):
        raise RefusedRequestError(
            403, "without an API key only this machine is answered, under its own name; start with a key"
        )


def _is_local(address: str) -> bool:
    try:
        return is_loopback(urlsplit(address).hostname or "")
    except ValueError:
        return False


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises RefusedRequestError: 413 over `most` bytes, 408 when it doesn't arrive, 400 when it isn't JSON.
    """
    too_long = RefusedRequestError(413, f"the body is over {most} bytes; send less", code="body_too_large")
    said = request.headers.get("content-length", "0")
    if len(said) > 18 or not said.isascii() or not said.isdecimal() or int(said) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise RefusedRequestError(408, f"the body didn't arrive in {_BODY_SECONDS:g} s") from None
    return parse(bytes(body))


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: then ClientDisconnect is raised.

    For after the body was read.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        await _cancel(doing, gone)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
