"""The view of a run from its journal, and the file in the run's folder that spares reading a long one again."""

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
from events.journal.segment import JOURNAL_DIR, open_segment, segment_numbers
from events.journal.tail import journal_tail
from events.messages import Event, RunResumed
from events.msgpack_keys import check_keys
from events.run.folder import is_held
from events.safe_files import list_below, read_below, replace_below
from sinks.damage import damage_in, damage_of, reason_of
from sinks.live.trim import trimmed
from sinks.live.turns import READING, TURN_S
from sinks.live.view import RunView

STORE_NAME = "view.msgpack"
"""In a run's folder: the view as it was. It may be deleted."""
_VERSION = 7
PAUSE_S = 0.0002
"""Between two batches of a long journal: so others on this interpreter wait 2 ms for it instead of 5, each time."""
MOST_SKIPPED = 10_000
"""Maximum lines of a journal that are not events; behind them it is not read."""
_SLICE_S = TURN_S
_AT_ONCE = 8
_BATCH_BYTES = 32 * 2**20
"""Maximum bytes of memory, estimated, that the events of one batch take before its last read."""
_HEAD = 1_024
_TRIES = 3
_MOST_BYTES = 32 * 2**20
"""Maximum bytes of the stored view; a larger one is not written and not read."""
_ROOM_BYTES = 64 * 2**20
"""Maximum bytes of memory that a stored view may take beyond a small multiple of its length; likewise."""


class _Stored(msgspec.Struct):
    version: int
    head: bytes
    """Of the journal that it was made of."""
    view: RunView


def read_view(run_dir: str | os.PathLike[str]) -> tuple[RunView, int]:
    """The view of a run's history, and how much of it was stored: up to which ``seq``, 0 for nothing.

    Never raises for what is in the folder: the view has what could be read, and its ``damage`` names the rest.
    """
    run_dir = Path(run_dir)
    stored = _stored_view(run_dir)
    since = stored.cursor
    if since and (view := _continued(run_dir, stored)) is not None and not view.is_broken:
        return view, since
    for _ in range(_TRIES):
        if (view := _continued(run_dir, RunView())) is not None:
            return view, 0
        # The run was resumed meanwhile.
    return _continued(run_dir, RunView(), known=math.inf) or RunView(), 0  # a journal whose end denies its middle


def _continued(run_dir: Path, view: RunView, known: float | None = None) -> RunView | None:
    """A view with what the journal has behind it; None if some of it turned out to be superseded.

    Args:
        known: Up to which ``seq`` resumes are in the filter of superseded events; None for what the journal's end says.
    """
    journal_dir = run_dir / JOURNAL_DIR
    try:
        list_below(run_dir, JOURNAL_DIR)
        seq, counts = _filter_of(journal_dir) if not view.cursor else (0, None)
        known = seq if known is None else known
        held = is_held(run_dir)  # before reading: what is written later must not be missed
        reader = JournalReader(journal_dir, view.cursor)
        for events in batches(reader, is_over=not held):
            if any(type(event) is RunResumed and event.seq > known for event in events):
                return None
            view.add(events if counts is None else [event for event in events if counts(event)])
            time.sleep(PAUSE_S)
        view.curves.cursor = max(view.cursor, reader.cursor)  # the last ones may be superseded
        view.damaged(damage_of(run_dir) or damage_in(reader))
    except FileNotFoundError:
        pass  # the journal does not exist yet, or not any more
    except Exception as error:  # whatever a stranger has put there, it concerns this run alone
        view.damaged(reason_of(error, run_dir), is_broken=True)
    return view


def batches(
    reader: JournalReader, until: float = math.inf, most: int = 512, *, is_over: bool = False
) -> Iterator[Sequence[Event]]:
    """Read on in a journal, by so many events at a time, each `trimmed`: a few lines of it may fill the memory.

    Args:
        until: Stop soon after this time (`time.monotonic`).
        is_over: Nobody writes to the journal any more, so its end counts as it is.

    Raises:
        OSError: A segment cannot be read.
        WireError: More lines than `MOST_SKIPPED` are not events.
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
            raise WireError(f"{damage_in(reader)}; the journal has too many such lines to be read")
        now = time.monotonic()
        if now > until:
            return
        if not batch and now <= slice_end:
            if not is_over or not (rest := reader.finish()):
                return
            yield trimmed(rest)


def _filter_of(journal_dir: Path) -> tuple[int, Callable[[Event], bool] | None]:
    """Up to where the journal is known, and what of that counts; None: all of it."""
    tail = journal_tail(journal_dir, READING.pass_on)
    # The filter looks through the whole journal, for what a first attempt cannot have.
    return tail.seq, history_filter(journal_dir, READING.pass_on) if tail.attempt > 1 else None


def write_view(run_dir: Path, view: RunView) -> None:
    """Store a view beside the journal, for the next time; a failure is ignored, for the journal has everything."""
    if (data := encode_view(run_dir, view)) is not None:
        store_view(run_dir, data)


def encode_view(run_dir: Path, view: RunView) -> bytes | None:
    """A view as it is stored; None for one that cannot be, or should not because its journal could not be read."""
    try:
        data = msgspec.msgpack.encode(_Stored(_VERSION, head_of(run_dir), view))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return data if len(data) <= _MOST_BYTES and not view.is_broken else None


def store_view(run_dir: Path, data: bytes) -> None:
    """Write what `encode_view` returned. Waits for the disk."""
    # Another server may watch the run, the folder may refuse, or the view is one that would not be read.
    with contextlib.suppress(OSError, ValueError):
        check_keys(data, _ROOM_BYTES)
        replace_below(run_dir, STORE_NAME, data)


def head_of(run_dir: Path) -> bytes:
    """Tells a journal from any other, also of the same name: the beginning of its first event. Raises `OSError`."""
    try:
        number = segment_numbers(run_dir / JOURNAL_DIR)[0]
        with open(open_segment(run_dir / JOURNAL_DIR, number), "rb", buffering=0) as file:
            return file.read(_HEAD).partition(b"\n")[0]
    except (FileNotFoundError, IndexError):
        return b""


def _stored_view(run_dir: Path) -> RunView:
    """What is stored, if it is of this journal, of a version that we read, and whole; else an empty view."""
    try:
        data = read_below(run_dir, STORE_NAME, _MOST_BYTES)
        check_keys(data, _ROOM_BYTES)
        stored = msgspec.msgpack.decode(data, type=_Stored)
        fits = stored.version == _VERSION and stored.head == head_of(run_dir) and stored.view.is_sound
        if fits and stored.view.cursor <= journal_tail(run_dir / JOURNAL_DIR, READING.pass_on).seq:
            health = stored.view.health  # it is not stored: few lines of the journal bear on it
            for event in EventFinder(run_dir / JOURNAL_DIR, health.types).find(between=READING.pass_on):
                if event.seq > stored.view.cursor:
                    break
                health.add(event)
            stored.view.run.problems = stored.view.problems
            return stored.view
    except Exception:  # whatever a stranger has put there, the journal is read instead
        pass
    return RunView()
