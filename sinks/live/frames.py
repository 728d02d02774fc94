"""Messages to the clients of a run, each encoded once, and the buffer of recent frames that all clients share."""

from __future__ import annotations

import gzip
import math
from collections import deque
from functools import cached_property

import anyio
import msgspec

KEPT_BYTES = 8 * 2**20
"""Maximum bytes of frames per run, the newest frame excepted."""
KEPT_FRAMES = 1_000
"""Maximum frames per run."""
_encoder = msgspec.json.Encoder(enc_hook=str)


class Message(msgspec.Struct, frozen=True, dict=True):
    """A snapshot of a run, or a frame: the changes between two events."""

    kind: str
    number: int
    """Of a frame, counted per run; of a snapshot: the number of the newest frame in it."""
    generation: int
    attempt: int
    after: int
    """``seq`` of the last event before it."""
    cursor: int
    """``seq`` of the last event in it."""
    data: bytes

    @cached_property
    def text(self) -> str:
        """As a WebSocket message."""
        return self.data.decode()

    @cached_property
    def packed(self) -> bytes:
        """Compressed with gzip; that takes 10 ms per MB."""
        return gzip.compress(self.data, 1, mtime=0)

    @cached_property
    def event(self) -> bytes:
        """As a server-sent event, with the milliseconds after which an ``EventSource`` reconnects."""
        head = b"retry: 1000\nid: %d-%d\nevent: %s\n" % (self.attempt, self.cursor, self.kind.encode())
        return head + b"data: %s\n\n" % self.data


class RecentFrames:
    """The newest frames of a run. Belongs to the event loop; the hub holds its lock around `append` and `clear`."""

    def __init__(self) -> None:
        self.newest = 0
        """Number of the newest frame."""
        self.generation = 0
        """Increases when frames do not continue the earlier ones: every client then needs a snapshot."""
        self.is_over = False
        """Whether the newest frame is the last one."""
        self.news = anyio.Event()
        """Set, and replaced, at the next frame, the next generation, or the end."""
        self.nbytes = 0
        """Bytes of the frames in the buffer."""
        self._frames: deque[Message] = deque()
        self._woken_for = (0, 0, False)

    @property
    def oldest(self) -> int:
        """Number of the oldest frame in the buffer."""
        return self._frames[0].number if self._frames else self.newest + 1

    def get(self, number: int) -> Message | None:
        """Return the frame with this number, which is at most `newest`; None if the buffer has dropped it."""
        return self._frames[number - self.newest - 1] if number >= self.oldest else None

    def first_after(self, cursor: int) -> int | None:
        """Return the number of the first frame behind a cursor; None if the buffer does not hold it.

        Frames without events repeat the cursor; they may be sent twice.
        """
        return next((frame.number for frame in self._frames if frame.after == cursor), None)

    def append(self, frame: Message) -> None:
        """Add the newest frame, and drop the oldest ones beyond the limits."""
        self._frames.append(frame)
        self.nbytes += len(frame.data)
        while len(self._frames) > 1 and (self.nbytes > KEPT_BYTES or len(self._frames) > KEPT_FRAMES):
            self.nbytes -= len(self._frames.popleft().data)

    def clear(self) -> None:
        """Drop all frames."""
        self._frames.clear()
        self.nbytes = 0

    def wake(self) -> None:
        """Set `news`, if there is any."""
        state = self.newest, self.generation, self.is_over
        if state != self._woken_for:
            self._woken_for = state
            news, self.news = self.news, anyio.Event()
            news.set()


class Packed(bytes):
    """A WebSocket message of bytes: JSON that is compressed with gzip."""


def as_packed(message: Message | int) -> str | Packed:
    """Return a message by WebSocket as `as_text`, a snapshot compressed."""
    if isinstance(message, Message) and message.kind == "snapshot":
        return Packed(message.packed)
    return as_text(message)


def as_text(message: Message | int) -> str:
    """Return a message by WebSocket: a snapshot, a frame, or a gap, given by the number of missed frames."""
    return message.text if isinstance(message, Message) else f'{{"type":"gap","lost":{message}}}'


def as_event(message: Message | int) -> bytes:
    """Return a server-sent event; one for a gap has no id, from which a client would resume behind it."""
    return (
        message.event if isinstance(message, Message) else b'event: gap\ndata: {"type":"gap","lost":%d}\n\n' % message
    )


def encode(message: dict[str, object]) -> bytes:
    """Encode a message as JSON; values that JSON cannot hold are replaced."""
    try:
        return _encoder.encode(message)
    except (ValueError, TypeError, OverflowError, RecursionError):  # a lone surrogate in a run's text, for example
        return _encoder.encode(_plain(message, 0))


def _plain(value: object, depth: int) -> object:
    """Replace the values that JSON cannot hold."""
    if depth > 50:
        return "..."
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        return {_plain(str(key), depth): _plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, depth + 1) for part in value]
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, int):
        return math.inf if value > 0 else -math.inf  # written as null
    return str(value).encode("utf-8", "replace").decode()
