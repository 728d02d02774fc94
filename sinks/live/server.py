"""Serves the application with uvicorn, on a thread beside a run or for ``stagecast watch``. Imports uvicorn."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from urllib.parse import quote

import uvicorn

from events.errors import SinkMisconfigured
from events.log import in_this_run, logger
from sinks.connections import EXHAUSTED, ConnectionLimit, RatedWarning, address_group
from sinks.live.access import Access
from sinks.live.app import LiveApp
from sinks.live.client import MOST_INBOUND
from sinks.live.protocols import HttpConnection, StrictServer, WebSocketConnection
from sinks.live.pushes import Pushes
from sinks.live.runs import Runs
from sinks.live.token import check_host, is_loopback

_START_S = 10.0
_STOP_S = 5.0
_PAUSE_S = 0.5
"""Seconds without an accept after one failed without a free descriptor; less than asyncio's second."""


class Listener(socket.socket):
    """A listening socket that accepts connections up to a `ConnectionLimit`. asyncio calls it on the event loop."""

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.limit = ConnectionLimit()
        self.make_room: Callable[[str | None], bool] = lambda address: False
        """Closes an idle connection of an address, or of any for None, in the next cycle of the event loop; False if
        all connections are busy."""
        self.count_made: Callable[[], int] = lambda: 0
        """Counts the connections whose protocol exists, one cycle of the event loop after their accept."""
        self._refused = RatedWarning("the page's server closed a new connection; raise the descriptor limit: ulimit -n")
        self._paused_until = -1.0

    def accept(self) -> tuple[socket.socket, object]:
        """Accept a connection.

        Raises:
            BlockingIOError: None is pending, or one must wait until another one has closed.
            ConnectionAbortedError: The connection was closed, because too many are open.
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
            if error.errno in EXHAUSTED:  # asyncio schedules one more retry for each such error
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
    """Return a listening socket.

    Raises:
        SinkMisconfigured: The port is in use, or the address does not belong to this machine.
    """
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = Listener(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1_024)
    except (OSError, OverflowError) as error:  # OverflowError: the port is out of range
        listening.close()
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise SinkMisconfigured(
            f"{host}:{port} cannot be served: {reason}; choose another port, or 0 for a free one"
        ) from error
    _listening.add(listening)
    return listening


_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked dataloader worker would keep the port open after the run has closed it.
    for listening in list(_listening):
        listening.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def link_to(url: str, token: str | None) -> str:
    """Return the page's link: with this machine's name for a wildcard address, and with the token."""
    for everywhere in ("//0.0.0.0:", "//[::]:"):
        url = url.replace(everywhere, f"//{socket.gethostname()}:")
    return url if token is None else f"{url}#token={quote(token, safe='')}"


class Server:
    """A server with its own address.

    Args:
        listening: From `bind`.
        host: The host given to `bind`.

    Raises:
        SinkMisconfigured: Other machines can reach it without a token.
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
        pushes: Pushes | None = None,
    ) -> None:
        check_host(host, token)
        hosts = ("localhost", "127.0.0.1", "::1", host.strip("[]")) if is_loopback(host) else None
        access = Access(token, commands=commands, origins=origins, hosts=hosts)
        # The rest of the connections is for short requests.
        self._pushes = pushes
        app = self._app = LiveApp(runs, access, max(1, listening.limit.most * 5 // 6), pushes=pushes)
        self._socket = listening
        name = f"[{host.strip('[]')}]" if ":" in host else host
        self.url = f"http://{name}:{listening.getsockname()[1]}/"
        """Address of the page."""
        self.link = link_to(self.url, token)
        """The address with the token in its fragment, which browsers do not send."""
        own = logging.getLogger("uvicorn.error")
        if own.level == logging.NOTSET:
            own.setLevel(logging.WARNING)  # at INFO it would log clients' requests, with their tokens
        config = uvicorn.Config(
            app,
            http=HttpConnection,
            loop="asyncio",  # uvloop does not call `Listener.accept`
            log_config=None,
            access_log=False,  # addresses may be private
            lifespan="off",
            ws=WebSocketConnection,
            ws_max_size=MOST_INBOUND,
            ws_ping_interval=20.0,
            ws_ping_timeout=20.0,
            ws_per_message_deflate=False,  # it would compress each frame per client
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = StrictServer(config)
        listening.make_room = self._server.make_room
        listening.count_made = lambda: len(self._server.server_state.connections)
        self._thread = threading.Thread(target=in_this_run(self._serve), name="stagecast-live", daemon=True)

    def run(self) -> None:
        """Serve until a signal arrives. On the main thread."""
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after its shutdown
            self._serve()

    def start(self) -> None:
        """Serve on a thread; waits until the server accepts connections.

        Raises:
            RuntimeError: It does not start.
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
        """Stop the server, and close the port; waits for at most `_STOP_S`."""
        self._server.should_exit = True
        self._thread.join(_STOP_S)
        self._socket.close()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except Exception as error:
            logger.error(f"the server at {self.url} has failed: {error!r}")
        finally:
            if self._pushes is not None:
                self._pushes.close()
