"""One run with many clients: its view, and the frames of its changes, each encoded once for all clients.

There are no per-client queues: clients index into one shared buffer, `sinks.live.frames.RecentFrames`. A client that
falls behind the buffer receives a gap and a snapshot, which holds the whole view. So the memory of a run does not
depend on the number of clients, nor on their speed: each connection holds one message, a snapshot at most.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import TaskStatus

from events.journal.segment import JOURNAL_DIR
from events.journal.tail import journal_tail
from events.messages import Event, RunResumed
from events.protocol import AnyCommand
from events.run.inbox import commands_of
from events.run.summary import Summary
from events.run.trim import trimmed
from events.table.entry import RunEntry
from events.table.notes import NOTES_INVALID, Notes, read_notes
from sinks.live.entry import entry_of
from sinks.live.frames import Message, RecentFrames, encode
from sinks.live.stored import read_view
from sinks.live.view import Changes, RunView

FRAME_S = 0.1
"""Minimum seconds between two frames."""
ALIVE_S = 2.0
"""Maximum seconds between two frames: an empty one shows that the server is alive."""
MOST_IN_A_FRAME = 100_000
"""Maximum events per frame; after more, all clients receive a snapshot, which is smaller."""
_RETURN_S = 1.0
"""Seconds between two requests of one client for which the end of the run waits."""
_JOURNAL_S = 2.0
"""Maximum seconds for which a resume waits until the journal holds it."""
BATCH = 512
"""Maximum events per hold of the lock, so that clients do not wait for it."""


class Hub:
    """Turns a run's events into frames.

    `feed` and `end` may be called on any thread; all else belongs to the event loop of the server.

    Args:
        run_dir: The run folder; None if the run has none.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self.view = RunView()
        self.frames = RecentFrames()
        self.allows_commands = False
        """Whether the server accepts commands for the run."""
        self.asked_at = -math.inf
        """Time of the last request for the run, by `time.monotonic`."""
        self.followers = 0
        """Open responses with the run's journal."""
        self._ending = False
        self._lock = threading.Lock()  # around the view and its changes
        self._changes: Changes | None = None  # since the newest frame; None without clients
        self._is_new = False  # the view was replaced: the next frame does not continue the last one
        self._sent_cursor = 0
        self._snapshot: Message | None = None
        self._last_frame_at = -math.inf
        self._driving = anyio.Lock()
        self._thread = anyio.CapacityLimiter(1)  # our own: a host may have all of its threads in use
        self._watchers = 0

    # ------------------------------------------------------------------------------------------ the events

    def feed(self, events: Sequence[Event]) -> None:
        """Add events of the run, in their order; events that it has already are skipped.

        Any thread, one at a time. Waits for the journal when a run is resumed.

        Raises:
            OSError: The journal cannot be read.
        """
        events = trimmed([event for event in events if event.seq > self.view.cursor])
        resumed = next((event for event in reversed(events) if type(event) is RunResumed), None)
        if resumed is None or not (self.view.cursor or events[0].attempt < resumed.attempt):
            for begin in range(0, len(events), BATCH):
                with self._lock:
                    self._add(events[begin : begin + BATCH])
            return
        # Repeated steps must not appear twice, so the view is rebuilt; without the lock, because that may take long.
        view = self._rebuild(resumed)
        view.add([event for event in events if event.seq > view.cursor])
        self._replace(view)

    def _add(self, events: Sequence[Event]) -> None:
        self.view.add(events, self._changes)
        if self._changes is not None and self._changes.count > MOST_IN_A_FRAME:
            self._changes, self._is_new = Changes(), True

    def _replace(self, view: RunView) -> None:
        with self._lock:
            self.view, self._is_new = view, True
            self._changes = Changes() if self._changes is not None else None

    def _rebuild(self, resumed: RunResumed) -> RunView:
        if self.run_dir is not None and self._is_journalled(resumed.seq):
            return read_view(self.run_dir)[0]
        # Values by step are dropped: without a journal, the superseded ones cannot be found.
        kept = ("run", "arguments", "config", "versions", "log", "checkpoints")
        view = RunView(**{name: getattr(self.view, name) for name in kept})
        view.health = self.view.health
        return view

    def _is_journalled(self, seq: int) -> bool:
        """Wait until the journal, which another thread writes, holds an event; False after `_JOURNAL_S`."""
        assert self.run_dir is not None
        deadline = time.monotonic() + _JOURNAL_S
        while journal_tail(self.run_dir / JOURNAL_DIR).seq < seq:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    async def refresh(self) -> None:
        """Read new events, if no one feeds them. Waits for the disk, on a thread."""

    def end(self, timeout_s: float) -> None:
        """Send the last frame, and end the clients' streams. Any thread; waits for them for at most ``timeout_s``.

        A client that sent a command may be about to request the end of the run, so each request extends the wait to
        `_RETURN_S` after it.
        """
        with self._lock:
            self._ending = True
        deadline = time.monotonic() + timeout_s
        while (self.is_watched or time.monotonic() < self.asked_at + _RETURN_S) and time.monotonic() < deadline:
            time.sleep(0.01)

    def summary(self) -> Summary:
        """Return the run's entry in the list of runs."""
        with self._lock:
            return msgspec.structs.replace(self.view.run, commands=self.takes_commands)

    def entry(self) -> RunEntry:
        """Return the run's row in the table of runs, with its notes. Any thread; waits for the disk."""
        with self._lock:
            entry = entry_of(self.view)
        notes = read_notes(self.run_dir) if self.run_dir is not None else Notes()
        entry.health += [] if notes is not None else [NOTES_INVALID]
        entry.notes = notes or Notes()
        return entry

    def notes(self) -> Notes:
        """Return the valid notes about the run. Any thread; waits for the disk."""
        return (read_notes(self.run_dir) if self.run_dir is not None else None) or Notes()

    @property
    def is_watched(self) -> bool:
        """Whether the run has clients."""
        return self._watchers + self.followers > 0

    @property
    def is_ending(self) -> bool:
        """Whether the hub sends its last frame."""
        return self._ending

    @property
    def takes_commands(self) -> bool:
        """Whether commands reach the run."""
        run = self.view.run
        return self.allows_commands and self.run_dir is not None and run.status == "running" and not run.pushed

    @property
    def may_take_commands(self) -> bool:
        """Whether the run may be running: no client may have caused its journal to be read yet."""
        return self.run_dir is not None and self.view.run.status in ("running", "unknown", "lost")

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Count a response with the run's journal while it is sent."""
        self.followers += 1
        try:
            yield
        finally:
            self.followers -= 1

    async def command(self, command: AnyCommand) -> None:
        """Send a command to the run; waits for the disk. Raises `RunFolderError` if the run is not running."""
        run_dir = self.run_dir
        assert run_dir is not None
        await anyio.to_thread.run_sync(lambda: commands_of(run_dir).send(command), limiter=self._thread)

    # ------------------------------------------------------------------------------------------ the frames

    async def snapshot(self, *, is_packed: bool = False) -> Message:
        """Return the view as of the newest frame, encoded once for all requests before the next frame.

        Creates that frame first, if the view has changed; waits so that frequent requests do not cause frequent frames.

        Args:
            is_packed: Compress it too, on a thread.
        """
        made = await self._make_snapshot()
        if is_packed and "packed" not in vars(made):
            await anyio.to_thread.run_sync(lambda: made.packed, limiter=self._thread)  # one of several at a time
        return made

    async def _make_snapshot(self) -> Message:
        while True:
            with self._lock:
                self._settle()
                made = self._snapshot
                if made is not None and (made.number, made.generation) == (self.frames.newest, self.frames.generation):
                    return made
                wait_s = self._last_frame_at + FRAME_S / 2 - time.monotonic()
                if self._changes is None or wait_s <= 0 or not self._has_news():
                    self._make_frame()
                    data = encode(self._shown())
                    made = self._message("snapshot", data, after=0)
                    self._snapshot = made if self._changes is not None else None
                    return made
            await anyio.sleep(wait_s)

    async def drive(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Create frames for all clients. Each client's task runs this; one at a time does the work."""
        if not self._watchers:  # the last clients may have run in another event loop
            self._driving, self.frames.news = anyio.Lock(), anyio.Event()
        self._watchers += 1
        try:
            with self._lock:
                if self._changes is None:
                    self._changes, self._is_new = Changes(), True
                self._settle()
            task_status.started()
            async with self._driving:
                while True:
                    began = time.monotonic()
                    await self.refresh()
                    with self._lock:
                        self._make_frame()
                    self.frames.wake()
                    await anyio.sleep(max(0.0, began + FRAME_S - time.monotonic()))
        finally:
            self._watchers -= 1
            if not self._watchers:
                with self._lock:
                    self._changes = self._snapshot = None
                    self.frames.clear()

    def resume(self, attempt: int | None, cursor: int) -> int | None:
        """Return the number of the frame behind a cursor; None if a client with that cursor needs a snapshot."""
        with self._lock:
            self._settle()
            if attempt is not None and attempt != self.view.run.attempt:
                return None
            found = self.frames.first_after(cursor)
            return self.frames.newest + 1 if found is None and cursor == self._sent_cursor else found

    # ------------------------------------------------------------------------------------- under the lock

    def _shown(self) -> dict[str, object]:
        """Return the members of a snapshot."""
        return self.view.snapshot()

    def _settle(self) -> None:
        """Start a new generation of frames if the view was replaced."""
        if self._is_new:
            self._is_new = False
            self.frames.generation += 1
            self.frames.clear()
            self._sent_cursor = self.view.cursor

    def _has_news(self) -> bool:
        assert self._changes is not None
        commands = self.takes_commands
        if commands != self.view.run.commands:
            self.view.run.commands = self._changes.run["commands"] = commands
        return self.view.cursor != self._sent_cursor or bool(self._changes.members())

    def _make_frame(self) -> None:
        """Create a frame of the changes; an empty one after `ALIVE_S`."""
        self._settle()
        if self._changes is None:
            self.view.run.commands = self.takes_commands
            return
        now = time.monotonic()
        if self._has_news() or now - self._last_frame_at >= ALIVE_S or self._ending > self.frames.is_over:
            frame = {"type": "frame", "cursor": self.view.cursor, "time": time.time(), **self._changes.members()}
            self._changes = Changes()
            self._last_frame_at = now
            self.frames.newest += 1
            self.frames.append(self._message("frame", encode(frame), after=self._sent_cursor))
            self._sent_cursor = self.view.cursor
        self.frames.is_over = self._ending

    def _message(self, kind: str, data: bytes, after: int) -> Message:
        frames, view = self.frames, self.view
        return Message(kind, frames.newest, frames.generation, view.run.attempt, after, view.cursor, data)
