"""A hub that reads the journal of a run folder."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR, journal_head, segment_numbers
from events.run.damage import damage_in, damage_of, reason_of
from events.run.folder import is_held
from events.run.job import read_job, settle_job
from events.run.pushed import is_pushed
from sinks.live.hub import BATCH, Hub
from sinks.live.stored import PAUSE_S, batches, encode_view, read_view, store_view
from sinks.live.turns import READING

_STORE_S = 30.0
"""Minimum seconds between two stores of a view."""
_STORE_EVENTS = 20_000
"""Minimum new events per store of a view."""
_LOOK_S = 1.0
"""Seconds between two looks at the run folder beside the journal's content."""
_RETRY_S = 1.0
_MOST_RETRY_S = 30.0
"""Seconds between two reads of a journal that cannot be read: at first, and at most."""


class FolderHub(Hub):
    """A hub that reads the journal of a run folder while the run has clients.

    Never raises for the content of the folder: the view names the damage.

    Args:
        name: The run's name in the list of runs, if that is not its ``run_id``.
        readers: Limits the threads that read runs; None for a limit of one thread.
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
        self._misfit: str | None = None  # the damage outside the journal, as of the last look
        self._retry_at = -math.inf
        self._retry_s = _RETRY_S
        self._limiter = anyio.CapacityLimiter(1)  # one read at a time
        self._readers = readers or anyio.CapacityLimiter(1)  # our own: a host needs its threads

    async def refresh(self) -> None:
        """Read new events of the journal. A failed read is retried after `_RETRY_S`, then less and less often."""
        async with self._limiter:  # first: clients that wait for this run must not occupy the readers of other runs
            await anyio.to_thread.run_sync(self._read_if_due, limiter=self._readers)

    def _read_if_due(self) -> None:
        if time.monotonic() >= self._retry_at:
            with READING.taken():
                self._read_in_turns()

    def _read_in_turns(self) -> None:
        assert self.run_dir is not None
        now = time.monotonic()
        looks = now - self._looked_at > _LOOK_S or self._reader is None
        held = is_held(self.run_dir) if looks else True  # before the read, so that it includes the last event
        try:
            if self._reader is None or (looks and self._is_another(self.run_dir)):
                self._begin(self.run_dir)
            assert self._reader is not None
            for events in batches(self._reader, is_over=not held):
                self.feed(events)
                if len(events) >= BATCH:
                    time.sleep(PAUSE_S)
            reason = damage_in(self._reader)
            if reason is not None and not segment_numbers(self.run_dir / JOURNAL_DIR):
                reason = None  # the journal was removed: clients keep the view
            if looks:
                before, self._misfit = self._misfit, damage_of(self.run_dir)
                reason = reason or self._misfit
                if self._misfit is None and before is not None:
                    self._reader = None  # repaired: the view is rebuilt
        except Exception as error:  # of a damaged or hostile folder: other runs are unaffected
            gone = isinstance(error, FileNotFoundError)  # clients keep the view
            self._set_damage(None if gone else reason_of(error, self.run_dir), is_broken=not gone)
        else:
            self._set_damage(reason)
        if self.view.is_broken:
            self._reader = None  # the view may lack some of the events that were read
            self._update_status(held)
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _MOST_RETRY_S)
            return
        self._retry_s = _RETRY_S
        if looks:
            self._looked_at = now
            self._update_status(held)
            self._store(now)

    def _set_damage(self, reason: str | None, *, is_broken: bool = False) -> None:
        if reason is None or (reason == self.view.run.damage and is_broken == self.view.is_broken):
            return
        with self._lock:
            self.view.damaged(reason, is_broken=is_broken)
            if self._changes is not None:
                run = self.view.run
                self._changes.run |= {"status": run.status, "damage": run.damage, "problems": run.problems}

    def _is_another(self, run_dir: Path) -> bool:
        """Whether the journal was replaced."""
        before, now = self._head, journal_head(run_dir / JOURNAL_DIR)
        if now:  # otherwise the journal was removed: clients keep the view
            self._head = now
        return bool(now) and before not in (b"", now)

    def _begin(self, run_dir: Path) -> None:
        """Read the journal from its beginning, or from the end of the stored view."""
        self._head = journal_head(run_dir / JOURNAL_DIR)
        view, self._stored_cursor = read_view(run_dir)
        self._replace(view)
        self._reader = JournalReader(run_dir / JOURNAL_DIR, view.cursor)

    def _store(self, now: float) -> None:
        """Store the view for the next server, after many new events."""
        assert self.run_dir is not None
        new = self.view.cursor - self._stored_cursor
        ended = self.view.run.status not in ("running", "unknown")
        if new >= _STORE_EVENTS and (ended or now - self._stored_at > _STORE_S):
            self._stored_at, self._stored_cursor = now, self.view.cursor
            with self._lock:
                data = encode_view(self.run_dir, self.view)
            if data is not None:  # without the lock: the event loop never waits for the disk
                store_view(self.run_dir, data)

    def _update_status(self, held: bool) -> None:
        """Set the status of a run that ended without `RunEnded`, or that runs again."""
        assert self.run_dir is not None
        pushed, job = is_pushed(self.run_dir), read_job(self.run_dir)
        with self._lock:
            run = self.view.run
            before = run.status
            run.settle(is_held=held, is_pushed=pushed)
            settle_job(run, job)
            if run.status != before and self._changes is not None:
                self._changes.run |= {"status": run.status, "reason": run.reason, "problems": run.problems}

    def _shown(self) -> dict[str, object]:
        shown = super()._shown()
        return shown if self.name is None else shown | {"run": msgspec.structs.replace(self.view.run, run_id=self.name)}
