"""The view of a run from its journal, and the file that caches the view of a long one."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from events.errors import WireError
from events.journal.history import EventFinder, history_filter
from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR, journal_head
from events.journal.tail import journal_tail
from events.messages import Event, RunResumed
from events.msgpack_keys import check_keys
from events.run.damage import damage_in, damage_of, reason_of
from events.run.folder import is_held
from events.run.trim import trimmed
from events.safe_files import list_below, read_below, replace_below
from sinks.live.turns import READING, TURN_S
from sinks.live.view import RunView

STORE_NAME = "view.msgpack"
"""File in the run folder with the cached view. It may be deleted."""
_VERSION = 7
PAUSE_S = 0.0002
"""Seconds of sleep between two batches, so that other threads wait 2 ms for the interpreter instead of 5."""
MOST_SKIPPED = 10_000
"""Maximum lines per journal that are not events; the rest of the journal is not read."""
_SLICE_S = TURN_S
_AT_ONCE = 8
_BATCH_BYTES = 32 * 2**20
"""Maximum estimated bytes of memory per batch, its last read excepted."""
_TRIES = 3
_MOST_BYTES = 32 * 2**20
"""Maximum bytes of a stored view, for writing and reading."""
_ROOM_BYTES = 64 * 2**20
"""Maximum bytes of memory per stored view beyond a small multiple of its length."""


class _Stored(msgspec.Struct):
    version: int
    head: bytes
    """Of its journal."""
    view: RunView


def read_view(run_dir: str | os.PathLike[str]) -> tuple[RunView, int]:
    """Return the view of a run, and the ``seq`` up to which it was stored, or 0.

    Never raises for the content of the folder: the view holds the readable part, and its ``damage`` names the rest.
    """
    run_dir = Path(run_dir)
    stored = _stored_view(run_dir)
    since = stored.cursor
    if since and (view := _continued(run_dir, stored)) is not None and not view.is_broken:
        return view, since
    for _ in range(_TRIES):
        if (view := _continued(run_dir, RunView())) is not None:
            return view, 0
        # The run was resumed during the read.
    return _continued(run_dir, RunView(), known=math.inf) or RunView(), 0  # its end contradicts its middle


def _continued(run_dir: Path, view: RunView, known: float | None = None) -> RunView | None:
    """Add the events behind a view to it; None if a resume during the read superseded some of them.

    Args:
        known: ``seq`` up to which the filter of superseded events knows resumes; None for the journal's end.
    """
    journal_dir = run_dir / JOURNAL_DIR
    try:
        list_below(run_dir, JOURNAL_DIR)
        seq, counts = _filter_of(journal_dir) if not view.cursor else (0, None)
        known = seq if known is None else known
        held = is_held(run_dir)  # before the read, so that it includes the last event
        reader = JournalReader(journal_dir, view.cursor)
        for events in batches(reader, is_over=not held):
            if any(type(event) is RunResumed and event.seq > known for event in events):
                return None
            view.add(events if counts is None else [event for event in events if counts(event)])
            time.sleep(PAUSE_S)
        view.curves.cursor = max(view.cursor, reader.cursor)  # the last ones may be superseded
        view.damaged(damage_of(run_dir) or damage_in(reader))
    except FileNotFoundError:
        pass  # the journal does not exist yet, or was removed
    except Exception as error:  # of a damaged or hostile folder: other runs are unaffected
        view.damaged(reason_of(error, run_dir), is_broken=True)
    return view


def batches(
    reader: JournalReader, until: float = math.inf, most: int = 512, *, is_over: bool = False
) -> Iterator[Sequence[Event]]:
    """Read new events of a journal in batches, each event `trimmed`, because a few lines may fill the memory.

    Args:
        until: Stop soon after this time (`time.monotonic`).
        is_over: The run has ended, so that an unfinished last line is damage.

    Raises:
        OSError: A segment cannot be read.
        WireError: More than `MOST_SKIPPED` lines are not events.
    """
    while True:
        READING.pass_on()
        slice_end = min(until, time.monotonic() + _SLICE_S)
        batch: list[Event] = []
        taken = 0
        while len(batch) < most and taken < _BATCH_BYTES and (events := reader.read(_AT_ONCE, slice_end)):
            batch += trimmed(events)
            taken += reader.last_bytes
            if time.monotonic() > slice_end:
                break
        if batch:
            yield batch
        if reader.skipped_count > MOST_SKIPPED:
            raise WireError(f"{damage_in(reader)}; the journal has more than {MOST_SKIPPED:,} such lines")
        now = time.monotonic()
        if now > until:
            return
        if not batch and now <= slice_end:
            if not is_over or not (rest := reader.finish()):
                return
            yield trimmed(rest)


def _filter_of(journal_dir: Path) -> tuple[int, Callable[[Event], bool] | None]:
    """Return the journal's last ``seq``, and a filter of the events up to it; None if none is superseded."""
    tail = journal_tail(journal_dir, READING.pass_on)
    # The filter reads the whole journal; a first attempt needs none.
    return tail.seq, history_filter(journal_dir, READING.pass_on) if tail.attempt > 1 else None


def write_view(run_dir: Path, view: RunView) -> None:
    """Store a view beside the journal. Failures are ignored: the journal holds everything."""
    if (data := encode_view(run_dir, view)) is not None:
        store_view(run_dir, data)


def encode_view(run_dir: Path, view: RunView) -> bytes | None:
    """Encode a view for `store_view`; None if that is not possible, or its journal could not be read."""
    try:
        data = msgspec.msgpack.encode(_Stored(_VERSION, journal_head(run_dir / JOURNAL_DIR), view))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return data if len(data) <= _MOST_BYTES and not view.is_broken else None


def store_view(run_dir: Path, data: bytes) -> None:
    """Write the result of `encode_view`. Waits for the disk."""
    # The folder may be read-only; `ValueError` is a view that would not be read.
    with contextlib.suppress(OSError, ValueError):
        check_keys(data, _ROOM_BYTES)
        replace_below(run_dir, STORE_NAME, data)


def _stored_view(run_dir: Path) -> RunView:
    """Return the stored view if it is valid, current and of this journal; otherwise an empty view."""
    try:
        data = read_below(run_dir, STORE_NAME, _MOST_BYTES)
        check_keys(data, _ROOM_BYTES)
        stored = msgspec.msgpack.decode(data, type=_Stored)
        fits = (
            stored.version == _VERSION and stored.head == journal_head(run_dir / JOURNAL_DIR) and stored.view.is_sound
        )
        if fits and stored.view.cursor <= journal_tail(run_dir / JOURNAL_DIR, READING.pass_on).seq:
            health = stored.view.health  # rebuilt, because few events of the journal affect it
            for event in EventFinder(run_dir / JOURNAL_DIR, health.types).find(between=READING.pass_on):
                if event.seq > stored.view.cursor:
                    break
                health.add(event)
            stored.view.run.problems = stored.view.problems
            return stored.view
    except Exception:  # damaged or hostile: the journal is read instead
        pass
    return RunView()
