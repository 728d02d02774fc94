"""The body of a response with the events of a journal, as lines of JSON; `connect` reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import anyio
import anyio.to_thread

from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR
from events.run.folder import is_held
from events.wire import encode_json_lines
from sinks.live.client import Client
from sinks.live.hub import Hub

_QUIET_S = 1.0
"""Seconds without an event, after which an empty line shows the client that the server is there."""
_EVENTS = 64
"""Maximum events per read."""
_BYTES = 2**16
"""Minimum bytes per part, its last part excepted."""


class JournalBody:
    """The events behind a cursor. Belongs to the event loop; reads on threads.

    Args:
        follow: Whether the body ends with the run instead of with the journal as it is.
        limiter: Of the threads.
        pause_s: Seconds until the journal is read again when it had no more events.
    """

    def __init__(
        self, hub: Hub, since: int, *, follow: bool, limiter: anyio.CapacityLimiter, pause_s: Callable[[], float]
    ) -> None:
        assert hub.run_dir is not None
        self._hub = hub
        self._run_dir = hub.run_dir
        self._reader = JournalReader(hub.run_dir / JOURNAL_DIR, since, chunk_bytes=_BYTES)
        self._follow = follow
        self._limiter = limiter
        self._pause_s = pause_s

    async def write_to(self, client: Client) -> None:
        """Send the events, each part after the client has read the previous one."""
        quiet_s = 0.0
        while True:
            over = await self._is_over()  # before the read, so that it includes the last event
            if part := await anyio.to_thread.run_sync(self._read, over, limiter=self._limiter):
                quiet_s = 0.0
                for start in range(0, len(part), _BYTES):
                    await client.send(part[start : start + _BYTES])
            elif over:
                return
            else:
                pause_s = self._pause_s()
                await anyio.sleep(pause_s)
                quiet_s += pause_s
                if quiet_s >= _QUIET_S:
                    quiet_s = 0.0
                    await self._hub.refresh()
                    await client.send(b"\n")

    async def _is_over(self) -> bool:
        """Whether the journal is complete. The last checkpoint's event, for example, follows the end of the loop."""
        hub = self._hub
        if not self._follow or hub.is_ending:
            return not self._follow or self._reader.cursor >= hub.view.cursor
        ended = hub.view.run.status not in ("running", "unknown")
        return ended and not await anyio.to_thread.run_sync(is_held, self._run_dir, limiter=self._limiter)

    def _read(self, over: bool) -> bytes:
        """Read the next part, which ends with an event. On a thread."""
        part = b""
        with contextlib.suppress(OSError):  # nothing is lost: the reader has not moved
            while len(part) < _BYTES and (events := self._reader.read(_EVENTS)):
                part += encode_json_lines(events)
            if over and not part and not is_held(self._run_dir):
                part = encode_json_lines(self._reader.finish())
        return part
