"""Serves the application by uvicorn: on a thread of its own beside a run, or as the command ``stagecast watch``.

It imports uvicorn: import it when something is to be served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from events.errors import SinkMisconfigured
from events.log import PlainRecords, in_this_run, logger
from sinks.connections import EXHAUSTED, REQUEST_S, ClientFaults, ConnectionLimit, RatedWarning, address_group
from sinks.live.access import Access, check_host, is_loopback
from sinks.live.app import LiveApp
from sinks.live.asgi import PART_BYTES
from sinks.live.client import MOST_INBOUND
from sinks.live.runs import Runs

_START_S = 10.0
_STOP_S = 5.0
_PAUSE_S = 0.5
"""Seconds without an accept after one has failed for want of descriptors; less than asyncio's second."""
_CLOSING_S = 10.0
"""How long a connection may take to close: one whose client reads nothing would never do so."""

_MOST_BUFFERED = 2 * PART_BYTES
"""Maximum bytes per connection that may be unread when it closes, or when its client pings."""


class Listener(socket.socket):
    """A listening socket that accepts no more connections than a `ConnectionLimit` allows.

    asyncio accepts by it, on the thread of the event loop.
    """

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.limit = ConnectionLimit()
        self.make_room: Callable[[str | None], bool] = lambda address: False
        """Has an open connection closed in the next round of the event loop, of this address or, for None, of any;
        False if each of them is being answered."""
        self.count_made: Callable[[], int] = lambda: 0
        """Counts the connections whose protocol exists, which happens in the next round of the event loop."""
        self._refused = RatedWarning("the page's server closed a new connection; raise the descriptor limit: ulimit -n")
        self._paused_until = -1.0

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: There is none, or it has to wait until another is closed.
            ConnectionAbortedError: It was closed, because there are too many.
            OSError: As `socket.socket.accept` raises it; asyncio pauses for a second after EMFILE.
        """
        if time.monotonic() < self._paused_until:
            raise BlockingIOError
        is_full = self.limit.is_full()
        if is_full and (self.limit.count > self.count_made() or self.make_room(None)):
            raise BlockingIOError
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno in EXHAUSTED:  # asyncio schedules a retry for each such error, and would cause many
                self._paused_until = time.monotonic() + _PAUSE_S
            raise
        group = address_group(address)
        if is_full or self.limit.reserves(connection) or (self.limit.is_full_for(group) and not self.make_room(group)):
            connection.close()
            self._refused()
            raise ConnectionAbortedError("too many connections")
        self.limit.add(connection, group)
        return connection, address


def bind(host: str, port: int) -> Listener:
    """Return a socket that listens.

    Raises:
        SinkMisconfigured: The port is taken, or the address is none of this machine.
    """
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = Listener(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1_024)
    except (OSError, OverflowError) as error:  # OverflowError: no port at all
        listening.close()
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise SinkMisconfigured(
            f"nothing can be served at {host}:{port}: {reason}; choose another port, or 0 for a free one"
        ) from error
    _listening.add(listening)
    return listening


_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked dataloader worker would hold the port when the run has long let go of it.
    for listening in list(_listening):
        listening.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def link_to(url: str, token: str | None) -> str:
    """What opens the page with one click: this machine's name where the server is at all its addresses, the token."""
    for everywhere in ("//0.0.0.0:", "//[::]:"):
        url = url.replace(everywhere, f"//{socket.gethostname()}:")
    return url if token is None else f"{url}#token={quote(token, safe='')}"


