"""The response to a request for text: its pieces as they come, whole or as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from vera_edge.errors import VeraEdgeError
from vera_edge.serving import answers, refusal
from vera_edge.serving.answers import Shape
from vera_edge.serving.guard import while_connected
from vera_edge.serving.job import AnswerPiece
from vera_edge.serving.refusal import RefusedRequestError

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the events together
]
Outbox = asyncio.Queue[AnswerPiece | VeraEdgeError]


class TextResponse:
    """An ASGI response that ends with the answer, with an error, with the time, or with the client.

    A reader who is slower than the model keeps no row: the pieces wait, at most as many as the answer may
    have tokens, and `end`, which gives the request's place back, is called once they are sent.
    """

    def __init__(
        self,
        outbox: Outbox,
        shape: Shape,
        stream: bool,
        include_usage: bool,
        deadline: float,
        end: Callable[[], None],
    ) -> None:
        """deadline: by the loop's clock."""
        self._outbox, self._shape = outbox, shape
        self._stream, self._include_usage = stream, include_usage
        self._deadline, self._end = deadline, end
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        except ClientDisconnect:
            pass
        except TimeoutError:
            late = RefusedRequestError(
                504, "the answer took longer than this server's time-out", code="timeout"
            )
            await self._fail(late, scope, receive, send)
        except asyncio.CancelledError:  # the server's end is the only one who cancels
            await self._fail(RefusedRequestError(503, "the server ends"), scope, receive, send)
        except VeraEdgeError as error:
            await self._fail(refusal.of(error), scope, receive, send)
        finally:
            self._end()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with asyncio.timeout_at(self._deadline):
            if self._stream:
                await while_connected(request, self._send_events(send))
                return
            pieces = await while_connected(request, self._collect())
        await JSONResponse(self._shape.whole(pieces))(scope, receive, send)

    async def _collect(self) -> list[AnswerPiece]:
        return [piece async for piece in self._pieces()]

    async def _pieces(self) -> AsyncIterator[AnswerPiece]:
        """Until the last; raises what the engine delivered as an error."""
        while True:
            piece = await self._outbox.get()
            if isinstance(piece, VeraEdgeError):
                raise piece
            yield piece
            if piece.finish is not None:
                return

    async def _send_events(self, send: Send) -> None:
        """The status is sent with the first piece, so that what fails before it has a status of its own."""
        generated = 0
        async for piece in self._pieces():
            generated = piece.generated
            events = [*(self._shape.opening() if not self._started else ()), self._shape.chunk(piece)]
            if self._include_usage:
                events = [each | {"usage": None} for each in events]
            await self._write(send, b"".join(map(answers.event, events)))
        last = answers.event(self._shape.usage(generated)) if self._include_usage else b""
        await self._write(send, last + answers.DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _fail(self, error: RefusedRequestError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            body = answers.failed(error) + answers.DONE
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
