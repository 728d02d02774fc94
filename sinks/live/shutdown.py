"""Detects that the server of the application shuts down.

A server waits for open responses before it sends ``lifespan.shutdown``, a mounted application receives no lifespan, and
ASGI has no message for the start of a shutdown. So an application with open streams looks at its server, which it finds
among the tasks of its event loop. It installs no signal handler and replaces no part of the server, so that it works on
a thread, in workers, and in a host's own loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import anyio

_Locals = Mapping[str, Any]  # of a coroutine of a server, whose package need not be installed


class RunningServer(NamedTuple):
    """A server in this event loop."""

    is_ending: Callable[[], bool]
    """Whether its shutdown has started."""
    connections: Callable[[], Collection[object]] = tuple
    """Its connections, if it waits for them without a timeout."""


def _uvicorn(local: _Locals) -> RunningServer:
    server = local["self"]
    return RunningServer(
        # With ``limit_max_requests`` it stops by itself: its sockets are closed then.
        lambda: server.should_exit or any(not one.is_serving() for one in getattr(server, "servers", ())),
        lambda: list(server.server_state.connections),
    )


def _hypercorn(local: _Locals) -> RunningServer:
    context = local["context"]
    return RunningServer(lambda: bool(context.terminated.is_set()))


def _gunicorn(local: _Locals) -> RunningServer:
    worker = local["self"]
    return RunningServer(lambda: not worker.alive)


# The coroutine that each server runs until its end, by module and name.
_SERVERS: dict[tuple[str, str], Callable[[_Locals], RunningServer]] = {
    ("uvicorn.server", "Server._serve"): _uvicorn,
    ("hypercorn.asyncio.run", "worker_serve"): _hypercorn,
    ("hypercorn.trio.run", "worker_serve"): _hypercorn,
    ("gunicorn.workers.gasgi", "ASGIWorker._serve"): _gunicorn,
}


def find_servers() -> list[RunningServer]:
    """Return the known servers in this event loop."""
    found: list[RunningServer] = []
    for task in anyio.get_running_tasks():
        coroutine: object = task.coro
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None)
            if frame is not None:
                look = _SERVERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_qualname))
                local = frame.f_locals if look is not None else {}
                if look is not None and ("self" in local or "context" in local):
                    found.append(look(local))
            coroutine = getattr(coroutine, "cr_await", None)
    return found


def unread(servers: list[RunningServer], headers: list[object]) -> list[asyncio.WriteTransport]:
    """Return the transports with unread data: a server that closes them waits until the clients have read it.

    Args:
        headers: The header objects in the scopes of the requests to look at.
    """
    ours = {id(one) for one in headers}
    found: list[asyncio.WriteTransport] = []
    for server in servers:
        for connection in server.connections():
            scope = getattr(connection, "scope", None) or {}
            transport = getattr(connection, "transport", None)
            if id(scope.get("headers")) in ours and transport is not None and transport.get_write_buffer_size():
                found.append(transport)
    return found