class Server:
    """A server at an address of its own.

    Args:
        listening: From `bind`.
        host: What the socket was bound to.

    Raises:
        SinkMisconfigured: Others can reach it, and there is no token.
    """

    def __init__(
        self,
        runs: Runs,
        listening: Listener,
        host: str,
        *,
        token: str | None = None,
        commands: bool = False,
        origins: Iterable[str] = (),
    ) -> None:
        check_host(host, token)
        hosts = ("localhost", "127.0.0.1", "::1", host.strip("[]")) if is_loopback(host) else None
        access = Access(token, commands=commands, origins=origins, hosts=hosts)
        # The others are for short requests: those without a stream can be closed for one another.
        app = self._app = LiveApp(runs, access, most_clients=max(1, listening.limit.most * 5 // 6))
        self._socket = listening
        name = f"[{host.strip('[]')}]" if ":" in host else host
        self.url = f"http://{name}:{listening.getsockname()[1]}/"
        """Where the page is."""
        self.link = link_to(self.url, token)
        """The same for who started it, with the token in the fragment, which a browser sends to no server."""
        own = logging.getLogger("uvicorn.error")
        if own.level == logging.NOTSET:
            own.setLevel(logging.WARNING)  # a program that logs all there is would log what clients say, tokens too
        config = uvicorn.Config(
            app,
            http=_Http,
            loop="asyncio",  # others do not accept by `Listener`
            log_config=None,
            access_log=False,  # an address may hold what is private
            lifespan="off",
            ws=_WebSocket,
            ws_max_size=MOST_INBOUND,
            ws_ping_interval=20.0,
            ws_ping_timeout=20.0,
            ws_per_message_deflate=False,  # costs more than it saves, for each client anew
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = _Uvicorn(config)
        listening.make_room = self._server.make_room
        listening.count_made = lambda: len(self._server.server_state.connections)
        self._thread = threading.Thread(target=in_this_run(self._serve), name="stagecast-live", daemon=True)

    def run(self) -> None:
        """Serve until a signal comes. On the main thread."""
        with contextlib.suppress(KeyboardInterrupt):  # the signal, once more, when all is closed
            self._serve()

    def start(self) -> None:
        """Serve on a thread of its own. Waits until it does, a moment.

        Raises:
            RuntimeError: It does not.
        """
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server at {self.url} has not started")
            time.sleep(0.005)
        logger.info(f"the run can be watched at {self.url}")

    def stop(self) -> None:
        """End it, and let go of the port. Waits for a moment."""
        self._server.should_exit = True
        self._thread.join(_STOP_S)
        self._socket.close()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except Exception as error:
            logger.error(f"the server at {self.url} has failed: {error!r}")


def _make_log() -> logging.Logger:
    log = logging.getLogger("uvicorn.error.stagecast")  # handlers and level are the host's
    if not log.filters:
        log.addFilter(ClientFaults())
        log.addFilter(PlainRecords())
    return log


# uvicorn has no public means to see whether a connection waits for its client, nor to refuse its pings. What is used of
# its protocols beyond asyncio's own interface is all in `_Http`, `_WebSocket` and `_Uvicorn`, and a test names the one
# of these attributes that an upgrade has removed.
HTTP_ATTRIBUTES = ("app", "client", "cycle", "logger", "on_response_complete", "scope", "transport")
CYCLE_ATTRIBUTES = ("more_body", "response_complete")
WEBSOCKET_ATTRIBUTES = (
    *("app", "client", "close_sent", "conn", "handle_close", "handle_ping", "handshake_complete"),
    *("handshake_initiated", "logger", "transport"),
)
SERVER_ATTRIBUTES = ("on_tick", "run", "server_state", "should_exit", "started", "startup")


class _Http(H11Protocol):
    """One connection until it becomes a WebSocket."""

    waiting_since = 0.0
    """When it was accepted, or its last response was complete."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.logger = _make_log()
        self.waiting_since = time.monotonic()

    def on_response_complete(self) -> None:
        self.waiting_since = time.monotonic()
        super().on_response_complete()

    @property
    def is_waiting(self) -> bool:
        """Whether the client has not sent a complete request, with its body, since the last response."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body


class _WebSocket(WebSocketsSansIOProtocol):
    """One connection that has become a WebSocket."""

    waiting_since = 0.0
    """When it was made."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.logger = _make_log()
        self.waiting_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Abort a handshake that was refused without an answer, such as one of too many headers."""
        super().data_received(data)
        # `handshake_exc` is public, of `websockets.server.ServerProtocol`.
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.abort()

    def handle_ping(self) -> None:
        """Answer a ping; a client that does not read its answers is closed, or they would fill memory."""
        if self.transport.get_write_buffer_size() > _MOST_BUFFERED:
            self.transport.abort()
            return
        super().handle_ping()

    def handle_close(self, event: Any) -> None:
        """Close; a client that has not read what it was sent does not want it, and it would stay in memory."""
        if not self.close_sent and self.transport.get_write_buffer_size() > _MOST_BUFFERED:
            self.transport.abort()
        super().handle_close(event)

    @property
    def is_waiting(self) -> bool:
        """Whether the handshake is not complete."""
        return not self.handshake_complete


class _Uvicorn(uvicorn.Server):
    """Aborts connections whose clients do not send or take what they should."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._closing: weakref.WeakKeyDictionary[object, float] = weakref.WeakKeyDictionary()
        self._evicted: Any = None
        self._exhausted = RatedWarning("the page's server cannot accept a connection: ")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        await super().startup(sockets)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in EXHAUSTED and "socket" in context:
            self._exhausted(str(error))
        else:
            loop.default_exception_handler(context)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        now = time.monotonic()
        for connection in list(self.server_state.connections) if counter % 10 == 0 else ():
            transport = connection.transport
            if transport.is_closing():
                closing_s = now - self._closing.setdefault(connection, now)
                if closing_s > _CLOSING_S or transport.get_write_buffer_size() > _MOST_BUFFERED:
                    transport.abort()  # its data would stay in memory for as long as the client does not read
            elif (
                isinstance(connection, _Http | _WebSocket)
                and connection.is_waiting
                and now - connection.waiting_since > REQUEST_S
            ):
                transport.abort()
        return await super().on_tick(counter)

    def make_room(self, address: str | None) -> bool:
        """Abort the connection that has waited longest for a request, or for its client to read the rest or to close.

        One at a time: the next only when this one is closed, so that there is at most one too many.

        Args:
            address: Of whom; None for anyone's.
        """
        if self._evicted in self.server_state.connections:
            return address is None
        since: dict[Any, float] = {}
        connection: Any
        for connection in self.server_state.connections:
            if address is not None and address_group(connection.client) != address:
                continue
            if isinstance(connection, _Http | _WebSocket) and connection.is_waiting:
                since[connection] = connection.waiting_since
            elif connection.transport.is_closing() or getattr(connection, "close_sent", False):
                since[connection] = self._closing.setdefault(connection, time.monotonic())
        if not since:
            return False
        oldest = min(since, key=since.__getitem__)
        self._evicted = oldest
        oldest.transport.abort()
        return True
