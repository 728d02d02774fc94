"""Serves the application by uvicorn: on a thread of its own beside a run, or as the command ``stagecast watch``.

It imports uvicorn: import it when something is to be served.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from urllib.parse import quote

import uvicorn

from events.errors import SinkMisconfigured
from events.log import in_this_run, logger
from sinks.live.access import Access, check_host, is_loopback
from sinks.live.app import LiveApp
from sinks.live.client import MOST_INBOUND
from sinks.live.runs import Runs

_START_S = 10.0
_STOP_S = 5.0
_CLOSING_S = 10.0
"""How long a connection may take to close: one whose client reads nothing would never do so."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        SinkMisconfigured: The port is taken, or the address is none of this machine.
    """
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
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
        listening: socket.socket,
        host: str,
        *,
        token: str | None = None,
        commands: bool = False,
        origins: Iterable[str] = (),
    ) -> None:
        check_host(host, token)
        hosts = ("localhost", "127.0.0.1", "::1", host.strip("[]")) if is_loopback(host) else None
        app = self._app = LiveApp(runs, Access(token, commands=commands, origins=origins, hosts=hosts))
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
            log_config=None,
            access_log=False,  # an address may hold what is private
            lifespan="off",
            ws="websockets-sansio",
            ws_max_size=MOST_INBOUND,
            ws_ping_interval=20.0,
            ws_ping_timeout=20.0,
            ws_per_message_deflate=False,  # costs more than it saves, for each client anew
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = _Uvicorn(config)
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


class _Uvicorn(uvicorn.Server):
    """Aborts connections that do not close."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._closing: weakref.WeakKeyDictionary[object, float] = weakref.WeakKeyDictionary()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        now = time.monotonic()
        for connection in list(self.server_state.connections) if counter % 10 == 0 else ():
            transport = connection.transport
            if transport.is_closing() and now - self._closing.setdefault(connection, now) > _CLOSING_S:
                transport.abort()  # what it was sent would stay in memory as long as it likes
        return await super().on_tick(counter)
