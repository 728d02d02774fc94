"""Connections of uvicorn that bound how long clients may send nothing, and read nothing. Imports uvicorn.

uvicorn has no public way to find idle connections, nor to refuse pings. This module holds all uses of its protocols
beyond asyncio's interface; a test lists the attributes, and names one that an upgrade has removed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import weakref

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from events.log import PlainRecords
from sinks.connections import EXHAUSTED, REQUEST_S, ClientFaults, RatedWarning, address_group
from sinks.live.bounds import LEAST_BYTES_PER_S, PART_BYTES

_CLOSING_S = 10.0
"""Maximum seconds per close: a connection whose client does not read would never close."""
_MOST_BUFFERED = 2 * PART_BYTES
"""Maximum unread bytes per connection when it closes, or when its client pings."""


def _make_log() -> logging.Logger:
    log = logging.getLogger("uvicorn.error.stagecast")  # handlers and level are the host's
    if not log.filters:
        log.addFilter(ClientFaults())
        log.addFilter(PlainRecords())
    return log


class HttpConnection(H11Protocol):
    """One HTTP connection."""

    waiting_since = 0.0
    """Time of the accept, or of the last complete response."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self.logger = _make_log()
        self.waiting_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Give the client time for a long body, as long as it arrives."""
        if self.cycle is not None and self.cycle.more_body:
            self.waiting_since += len(data) / LEAST_BYTES_PER_S
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.waiting_since = time.monotonic()
        super().on_response_complete()

    @property
    def is_waiting(self) -> bool:
        """Whether the client has not sent a complete request, with its body, since the last response."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    @property
    def is_closing(self) -> bool:
        """Whether the server closes it."""
        return self.transport.is_closing()


class WebSocketConnection(WebSocketsSansIOProtocol):
    """One WebSocket."""

    waiting_since = 0.0
    """Time of the upgrade."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.logger = _make_log()
        self.waiting_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Abort a handshake that was refused without a response, for example with too many headers."""
        super().data_received(data)
        # `handshake_exc` is public, of `websockets.server.ServerProtocol`.
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.abort()

    def handle_ping(self) -> None:
        """Answer a ping; abort a client that does not read, or its pongs would fill the memory."""
        if self.transport.get_write_buffer_size() > _MOST_BUFFERED:
            self.transport.abort()
            return
        super().handle_ping()

    def handle_close(self, event: Frame) -> None:
        """Close; abort a client with many unread bytes, which would stay in memory."""
        if not self.close_sent and self.transport.get_write_buffer_size() > _MOST_BUFFERED:
            self.transport.abort()
        super().handle_close(event)

    @property
    def is_waiting(self) -> bool:
        """Whether the handshake is not complete."""
        return not self.handshake_complete

    @property
    def is_closing(self) -> bool:
        """Whether the server closes it, or has sent a close frame."""
        return self.close_sent or self.transport.is_closing()


Connection = HttpConnection | WebSocketConnection


class StrictServer(uvicorn.Server):
    """Aborts connections whose clients neither send nor read in time."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._closing: weakref.WeakKeyDictionary[object, float] = weakref.WeakKeyDictionary()
        self._evicted: Connection | None = None
        self._exhausted = RatedWarning("the page's server cannot accept a connection: ")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        await super().startup(sockets)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in EXHAUSTED and "socket" in context:
            self._exhausted(str(error))
        else:
            loop.default_exception_handler(context)

    async def on_tick(self, counter: int) -> bool:
        """Abort stuck connections. uvicorn calls it ten times a second."""
        now = time.monotonic()
        for connection in self._connections() if counter % 10 == 0 else ():
            transport = connection.transport
            if transport.is_closing():
                closing_s = now - self._closing.setdefault(connection, now)
                if closing_s > _CLOSING_S or transport.get_write_buffer_size() > _MOST_BUFFERED:
                    transport.abort()  # its data would stay in memory
            elif connection.is_waiting and now - connection.waiting_since > REQUEST_S:
                transport.abort()
        return await super().on_tick(counter)

    def make_room(self, address: str | None) -> bool:
        """Abort the connection that has been idle or closing for longest; False without such a connection.

        One at a time: the next one after this one has closed.

        Args:
            address: Of the client; None for any.
        """
        if self._evicted in self.server_state.connections:
            return address is None
        since: dict[Connection, float] = {}
        for connection in self._connections():
            if address is not None and address_group(connection.client) != address:
                continue
            if connection.is_waiting:
                since[connection] = connection.waiting_since
            elif connection.is_closing:
                since[connection] = self._closing.setdefault(connection, time.monotonic())
        if not since:
            return False
        oldest = min(since, key=since.__getitem__)
        self._evicted = oldest
        oldest.transport.abort()
        return True

    def _connections(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection)]
