"""The view of a run from its journal, and the file in the run's folder that spares reading a long one again."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from events.folder import ARGUMENTS_NAME, CONFIG_NAME, LOCK_NAME
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
from events.safe_files import kind_of, list_below, open_below, read_below, replace_below, stat_below
from sinks.format import plain_text
from sinks.live.view import RunView, trimmed

STORE_NAME = "view.msgpack"
"""In a run's folder: the view as it was. It may be deleted."""
_VERSION = 5
_BATCH = 512
PAUSE_S = 0.0002
"""Between two batches of a long journal: so others on this interpreter wait 2 ms for it instead of 5, each time."""
_HEAD = 1_024
_TRIES = 3
_MOST_BYTES = 64 * 2**20
"""Maximum bytes of the stored view; a larger one is not written and not read."""
_MOST_REASON = 300


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
        reader = JournalReader(journal_dir, view.cursor)
        while events := reader.read(_BATCH):
            if any(type(event) is RunResumed and event.seq > known for event in events):
                return None
            view.add(trimmed(events if counts is None else [event for event in events if counts(event)]))
            time.sleep(PAUSE_S)
        view.curves.cursor = max(view.cursor, reader.cursor)  # the last ones may be superseded
        view.damaged(damage_of(run_dir) or damage_in(reader))
    except FileNotFoundError:
        pass  # the journal does not exist yet, or not any more
    except Exception as error:  # whatever a stranger has put there, it concerns this run alone
        view.damaged(reason_of(error, run_dir), is_broken=True)
    return view


def _filter_of(journal_dir: Path) -> tuple[int, Callable[[Event], bool] | None]:
    """Up to where the journal is known, and what of that counts; None: all of it."""
    tail = journal_tail(journal_dir)
    # The filter looks through the whole journal, for what a first attempt cannot have.
    return tail.seq, history_filter(journal_dir) if tail.attempt > 1 else None


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
    with contextlib.suppress(OSError):  # another server may watch the run, or the folder cannot be written
        replace_below(run_dir, STORE_NAME, data)


def head_of(run_dir: Path) -> bytes:
    """Tells a journal from any other, also of the same name: the beginning of its first event. Raises `OSError`."""
    try:
        number = segment_numbers(run_dir / JOURNAL_DIR)[0]
        with open(open_below(run_dir, f"{JOURNAL_DIR}/{segment_name(number)}"), "rb", buffering=0) as file:
            return file.read(_HEAD).partition(b"\n")[0]
    except (FileNotFoundError, IndexError):
        return b""


def _stored_view(run_dir: Path) -> RunView:
    """What is stored, if it is of this journal, of a version that we read, and whole; else an empty view."""
    try:
        stored = msgspec.msgpack.decode(read_below(run_dir, STORE_NAME, _MOST_BYTES), type=_Stored)
        fits = stored.version == _VERSION and stored.head == head_of(run_dir) and stored.view.is_sound
        if fits and stored.view.cursor <= journal_tail(run_dir / JOURNAL_DIR).seq:
            health = stored.view.health  # it is not stored: few lines of the journal bear on it
            for event in EventFinder(run_dir / JOURNAL_DIR, health.types).find():
                if event.seq > stored.view.cursor:
                    break
                health.add(event)
            return stored.view
    except Exception:  # whatever a stranger has put there, the journal is read instead
        pass
    return RunView()


# --------------------------------------------------------------------------------------------- damaged folders


_PARTS = {JOURNAL_DIR: True, "media": True, LOCK_NAME: False, ARGUMENTS_NAME: False, CONFIG_NAME: False}
_PARTS |= {"live.json": False, STORE_NAME: False}
"""What a run's folder may hold for who watches it; True for folders."""


def damage_of(run_dir: Path) -> str | None:
    """Name the first part of a run's folder that is a link, a special file, or a folder instead of a file.

    Waits for the disk, and opens nothing. Raises `OSError` if the folder cannot be read.
    """
    for name, is_folder in _PARTS.items():
        try:
            mode = stat_below(run_dir, name).st_mode
        except FileNotFoundError:
            continue
        if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
            return f"{name} is {kind_of(mode)} instead of a {'folder' if is_folder else 'file'}"
    return None


def damage_in(reader: JournalReader) -> str | None:
    """Name the first line that a reader has skipped, and count them; None for a whole journal.

    A line that a killed process has left unfinished is not damage.
    """
    bad = [line for line in reader.skipped if not line.torn]
    if not bad:
        return None
    more = f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""
    first = bad[0]
    return plain_text(f"{JOURNAL_DIR}/{Path(first.path).name}, line {first.line:,}{more}: {first.reason}", _MOST_REASON)


def reason_of(error: Exception, run_dir: Path) -> str:
    """Why a run could not be read, in one line, with paths as they are below its folder."""
    if isinstance(error, OSError) and error.filename is not None:
        path = os.path.relpath(os.fspath(error.filename), run_dir)
        return plain_text(f"{path}: {error.strerror}" if path != "." else str(error.strerror), _MOST_REASON)
    return plain_text(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, _MOST_REASON)
