"""The view of a run from its journal, and the file in the run's folder that spares reading a long one again."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from events.journal_reader import (
    JOURNAL_DIR,
    EventFinder,
    JournalReader,
    history_filter,
    journal_tail,
    segment_name,
    segment_numbers,
)
from events.messages import Event, RunResumed
from sinks.live.view import RunView

STORE_NAME = "view.msgpack"
"""In a run's folder: the view as it was. It may be deleted."""
_VERSION = 4
_BATCH = 512
PAUSE_S = 0.0002
"""Between two batches of a long journal: so others on this interpreter wait 2 ms for it instead of 5, each time."""
_HEAD = 1_024


class _Stored(msgspec.Struct):
    version: int
    head: bytes
    """Of the journal that it was made of."""
    view: RunView


def read_view(run_dir: str | os.PathLike[str]) -> tuple[RunView, int]:
    """The view of a run's history, and how much of it was stored: up to which ``seq``, 0 for nothing.

    Raises:
        OSError: The journal exists and cannot be read.
    """
    run_dir = Path(run_dir)
    stored = _stored_view(run_dir)
    since = stored.cursor
    if since and (view := _continued(run_dir, stored)) is not None:
        return view, since
    while (view := _continued(run_dir, RunView())) is None:
        pass  # the run was taken up again meanwhile
    return view, 0


def _continued(run_dir: Path, view: RunView) -> RunView | None:
    """A view with what the journal has behind it; None if some of it turned out to be superseded."""
    journal_dir = run_dir / JOURNAL_DIR
    known, counts = _filter_of(journal_dir) if not view.cursor else (0, None)
    reader = JournalReader(journal_dir, view.cursor)
    while events := reader.read(_BATCH):
        if any(type(event) is RunResumed and event.seq > known for event in events):
            return None
        view.add(events if counts is None else [event for event in events if counts(event)])
        time.sleep(PAUSE_S)
    view.curves.cursor = max(view.cursor, reader.cursor)  # the last ones may be superseded
    return view


def _filter_of(journal_dir: Path) -> tuple[int, Callable[[Event], bool] | None]:
    """Up to where the journal is known, and what of that counts; None: all of it."""
    tail = journal_tail(journal_dir)
    # The filter looks through the whole journal, for what a first attempt cannot have.
    return tail.seq, history_filter(journal_dir) if tail.attempt > 1 else None


def write_view(run_dir: Path, view: RunView) -> None:
    """Store a view beside the journal, for the next time; what goes wrong there does not matter."""
    # Several servers may watch a run, and each replaces the file as a whole.
    temporary = run_dir / f".{STORE_NAME}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        data = msgspec.msgpack.encode(_Stored(_VERSION, head_of(run_dir), view))
        temporary.write_bytes(data)
        os.replace(temporary, run_dir / STORE_NAME)
    except (OSError, ValueError, TypeError, RecursionError):
        with contextlib.suppress(OSError):
            temporary.unlink()


def head_of(run_dir: Path) -> bytes:
    """Tells a journal from any other, also of the same name: the beginning of its first event. Raises `OSError`."""
    journal_dir = run_dir / JOURNAL_DIR
    try:
        with open(journal_dir / segment_name(segment_numbers(journal_dir)[0]), "rb") as file:
            return file.read(_HEAD).partition(b"\n")[0]
    except (FileNotFoundError, IndexError):
        return b""


def _stored_view(run_dir: Path) -> RunView:
    """What is stored, if it is of this journal, and of a version that we read."""
    try:
        stored = msgspec.msgpack.decode((run_dir / STORE_NAME).read_bytes(), type=_Stored)
        fits = stored.version == _VERSION and stored.head == head_of(run_dir)
        if fits and stored.view.cursor <= journal_tail(run_dir / JOURNAL_DIR).seq:
            health = stored.view.health  # it is not stored: few lines of the journal bear on it
            for event in EventFinder(run_dir / JOURNAL_DIR, health.types).find():
                if event.seq > stored.view.cursor:
                    break
                health.add(event)
            return stored.view
    except (OSError, ValueError, RecursionError):
        pass
    return RunView()
