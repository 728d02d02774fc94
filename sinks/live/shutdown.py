"""Finds out whether the server that runs the application shuts down.

A server waits for open responses before it sends ``lifespan.shutdown``, a mounted application gets no lifespan at all,
and ASGI has no message for the beginning of a shutdown. So an application whose streams stay open looks at its server,
which it finds among the tasks of its event loop. No signal handler is installed and nothing of the server is replaced:
it works on a thread, in workers, and embedded in a host's own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import anyio


class Server(NamedTuple):
    """A server that runs in this event loop."""

    is_ending: Callable[[], bool]
    """Whether its shutdown has begun."""
    connections: Callable[[], Collection[Any]] = tuple
    """Its connections, where it would wait for them without a limit."""


def _uvicorn(local: Mapping[str, Any]) -> Server:
    server = local["self"]
    return Server(
        # With ``limit_max_requests`` it ends without having been asked to: then its sockets are closed.
        lambda: server.should_exit or any(not one.is_serving() for one in getattr(server, "servers", ())),
        lambda: list(server.server_state.connections),
    )


def _hypercorn(local: Mapping[str, Any]) -> Server:
    context = local["context"]
    return Server(lambda: bool(context.terminated.is_set()))


def _gunicorn(local: Mapping[str, Any]) -> Server:
    worker = local["self"]
    return Server(lambda: not worker.alive)


# The coroutine that each server runs in until its end, by module and name.
_SERVERS: dict[tuple[str, str], Callable[[Mapping[str, Any]], Server]] = {
    ("uvicorn.server", "Server._serve"): _uvicorn,
    ("hypercorn.asyncio.run", "worker_serve"): _hypercorn,
    ("hypercorn.trio.run", "worker_serve"): _hypercorn,
    ("gunicorn.workers.gasgi", "ASGIWorker._serve"): _gunicorn,
}


def find_servers() -> list[Server]:
    """Look for servers in this event loop. One that is not known is not found."""
    found: list[Server] = []
    for task in anyio.get_running_tasks():
        coroutine: Any = task.coro
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None)
            if frame is not None:
                look = _SERVERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_qualname))
                local = frame.f_locals if look is not None else {}
                if look is not None and ("self" in local or "context" in local):
                    found.append(look(local))
            coroutine = getattr(coroutine, "cr_await", None)
    return found


def unread(servers: list[Server], headers: list[Any]) -> list[Any]:
    """The transports with data that their clients have not read: a server that closes them waits until they do.

    Args:
        headers: Of the requests whose connections are looked at, as they stand in the scopes.
    """
    ours = {id(one) for one in headers}
    found = []
    for server in servers:
        for connection in server.connections():
            scope = getattr(connection, "scope", None) or {}
            transport = getattr(connection, "transport", None)
            if id(scope.get("headers")) in ours and transport is not None and transport.get_write_buffer_size():
                found.append(transport)
    return found
