"""The journal of a run, followed by cursor over the network, over as many connections as it takes.

The server is not trusted: every line is limited in size and time, and must be the next event of the run.
"""

from __future__ import annotations

import time

import anyio

from events.errors import WireError
from events.journal.lines import check_size
from events.journal.segment import MAX_LINE_BYTES
from events.messages import Event, RunEnded, RunStarted, UnknownEvent
from events.text import plain_text
from events.wire import decode_json
from trainer.errors import ConnectionLost
from trainer.remote.http import FAILURES, Patience, Unreachable, described
from trainer.remote.result import MOST_SEQ, UNDER_WAY
from trainer.remote.source import JournalLines, RunSource

_LINE_S = 60.0
"""Maximum seconds between the first and the last byte of a journal's line."""
_SETTLED_S = 5.0
"""A connection that lasts this long counts as a success, even if it brings no event."""
_LINE_BYTES = MAX_LINE_BYTES
_EVENTLESS_BYTES = 64 * 2**20
"""Maximum bytes of a journal without a new event."""
_AFTER_END_S = 2.0
"""Maximum seconds to look for a server after the end of its run: the sink `Live` goes away with the run."""


class JournalFollower:
    """Reads the run's events after a cursor. One consumer.

    Args:
        since: Events with a greater ``seq`` are returned. None: `begin_at` sets the cursor later.
    """

    def __init__(self, server: RunSource, since: int | None) -> None:
        self.ended = False
        """Whether the run's last event was returned, or the follower was closed."""
        self._server = server
        self._cursor = since or 0
        self._begun = anyio.Event()
        if since is not None:
            self._begun.set()
        self._problem: Exception | None = None
        self._patience = Patience(server)
        self._answer: JournalLines | None = None
        self._connected = 0.0  # when, by time.monotonic
        self._line = bytearray()  # the beginning of one
        self._line_since = 0.0
        self._eventless_bytes = 0
        self._saw_end = False
        self._reading: anyio.CancelScope | None = None

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned."""
        return self._cursor

    def begin_at(self, cursor: int | Exception) -> None:
        """Set the cursor, or the error that reading raises."""
        if isinstance(cursor, Exception):
            self._problem = cursor
        else:
            self._cursor = cursor
        self._begun.set()

    async def read(self) -> list[Event]:
        """Wait for the next events, at least one. A cancelled call loses nothing.

        Raises:
            anyio.EndOfStream: There are no more.
            ConnectError: The server does not send them.
        """
        with anyio.CancelScope() as self._reading:
            try:
                await self._begun.wait()
                if self._problem is not None:
                    raise self._problem
                while not self.ended:
                    try:
                        if events := await self._read_on():
                            return events
                    except Unreachable as error:
                        await self._lose(error)
            finally:
                self._reading = None
        raise anyio.EndOfStream

    async def aclose(self) -> None:
        """Stop, and disconnect; a `read` that waits in another task raises `anyio.EndOfStream`."""
        self.ended = True
        if self._reading is not None:
            self._reading.cancel()  # its task disconnects
        else:
            await self.disconnect()

    async def _read_on(self) -> list[Event]:
        """The next events, perhaps none; connects if necessary."""
        try:
            if self._answer is None:
                self._answer = await self._server.journal(self._cursor)
                self._connected = time.monotonic()
            chunk = await self._answer.chunk()
            if not chunk:
                await self.disconnect()
                await self._see_whether_over()
                return []
            events = self._take(chunk)
        except FAILURES as error:
            await self.disconnect()
            raise Unreachable(described(error)) from None
        except BaseException:  # also a cancellation, which has broken the connection; the next call makes another
            await self.disconnect()
            raise
        # A server that repeatedly accepts, sends a sign of life and disconnects is out of reach.
        if events or time.monotonic() - self._connected > _SETTLED_S:
            self._patience.reset()
        return events

    def _take(self, chunk: bytes) -> list[Event]:
        """The events that are complete with these bytes.

        Raises:
            ProtocolViolated: They are not the next events of this run.
            Unreachable: A line takes too long.
        """
        now = time.monotonic()
        self._eventless_bytes += len(chunk)
        if not self._line:
            self._line_since = now
        self._line += chunk
        events: list[Event] = []
        if b"\n" in chunk:
            *lines, rest = self._line.split(b"\n")
            self._line, self._line_since = rest, now
            events = [self._event(bytes(line)) for line in lines if line]  # an empty line is a sign of life
        if events:
            self._eventless_bytes = len(self._line)
        if len(self._line) > _LINE_BYTES:
            raise self._server.violated(f"sends a journal line of more than {_LINE_BYTES:,} bytes")
        if self._eventless_bytes > _EVENTLESS_BYTES:
            raise self._server.violated(f"sends {_EVENTLESS_BYTES:,} bytes of a journal without a new event")
        if self._line and now - self._line_since > _LINE_S:
            raise Unreachable(f"a line of the journal took longer than {_LINE_S:g} s")
        return events

    def _event(self, line: bytes) -> Event:
        try:
            check_size(line)
            event = decode_json(line)
        except WireError as error:
            raise self._server.violated(f"sends a line that is not an event ({plain_text(str(error))})") from None
        is_nameless = not event.run_id and isinstance(event, UnknownEvent)  # of a later version
        if event.run_id != self._server.run_id and not is_nameless:
            raise self._server.violated(
                f"sends an event of run {plain_text(event.run_id, 80)} in the journal of run {self._server.shown_run}"
            )
        if not self._cursor < event.seq <= MOST_SEQ:
            raise self._server.violated(f"sends event {event.seq:.6g} behind event {self._cursor}")
        self._cursor = event.seq
        if isinstance(event, (RunEnded, RunStarted)):
            self._saw_end = isinstance(event, RunEnded)
        return event

    async def _see_whether_over(self) -> None:
        """Find out why the answer has ended: the run is over, or a proxy has cut it off."""
        if not self._saw_end:
            snapshot = await self._server.snapshot()
            if snapshot.cursor < self._cursor:
                raise self._server.violated(f"goes back from event {self._cursor} to event {snapshot.cursor}")
            if snapshot.run.status in UNDER_WAY or snapshot.cursor > self._cursor:
                raise Unreachable("the journal's events came to an end before the run's")
        self._end()

    async def _lose(self, error: Unreachable) -> None:
        """Wait before the next attempt; end if the run is known to have ended."""
        known_to_be_over = self._saw_end or self._server.over
        try:
            await self._patience.wait(error, _AFTER_END_S if known_to_be_over else self._server.give_up_s)
        except ConnectionLost:
            if not self._saw_end:
                raise
            self._end()

    def _end(self) -> None:
        self.ended = self._server.over = True

    async def disconnect(self) -> None:
        """Close the connection; reading makes another."""
        answer, self._answer = self._answer, None
        self._line = bytearray()
        self._eventless_bytes = 0
        if answer is not None:
            await answer.aclose()
