"""Bounds what an application holds for clients that may not read: bytes, and responses of a kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sinks.live.access import Refused

PART_BYTES = 2**16
"""Maximum bytes of a response that the server receives at a time: it holds them until the client reads."""
LEAST_BYTES_PER_S = 2**14
"""Minimum bytes per second at which a client must read a whole response, and send a long body."""
MOST_UNREAD_BYTES = 2**27
"""Maximum bytes of unread responses in memory per application."""


class Unread:
    """Bounds the bytes of responses in memory until clients have read them. Belongs to the event loop.

    Responses of up to `PART_BYTES` are not counted: the server's own buffer per connection is as large.
    """

    def __init__(self, most_bytes: int = MOST_UNREAD_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0

    def add(self, count: int) -> int:
        """Count the bytes of a response; return the count for `remove`. One response is always allowed.

        Raises:
            Refused: Too many bytes are unread.
        """
        count = count if count > PART_BYTES else 0
        if count and self._bytes and self._bytes + count > self._most_bytes:
            raise busy(f"other clients have not read {self._bytes:,} bytes of their answers; try again later")
        self._bytes += count
        return count

    def remove(self, count: int) -> None:
        """Stop counting them."""
        self._bytes -= count

    @contextlib.contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Count the bytes of a response while it is sent. Raises `Refused`."""
        count = self.add(count)
        try:
            yield
        finally:
            self.remove(count)


class Limit:
    """Bounds the responses of one kind that are sent at a time. Belongs to the event loop.

    Args:
        what: The noun for the refusal: ``images``.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most = most
        self.count = 0
        self._what = what

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a response while it is sent. Raises `Refused`."""
        if self.count >= self.most:
            raise busy(f"{self.count} clients read {self._what}, the maximum; try again later")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


def busy(reason: str) -> Refused:
    """Return the refusal of a request that the client may retry after some seconds."""
    return Refused(503, reason, code=1013, headers={"retry-after": "5"})
