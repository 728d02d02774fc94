"""The open streams and WebSockets of an application: limits them, and closes them when the server shuts down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator

import anyio

from sinks.live.access import Refused
from sinks.live.client import RESTART, TOO_SLOW, Client, Inbound
from sinks.live.shutdown import find_servers, unread

HELLO_S = 10.0
"""Seconds that a client may take to send `Hello`."""
_MOST_EXPECTED = 100
"""Maximum connections without a hello; the oldest is closed beyond it."""
_END_S = 0.5
_LOOK_S = 0.1
"""Seconds between two looks at the server's state."""
_UNREAD_S = 0.3
"""Seconds that a client may take to read the rest of its data when the server shuts down."""

Task = Callable[[], Coroutine[object, object, None]]


class Clients:
    """Belongs to the event loop.

    Args:
        most: Maximum clients at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.most_expected = min(_MOST_EXPECTED, max(1, most // 10))
        self._open: set[Client] = set()
        self._expected: dict[Client, None] = {}  # without a hello, the oldest first; counted apart from the others
        self._looking = anyio.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def counted(self, client: Client) -> Iterator[None]:
        """Count a client while it is served. Raises `Refused` if there are too many."""
        if len(self._open) >= self.most:
            raise Refused(503, f"{len(self._open)} clients are connected, the maximum; try again later", code=TOO_SLOW)
        self._open.add(client)
        try:
            yield
        finally:
            self._open.discard(client)
            client.forget()

    async def hello(self, client: Client) -> Inbound | None:
        """Receive a client's first message; None if it has disconnected. Raises `Refused` if none arrives in time.

        Of too many clients that have sent nothing yet, the oldest is disconnected.
        """
        self._expected[client] = None
        if len(self._expected) > self.most_expected:
            oldest = next(iter(self._expected))
            del self._expected[oldest]  # here, so that the next client disconnects another one
            oldest.disconnect(Refused(503, "too many clients have sent no hello; try again later", code=TOO_SLOW))
        message = None
        try:
            with anyio.move_on_after(HELLO_S) as client.scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.close_with_server)
                    message = await client.receive()
                    tasks.cancel_scope.cancel()
        finally:
            self._expected.pop(client, None)
        if message is None and not client.has_left:
            raise client.problem or Refused(408, f"no hello arrived within {HELLO_S:g} s")
        return message

    async def serve(self, client: Client, listen: Task, write: Task) -> None:
        """Run both tasks of a client until ``write`` has returned, the client is disconnected, or the server stops."""
        async with anyio.create_task_group() as tasks:
            client.scope = tasks.cancel_scope
            tasks.start_soon(listen)
            tasks.start_soon(client.disconnect_if_stuck)
            tasks.start_soon(self.close_with_server)
            await write()
            tasks.cancel_scope.cancel()

    async def end(self) -> None:
        """Disconnect all; waits until they are closed, half a second at most."""
        self._disconnect()
        with anyio.move_on_after(_END_S):
            while self._open or self._expected:  # noqa: ASYNC110  # each of them ends a task of its server
                await anyio.sleep(0.01)

    async def close_with_server(self) -> None:
        """Disconnect all once the server shuts down. Each client's task runs this; one at a time does the work."""
        if len(self._open) + len(self._expected) == 1:  # the last clients may have run in another event loop
            self._looking = anyio.Lock()
        async with self._looking:
            servers = find_servers()
            while not any(server.is_ending() for server in servers):  # noqa: ASYNC110  # no server has an event for it
                await anyio.sleep(_LOOK_S)
            headers = [client.headers for client in [*self._open, *self._expected]]
            self._disconnect()
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(_UNREAD_S):
                    while unread(servers, headers):  # noqa: ASYNC110  # no event reports that a client has read
                        await anyio.sleep(0.02)
                for transport in unread(servers, headers):
                    transport.abort()

    def _disconnect(self) -> None:
        for client in [*self._open, *self._expected]:
            client.disconnect(Refused(503, "the server shuts down", code=RESTART))
