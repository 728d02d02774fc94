"""One run, watched by many: its view, and the frames that are sent of it, each encoded once for everybody.

Nobody has a queue of his own. The newest frames are kept, at most `KEPT_BYTES` of them, and each watcher remembers
which one is next for him; one that falls behind what is kept is told of the gap and gets a snapshot, in which
everything is. So what is kept does not depend on how many watch, nor on how slowly. What a server holds of a connection
is the one message that is being sent on it: at most a snapshot.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import TaskStatus

from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR, segment_numbers
from events.journal.tail import journal_tail
from events.messages import Event, RunResumed
from events.protocol import AnyCommand
from events.run.folder import is_held
from events.run.inbox import send_command
from sinks.damage import damage_in, damage_of, reason_of
from sinks.live.frames import Message, encode
from sinks.live.stored import (
    PAUSE_S,
    batches,
    encode_view,
    head_of,
    read_view,
    store_view,
)
from sinks.live.trim import trimmed
from sinks.live.turns import READING
from sinks.live.view import Changes, RunView

FRAME_S = 0.1
"""Between two frames, while something happens."""
ALIVE_S = 2.0
"""A frame comes at least so often."""
KEPT_BYTES = 8 * 2**20
KEPT_FRAMES = 1_000
MOST_IN_A_FRAME = 100_000
"""Events; when more have happened since the last frame, everybody gets a snapshot, which is smaller."""
_STORE_S = 30.0
_STORE_EVENTS = 20_000
"""So many that are not in the stored view yet make it worth storing."""
_LOOK_S = 1.0
_RETURN_S = 1.0
"""Seconds that a client has from one request to the next, when the run is over."""
_RETRY_S = 1.0
_MOST_RETRY_S = 30.0
"""Seconds between two attempts to read a journal that cannot be read: the first, and at most."""
_JOURNAL_S = 2.0
_BATCH = 512


class Hub:
    """Turns a run's events into frames.

    `feed` and `end` may be called on any thread; everything else belongs to the event loop of the server.

    Args:
        run_dir: The run's folder; None if it has none, or its events are only fed.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self.view = RunView()
        self.frames: deque[Message] = deque()
        self.allows_commands = False
        """Whether the server takes commands for the run from those who watch."""
        self.generation = 0
        """Rises when frames do not continue what was before: everybody needs a snapshot then."""
        self.is_over = False
        """No frame comes any more."""
        self.newest = 0
        """The number of the newest frame."""
        self.news = anyio.Event()
        """Set when there is another frame, another generation, or the end of all; then there is a new one."""
        self.asked_at = -math.inf
        """When a client last asked for something of the run, by `time.monotonic`."""
        self.followers = 0
        """Who reads the journal of it, beside those who watch."""
        self._ending = False
        self._kept_bytes = 0
        self._lock = threading.Lock()  # around the view and what of it was not sent yet
        self._changes: Changes | None = None  # None while nobody watches: there is nothing to send
        self._is_new = False  # frames do not continue what was sent
        self._sent_cursor = 0
        self._snapshot: Message | None = None
        self._last_frame_at = -math.inf
        self._woken_for = (0, 0, False)
        self._driving = anyio.Lock()
        self._commands = anyio.CapacityLimiter(1)  # our own: the threads of a host may all be taken
        self._watchers = 0

    # ------------------------------------------------------------------------------------------ the events

    def feed(self, events: Sequence[Event]) -> None:
        """Take events of the run, in their order; those that came already are left out.

        Any thread, one at a time; waits for the journal when a run is taken up again. Raises `OSError` if that cannot
        be read.
        """
        events = trimmed([event for event in events if event.seq > self.view.cursor])
        resumed = next((event for event in reversed(events) if type(event) is RunResumed), None)
        if resumed is None or not (self.view.cursor or events[0].attempt < resumed.attempt):
            for begin in range(0, len(events), _BATCH):  # by pieces: others wait for the lock
                with self._lock:
                    self._add(events[begin : begin + _BATCH])
            return
        # What the run does again must not be there twice, so the view is made anew: without the lock, it may take long.
        view = self._made_anew(resumed)
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

    def _made_anew(self, resumed: RunResumed) -> RunView:
        if self.run_dir is not None and self._is_journalled(resumed.seq):
            return read_view(self.run_dir)[0]
        old = self.view  # what is bound to steps cannot be told apart: it goes
        view = RunView(
            run=old.run,
            arguments=old.arguments,
            config=old.config,
            versions=old.versions,
            log=old.log,
            checkpoints=old.checkpoints,
        )
        view.health = old.health
        return view

    def _is_journalled(self, seq: int) -> bool:
        """Whether the journal has come to a place, or does so soon: it is written by another thread."""
        assert self.run_dir is not None
        deadline = time.monotonic() + _JOURNAL_S
        while journal_tail(self.run_dir / JOURNAL_DIR).seq < seq:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    async def refresh(self) -> None:
        """Look for news where nobody feeds them. Waits for the disk, on a thread."""

    def end(self, timeout_s: float) -> None:
        """Give clients what there is, and end their streams. Any thread; waits for them, at most ``timeout_s``.

        A client that asked a moment ago, say with a command, may be about to ask for the end: it gets `_RETURN_S`.
        """
        with self._lock:
            self._ending = True
        deadline = time.monotonic() + timeout_s
        while (self.is_watched or time.monotonic() < self.asked_at + _RETURN_S) and time.monotonic() < deadline:
            time.sleep(0.01)

    def summary(self) -> dict[str, Any]:
        """The run in a few words."""
        with self._lock:
            return msgspec.structs.asdict(self.view.run) | {"commands": self.takes_commands}

    @property
    def is_watched(self) -> bool:
        """Whether anybody watches."""
        return self._watchers + self.followers > 0

    @property
    def is_ending(self) -> bool:
        """Whether no more is to come of it here."""
        return self._ending

    @property
    def takes_commands(self) -> bool:
        """Whether commands reach the run."""
        return self.allows_commands and self.run_dir is not None and self.view.run.status == "running"

    @property
    def may_take_commands(self) -> bool:
        """Whether it is worth asking the run: nobody may have read yet that it is under way."""
        return self.run_dir is not None and self.view.run.status in ("running", "unknown", "lost")

    async def command(self, command: AnyCommand) -> None:
        """Leave a command for the run. Raises `RunFolderError` if none is under way."""
        assert self.run_dir is not None
        await anyio.to_thread.run_sync(send_command, self.run_dir, command, limiter=self._commands)

    # ------------------------------------------------------------------------------------------ the frames

    async def snapshot(self) -> Message:
        """All of the view, as it is after the newest frame; encoded once for all who come before the next one.

        It makes that frame, if something has happened. May wait, so that there are not more frames for who comes.
        """
        while True:
            with self._lock:
                self._settle()
                made = self._snapshot
                if made is not None and (made.number, made.generation) == (self.newest, self.generation):
                    return made
                wait_s = self._last_frame_at + FRAME_S / 2 - time.monotonic()
                if self._changes is None or wait_s <= 0 or not self._has_news():
                    self._flush()
                    data = encode(self._shown())
                    made = self._message("snapshot", data, after=0)
                    self._snapshot = made if self._changes is not None else None
                    return made
            await anyio.sleep(wait_s)

    async def drive(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Make frames, if nobody else does. Each watcher runs this, and one of them makes them for all."""
        if not self._watchers:  # what was waited on may have been another event loop's
            self._driving, self.news = anyio.Lock(), anyio.Event()
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
                        self._flush()
                    self._wake()
                    await anyio.sleep(max(0.0, began + FRAME_S - time.monotonic()))
        finally:
            self._watchers -= 1
            if not self._watchers:
                with self._lock:
                    self._changes = self._snapshot = None
                    self._forget()

    @property
    def oldest(self) -> int:
        """The number of the oldest frame that is kept."""
        return self.frames[0].number if self.frames else self.newest + 1

    def frame(self, number: int) -> Message | None:
        """The frame with this number, which exists; None if it is not kept any more."""
        if not self.frames or number < self.frames[0].number:
            return None
        return self.frames[number - self.frames[-1].number - 1]  # from the end: most want the newest

    def resume(self, attempt: int | None, cursor: int) -> int | None:
        """The number of the frame that follows a place; None if nobody who was there can go on without a snapshot."""
        with self._lock:
            self._settle()
            if attempt is not None and attempt != self.view.run.attempt:
                return None
            # The first of several: those that tell of no event say what stands, and may be told again.
            found = next((frame.number for frame in self.frames if frame.after == cursor), None)
            return self.newest + 1 if found is None and cursor == self._sent_cursor else found

    # ------------------------------------------------------------------------------------- under the lock

    def _shown(self) -> dict[str, Any]:
        """The view, as it travels."""
        return self.view.snapshot()

    def _settle(self) -> None:
        """See to it that nobody goes on from frames of what was replaced."""
        if self._is_new:
            self._is_new = False
            self.generation += 1
            self._forget()
            self._sent_cursor = self.view.cursor

    def _forget(self) -> None:
        self.frames.clear()
        self._kept_bytes = 0

    def _has_news(self) -> bool:
        assert self._changes is not None
        commands = self.takes_commands
        if commands != self.view.run.commands:
            self.view.run.commands = self._changes.run["commands"] = commands
        return self.view.cursor != self._sent_cursor or bool(self._changes.members())

    def _flush(self) -> None:
        """Make a frame of what has changed; an empty one as a sign of life."""
        self._settle()
        if self._changes is None:
            self.view.run.commands = self.takes_commands
            return
        now = time.monotonic()
        if self._has_news() or now - self._last_frame_at >= ALIVE_S or self._ending > self.is_over:
            frame = {"type": "frame", "cursor": self.view.cursor, "time": time.time(), **self._changes.members()}
            self._changes = Changes()
            self._last_frame_at = now
            self.newest += 1
            self._keep(self._message("frame", encode(frame), after=self._sent_cursor))
            self._sent_cursor = self.view.cursor
        self.is_over = self._ending

    def _message(self, kind: str, data: bytes, after: int) -> Message:
        run = self.view.run
        return Message(kind, self.newest, self.generation, run.attempt, after, self.view.cursor, data)

    def _keep(self, frame: Message) -> None:
        self.frames.append(frame)
        self._kept_bytes += len(frame.data)
        while len(self.frames) > 1 and (self._kept_bytes > KEPT_BYTES or len(self.frames) > KEPT_FRAMES):
            self._kept_bytes -= len(self.frames.popleft().data)

    def _wake(self) -> None:
        state = self.newest, self.generation, self.is_over
        if state != self._woken_for:  # else all would be woken for nothing
            self._woken_for = state
            news, self.news = self.news, anyio.Event()
            news.set()


class FolderHub(Hub):
    """A hub that reads the journal of a run's folder, whoever writes it, while somebody watches.

    Never raises for what is in the folder: the view says how the run is damaged.

    Args:
        name: The run's name in the list of runs, where that is not its ``run_id``.
        readers: Limits the threads that read runs; None for one thread of its own.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        name: str | None = None,
        readers: anyio.CapacityLimiter | None = None,
    ) -> None:
        super().__init__(Path(run_dir))
        self.name = name
        self._reader: JournalReader | None = None
        self._head = b""
        self._stored_at = -math.inf
        self._stored_cursor = 0
        self._looked_at = -math.inf
        self._misfit: str | None = None  # the damage that is not in the journal, as of the last look
        self._retry_at = -math.inf
        self._retry_s = _RETRY_S
        self._limiter = anyio.CapacityLimiter(1)  # one reads at a time
        self._readers = readers or anyio.CapacityLimiter(1)  # our own: no host's threads are taken

    async def refresh(self) -> None:
        """Read on in the journal. What the disk refuses is asked for again, after a second and then less often."""
        async with self._limiter:  # first: those who wait for this run must not take the threads of others
            await anyio.to_thread.run_sync(self._read_on, limiter=self._readers)

    def _read_on(self) -> None:
        if time.monotonic() >= self._retry_at:
            with READING.taken():
                self._read_in_turns()

    def _read_in_turns(self) -> None:
        assert self.run_dir is not None
        now = time.monotonic()
        looks = now - self._looked_at > _LOOK_S or self._reader is None
        held = is_held(self.run_dir) if looks else True  # before reading: what it wrote last must be seen
        try:
            if self._reader is None or (looks and self._is_another(self.run_dir)):
                self._begin(self.run_dir)
            assert self._reader is not None
            for events in batches(self._reader, is_over=not held):
                self.feed(events)
                if len(events) >= _BATCH:
                    time.sleep(PAUSE_S)
            reason = damage_in(self._reader)
            if reason is not None and not segment_numbers(self.run_dir / JOURNAL_DIR):
                reason = None  # a journal that was removed takes nothing from who watches: they see what there was
            if looks:
                before, self._misfit = self._misfit, damage_of(self.run_dir)
                reason = reason or self._misfit
                if self._misfit is None and before is not None:
                    self._reader = None  # it was mended: the view is built again
        except Exception as error:  # whatever a stranger has put there, it concerns this run alone
            gone = isinstance(error, FileNotFoundError)  # who watches sees what there was
            self._see_damage(None if gone else reason_of(error, self.run_dir), is_broken=not gone)
        else:
            self._see_damage(reason)
        if self.view.is_broken:
            self._reader = None  # what was read may not have come to the view
            self._see_whether_lost(held)
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _MOST_RETRY_S)
            return
        self._retry_s = _RETRY_S
        if looks:
            self._looked_at = now
            self._see_whether_lost(held)
            self._store(now)

    def _see_damage(self, reason: str | None, *, is_broken: bool = False) -> None:
        if reason is None or (reason == self.view.run.damage and is_broken == self.view.is_broken):
            return
        with self._lock:
            self.view.damaged(reason, is_broken=is_broken)
            if self._changes is not None:
                run = self.view.run
                self._changes.run |= {"status": run.status, "damage": run.damage, "problems": run.problems}

    def _is_another(self, run_dir: Path) -> bool:
        """Whether somebody has put another journal there."""
        before, now = self._head, head_of(run_dir)
        if now:  # a journal that was removed takes nothing from who watches: they see what there was
            self._head = now
        return bool(now) and before not in (b"", now)

    def _begin(self, run_dir: Path) -> None:
        """Read the journal from its beginning, or from where the stored view ends."""
        self._head = head_of(run_dir)
        view, self._stored_cursor = read_view(run_dir)
        self._replace(view)
        self._reader = JournalReader(run_dir / JOURNAL_DIR, view.cursor)

    def _store(self, now: float) -> None:
        """For the next time, when it is worth it: after much was read, and at the run's end."""
        assert self.run_dir is not None
        new = self.view.cursor - self._stored_cursor
        ended = self.view.run.status not in ("running", "unknown")
        if new >= _STORE_EVENTS and (ended or now - self._stored_at > _STORE_S):
            self._stored_at, self._stored_cursor = now, self.view.cursor
            with self._lock:
                data = encode_view(self.run_dir, self.view)
            if data is not None:  # without the lock: the event loop must not wait for the disk
                store_view(self.run_dir, data)

    def _see_whether_lost(self, held: bool) -> None:
        """A run that no process holds any more, and that has not ended cleanly, is lost."""
        with self._lock:
            run = self.view.run
            status = "running" if held and run.attempt and run.status in ("lost", "damaged") else run.status
            if not held and status == "running":
                status = "damaged" if run.damage else "lost"
            if status != run.status:
                run.status = status
                if self._changes is not None:
                    self._changes.run["status"] = status

    def _shown(self) -> dict[str, Any]:
        shown = super()._shown()
        return shown if self.name is None else shown | {"run": msgspec.structs.replace(shown["run"], run_id=self.name)}
