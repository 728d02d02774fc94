"""One connection that stays open: what it may say, how it is sent to, and when it is let go."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import anyio
import msgspec

from events.bounds import Int64
from sinks.live.access import Refused
from sinks.live.asgi import PART_BYTES, Message, Receive, Send, Unread

MOST_INBOUND = 64 * 1024
"""Bytes of a message or a body from a client."""
SEND_S = 20.0
"""Maximum seconds per message, or per part of a long one that is sent in parts; then the client is disconnected."""
SNAPSHOT_S = 1.0
"""A client gets a snapshot that it asks for so often at most."""
TOO_SLOW, ENDING, RESTART, NO_TOKEN, NO_RUN, NOT_ALLOWED = 1013, 1001, 1012, 4401, 4404, 1008
"""With these codes a WebSocket is closed."""


class Hello(msgspec.Struct, tag_field="type", tag="hello"):
    """A watcher's first message."""

    token: str | None = None
    since: Int64 | None = None
    attempt: Int64 | None = None
    mode: str = "charts"

    def __repr__(self) -> str:
        return f"Hello(since={self.since}, attempt={self.attempt})"  # the token is a secret


class SnapshotWanted(msgspec.Struct, tag_field="type", tag="snapshot"):
    """A watcher has lost its place."""


class CommandSent(msgspec.Struct, tag_field="type", tag="command"):
    """A command for the run."""

    command: msgspec.Raw


Said = Hello | SnapshotWanted | CommandSent


class Client:
    """A connection. Belongs to the event loop."""

    def __init__(self, receive: Receive, send: Send, headers: Any, unread: Unread) -> None:
        self.headers = headers
        """Of its request: the very object in the scope."""
        self._receive = receive
        self._send = send
        self._unread = unread
        self._held = 0  # bytes of the last message: the server may hold them until it takes the next
        self._sending_since: float | None = None
        self._sent: anyio.Event | None = None
        self._snapshot_at = -math.inf
        self.scope: anyio.CancelScope | None = None
        """Around all that is done for it."""
        self.problem: Refused | None = None
        """Why it is let go."""
        self.has_left = False
        self.is_lost = False
        """Whether it has asked for a snapshot."""

    def leave(self, problem: Refused | None = None) -> None:
        """End all that is done for it."""
        self.problem = self.problem or problem
        if self.scope is not None:
            self.scope.cancel()

    def takes_snapshot(self) -> bool:
        """Whether it gets the snapshot now that it has asked for."""
        if not self.is_lost or (now := time.monotonic()) - self._snapshot_at < SNAPSHOT_S:
            return False
        self.is_lost, self._snapshot_at = False, now
        return True

    async def let_go_if_stuck(self) -> None:
        """End all if it does not take what is sent to it. A timer around each send would cost more than the send."""
        while True:
            await anyio.sleep(SEND_S / 2)  # not too often: there are many of these tasks
            if self._sending_since is not None and time.monotonic() - self._sending_since > SEND_S:
                self.leave(Refused(503, "too slow", code=TOO_SLOW))

    async def send(self, message: Message) -> None:
        """Send a message. It is `let_go_if_stuck` that ends the waiting for a client that does not take it."""
        while self._sending_since is not None:  # another task is sending: rarely, so there is no lock
            self._sent = self._sent or anyio.Event()
            await self._sent.wait()
        self._sending_since = time.monotonic()  # others wait from here on
        try:
            size = self._unread.add(len(message.get("body") or message.get("text") or b""))
            self._held += size
            for part in _parts(message):
                self._sending_since = time.monotonic()
                await self._send(part)
            # The server has sent all before this message; of a body it holds a part, but of a WebSocket's message all.
            left = size if message["type"] == "websocket.send" else 0
            self._unread.remove(self._held - left)
            self._held = left
        except Refused as refused:
            self.leave(refused)
            await anyio.sleep_forever()
        except (OSError, RuntimeError):  # it has left, says the server, each in its own way
            self.has_left = True
            self.leave()
            await anyio.sleep_forever()
        finally:
            self._sending_since = None
            if self._sent is not None:
                self._sent.set()
                self._sent = None

    def forget(self) -> None:
        """Stop counting what it has not read; its connection is closed."""
        self._unread.remove(self._held)
        self._held = 0

    async def push(self, data: bytes) -> None:
        """Send a part of a body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def wait_for_leave(self) -> None:
        """Until the client has closed the connection of its request."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        self.leave()

    async def take(self) -> Said | None:
        """The next message; None when it has left, or has said what is none: then there is a problem."""
        message = await self._receive()
        if message["type"] != "websocket.receive":
            self.has_left = True
            return None
        data = message.get("text") or message.get("bytes") or b""
        if len(data) > MOST_INBOUND:
            self.leave(Refused(413, f"a message has at most {MOST_INBOUND} bytes", code=NOT_ALLOWED))
            return None
        try:
            said: Said = msgspec.json.decode(data, type=Said)
        except (ValueError, RecursionError) as error:  # half a character; a thousand brackets
            self.leave(Refused(400, f"this is no message: {error}", code=NOT_ALLOWED))
            return None
        return said


def _parts(message: Message) -> Iterator[Message]:
    """A body in parts of `PART_BYTES`; a message of a WebSocket as it is."""
    body: bytes = message.get("body", b"")
    for begin in range(0, len(body) or 1, PART_BYTES):
        yield {**message, "body": body[begin : begin + PART_BYTES]} if len(body) > PART_BYTES else message
