"""A client's connection, which neither half of a request nor a client that doesn't read holds for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0  # for the head of a request to arrive once it began, and for the first to begin
WRITE_SECONDS = 60.0  # that a client may leave what was sent to it unread


class BoundedConnection(H11Protocol):
    """uvicorn's connection with two time-outs more; where one passes the connection is cut off."""

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not waiting:
            _end(self._reading)
            self._reading = None
        elif self._reading is None:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        _end(self._writing)
        self._writing = self._later(WRITE_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        _end(self._writing)

    def connection_lost(self, exc: Exception | None) -> None:
        _end(self._reading)
        _end(self._writing)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._reading = self._later(HEADER_SECONDS)

    def _later(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.transport.abort)


def _end(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
