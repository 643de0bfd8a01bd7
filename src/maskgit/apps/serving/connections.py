"""Connections that do nothing are closed, and there are only so many of them: uvicorn's protocols, with an end."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

# Seconds in which a request's head must have come, from the connection's beginning or the answer before, and in which
# a client must take what was sent to it.
HEAD_SECONDS, TAKE_SECONDS = 15.0, 60.0
MAX_CONNECTIONS = 512
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
)


class Patient(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """A connection of one client."""

    head_seconds, take_seconds, max_connections = HEAD_SECONDS, TAKE_SECONDS, MAX_CONNECTIONS
    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.write(_FULL)
            transport.close()
        else:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        # What a client does not take stays in memory.
        self._taking = self.loop.call_later(self.take_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()

    def _wait_for_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(self.head_seconds, self._end_if_idle)

    def _end_if_idle(self) -> None:
        # A request is under way from its whole head to its whole answer; bodies have a time of their own.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
