"""One stream or WebSocket: the messages that its client may send, and sending frames with a timeout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import anyio
import msgspec
from starlette.types import Message, Receive, Send
from starlette.websockets import WebSocketDisconnect

from events.bounds import Int64
from sinks.live.access import Refused
from sinks.live.bounds import PART_BYTES, Unread
from sinks.live.frames import Message as Frame
from sinks.live.frames import Packed
from sinks.live.hub import Hub

MOST_INBOUND = 64 * 1024
"""Maximum bytes per message or body from a client."""
SEND_S = 20.0
"""Maximum seconds per message, or per part of a long body; then the client is disconnected."""
SNAPSHOT_S = 1.0
"""Minimum seconds between two snapshots that a client requests."""
TOO_SLOW, ENDING, RESTART, NO_TOKEN, NO_RUN, NOT_ALLOWED = 1013, 1001, 1012, 4401, 4404, 1008
"""Close codes of a WebSocket."""


class Hello(msgspec.Struct, tag_field="type", tag="hello"):
    """A client's first message."""

    token: str | None = None
    since: Int64 | None = None
    attempt: Int64 | None = None
    gzip: bool = False
    """Whether it takes snapshots that are compressed with gzip, as bytes. By WebSocket."""

    def __repr__(self) -> str:
        return f"Hello(since={self.since}, attempt={self.attempt})"  # the token is a secret


class SnapshotWanted(msgspec.Struct, tag_field="type", tag="snapshot"):
    """A client requests a snapshot, after an error of its own."""


class CommandSent(msgspec.Struct, tag_field="type", tag="command"):
    """A command for the run."""

    command: msgspec.Raw


Inbound = Hello | SnapshotWanted | CommandSent


class Client:
    """A connection. Belongs to the event loop."""

    def __init__(self, receive: Receive, send: Send, headers: object, unread: Unread) -> None:
        self.headers = headers
        """Of its request: the object itself in the scope."""
        self._receive = receive
        self._send = send
        self._unread = unread
        self._held = 0  # bytes of the last message: the server may buffer them until the next one
        self._sending = anyio.Lock(fast_acquire=True)
        self._sending_since: float | None = None
        self._snapshot_at = -math.inf
        self.scope: anyio.CancelScope | None = None
        """Around all of the client's tasks."""
        self.problem: Refused | None = None
        """The reason to disconnect it, if that is not its own."""
        self.has_left = False
        self.needs_snapshot = False
        """Whether it has requested a snapshot."""

    def disconnect(self, problem: Refused | None = None) -> None:
        """Cancel its tasks."""
        self.problem = self.problem or problem
        if self.scope is not None:
            self.scope.cancel()

    def takes_snapshot(self) -> bool:
        """Whether a requested snapshot is due, at most one per `SNAPSHOT_S`; this clears the request."""
        if not self.needs_snapshot or (now := time.monotonic()) - self._snapshot_at < SNAPSHOT_S:
            return False
        self.needs_snapshot, self._snapshot_at = False, now
        return True

    async def disconnect_if_stuck(self) -> None:
        """Disconnect it if a send times out. A timer around each send would cost more than the send."""
        while True:
            await anyio.sleep(SEND_S / 2)  # rarely, because each client has such a task
            if self._sending_since is not None and time.monotonic() - self._sending_since > SEND_S:
                self.disconnect(Refused(503, "too slow", code=TOO_SLOW))

    async def send(self, data: str | bytes) -> None:
        """Send a text by WebSocket, or a part of a response; waits until the server has buffered it.

        `disconnect_if_stuck` ends the wait.
        """
        try:
            async with self._sending:
                size = self._unread.add(len(data))
                self._held += size
                for message in _messages(data):
                    self._sending_since = time.monotonic()
                    await self._send(message)
                # The server has sent all earlier messages; it holds one part of a body, but all of a WebSocket message.
                left = size if isinstance(data, str | Packed) else 0
                self._unread.remove(self._held - left)
                self._held = left
        except Refused as refused:
            self.disconnect(refused)
            await anyio.sleep_forever()
        except (OSError, RuntimeError, WebSocketDisconnect):  # it has disconnected: servers raise different types
            self.has_left = True
            self.disconnect()
            await anyio.sleep_forever()
        finally:
            self._sending_since = None

    async def send_frames(self, hub: Hub, hello: Hello, encode: Callable[[Frame | int], str | bytes]) -> None:
        """Send a snapshot where one is needed, and each frame when it is created, until the run is over.

        Args:
            encode: `as_text`, `as_packed` or `as_event` of `sinks.live.frames`.
        """
        frames = hub.frames
        await hub.refresh()
        async with anyio.create_task_group() as driving:
            await driving.start(hub.drive)
            number = hub.resume(hello.attempt, hello.since) if hello.since else None
            generation = frames.generation
            while True:
                if number is None or generation != frames.generation or self.takes_snapshot():
                    snapshot = await hub.snapshot(is_packed=hello.gzip)
                    number, generation = snapshot.number + 1, snapshot.generation
                    await self.send(encode(snapshot))
                while frames.newest < number and generation == frames.generation and not frames.is_over:
                    await frames.news.wait()
                if generation != frames.generation:
                    continue
                if number > frames.newest:
                    break
                frame = frames.get(number)
                await self.send(encode(frame or frames.oldest - number))
                number = number + 1 if frame is not None else None
            driving.cancel_scope.cancel()

    def forget(self) -> None:
        """Stop counting its unread bytes; its connection is closed."""
        self._unread.remove(self._held)
        self._held = 0

    async def wait_for_disconnect(self) -> None:
        """Wait until the client closes the connection, and cancel its tasks."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        self.disconnect()

    async def receive(self) -> Inbound | None:
        """Receive the next message; None if it has disconnected, or after an invalid message, which sets `problem`."""
        message = await self._receive()
        if message["type"] != "websocket.receive":
            self.has_left = True
            return None
        data = message.get("text") or message.get("bytes") or b""
        if len(data) > MOST_INBOUND:
            self.disconnect(Refused(413, f"a message has at most {MOST_INBOUND} bytes", code=NOT_ALLOWED))
            return None
        try:
            inbound: Inbound = msgspec.json.decode(data, type=Inbound)
        except (ValueError, RecursionError) as error:  # invalid UTF-8; a thousand brackets
            self.disconnect(Refused(400, f"the message is not valid: {error}", code=NOT_ALLOWED))
            return None
        return inbound


def _messages(data: str | bytes) -> Iterator[Message]:
    """Split a part of a response into parts of `PART_BYTES`; a WebSocket message stays whole."""
    if isinstance(data, str | Packed):
        yield {"type": "websocket.send", "bytes" if isinstance(data, Packed) else "text": data}
        return
    for begin in range(0, len(data), PART_BYTES):
        yield {"type": "http.response.body", "body": data[begin : begin + PART_BYTES], "more_body": True}
