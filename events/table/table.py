"""The table of the runs of a folder: one entry per run folder, cached as long as its journal does not change."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import msgspec

from events.journal.segment import JOURNAL_DIR, journal_head, segment_name, segment_numbers
from events.msgpack_keys import check_keys
from events.run.damage import add_damage, damage_of, reason_of
from events.run.folder import is_held
from events.run.job import JOB_NAME
from events.run.summary import Summary
from events.safe_files import guard, read_below, replace_below, stat_below
from events.table.entry import EntryReader, RunEntry
from events.table.folders import below, name_runs, run_folders
from events.table.notes import NOTES_INVALID, NOTES_NAME, Notes, read_notes

STORE_NAME = "entry.msgpack"
"""File in the run folder with the cached entry of a run that is over. It may be deleted."""
_VERSION = 1
_LEAST_STORED_BYTES = 64 * 1_024
"""Minimum bytes of a journal's newest segment whose entry is stored: a shorter one is read as quickly."""
_MOST_BYTES = 4 * 2**20
_ACTIVE_S = 10.0
"""Seconds by which the last look at a running run counts as older, so that these are looked at first."""
_ENDED = ("finished", "stopped", "cancelled", "failed", "lost", "silent")


class _StoredEntry(msgspec.Struct):
    version: int
    head: bytes
    """Of its journal."""
    stamp: tuple[int, ...]
    entry: RunEntry


class _Run(msgspec.Struct):
    """One folder, as of the last look."""

    stamp: tuple[int, ...] | None
    held: bool
    reason: str | None
    """The damage outside the journal's content."""
    entry: RunEntry
    reader: EntryReader | None
    """None for a run that is over and was read to its end."""
    looked_at: float
    """`time.monotonic` of the last look."""
    notes: Notes | None = None
    """The valid notes, or None."""
    notes_stamp: tuple[int, ...] | None = ()
    """That of their file when they were read; None without a file."""


class RunTable:
    """The entries of the runs in a folder, at any depth; or of the one run whose run folder it is.

    Each look finds new runs, and reads again only what has changed. Links in the folder are not followed: a user with
    write access to it could otherwise expose any folder. A link is listed as damaged, unless it points to another entry
    of the same folder. Belongs to one thread.

    Args:
        folder: It may not exist yet.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(folder))
        guard(self.folder)
        self._known: dict[Path, _Run] = {}
        self.is_behind = False
        """Whether the last look has skipped runs that are not known yet."""
        self.found: dict[str, tuple[Path, str]] = {}
        """Folder and own ``run_id`` of each run, by its name in the table."""

    @property
    def is_reading(self) -> bool:
        """Whether some journals were not read to their end: their entries lack values from the middle."""
        return any(run.reader is not None and run.reader.is_behind for run in self._known.values())

    def look(
        self,
        first_s: float = math.inf,
        known_s: float = math.inf,
        per_run_s: float = math.inf,
        ended_s: float = 0.0,
    ) -> list[RunEntry]:
        """Return the entries, the newest run first. Waits for the disk.

        Args:
            first_s: Seconds after which runs that are not known yet are left to the next look.
            known_s: Seconds after which runs that are known are left to the next look.
            per_run_s: Maximum seconds per run; the next look reads the rest of a long journal.
            ended_s: Minimum seconds between two looks at a run that is over.
        """
        began = time.monotonic()
        folders = run_folders(self.folder)
        known = {path: self._known[path] for path in folders if path in self._known}
        self.is_behind = False
        # The oldest look first, so that slow runs do not starve the others.
        for path in sorted(folders, key=lambda path: _age(known.get(path))):
            if path in known and known[path].reader is None and began < known[path].looked_at + ended_s:
                continue
            if time.monotonic() - began > (known_s if path in known else first_s):
                self.is_behind = self.is_behind or path not in known
            elif (run := self._look_at(path, per_run_s)) is not None:
                known[path] = run
            else:
                known.pop(path, None)
        self._known = known
        summaries = name_runs({path: run.entry.run for path, run in known.items()}, self.folder)
        self.found = {run.run_id: (path, known[path].entry.run.run_id) for path, run in summaries.items()}
        entries: list[RunEntry] = []
        for path, summary in summaries.items():
            entry, notes = known[path].entry, _notes_of(known[path], path)
            health = entry.health if notes is not None else [*entry.health, NOTES_INVALID]
            notes = notes or Notes()
            made = msgspec.structs.replace(
                entry,
                run=summary,
                name=summary.run_id,
                folder=below(path, self.folder),
                health=health,
                notes=notes,
            )
            summary.label, summary.colour = made.label if made.label != made.name else "", notes.colour
            entries.append(made)
        return sorted(entries, key=lambda entry: entry.run.started, reverse=True)

    def _look_at(self, path: Path, per_run_s: float) -> _Run | None:
        """Look at one run; None if it has not started, or was removed. Never raises for the content of its folder."""
        known = self._known.get(path)
        reader = known.reader if known is not None else None
        stamp: tuple[int, ...] | None = None
        held = False
        try:
            reason = damage_of(path)
            stamp, held = _stamp(path), is_held(path)
            is_read = known is not None and (known.reader is None or not known.reader.is_behind)
            if known is not None and is_read and (known.stamp, known.held, known.reason) == (stamp, held, reason):
                known.looked_at = time.monotonic()
                return known
            entry = _stored_entry(path, stamp) if known is None and not held and reason is None else None
            if entry is None:
                reader = reader or EntryReader(path)
                entry = reader.read(time.monotonic() + per_run_s)
                if not held and not reader.is_behind:
                    reader = None  # frees its memory
                    _store(path, stamp, entry)
        except FileNotFoundError:  # removed
            return None
        except Exception as error:  # of a damaged or hostile folder: other runs are unaffected
            reason, entry = reason_of(error, path), RunEntry(Summary())
            reader = None
        add_damage(entry.run, reason)
        if not entry.run.run_id and not entry.run.damage:
            return None
        return _Run(stamp, held, reason, entry, reader, time.monotonic())


def _age(known: _Run | None) -> float:
    """Return the key by which runs are looked at: new ones first, then the oldest look."""
    if known is None:
        return -math.inf
    return known.looked_at - (_ACTIVE_S if known.held else 0.0)


def _notes_of(known: _Run, path: Path) -> Notes | None:
    """Return the notes about a run, read again if their file has changed."""
    try:
        found = os.lstat(path / NOTES_NAME)
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError:
        stamp = None
    if stamp != known.notes_stamp:
        known.notes, known.notes_stamp = read_notes(path), stamp
    return known.notes


def _stamp(run_dir: Path) -> tuple[int, ...]:
    """Return a value that changes with the journal's newest segment, its folder and the run's job."""
    numbers = segment_numbers(run_dir / JOURNAL_DIR)
    job: tuple[int, ...] = ()
    with contextlib.suppress(FileNotFoundError):
        found = stat_below(run_dir, JOB_NAME)
        job = found.st_mtime_ns, found.st_ino
    if job and not numbers:
        return 0, 0, *job
    folder = stat_below(run_dir, JOURNAL_DIR)
    if not numbers:
        return (folder.st_ctime_ns,)
    newest = stat_below(run_dir, f"{JOURNAL_DIR}/{segment_name(numbers[-1])}")
    return numbers[-1], newest.st_size, newest.st_mtime_ns, newest.st_ctime_ns, folder.st_ctime_ns, *job


def _stored_entry(run_dir: Path, stamp: tuple[int, ...]) -> RunEntry | None:
    """Return the stored entry of a run if it is valid, and of this journal as it is now."""
    try:
        data = read_below(run_dir, STORE_NAME, _MOST_BYTES)
        check_keys(data, 8 * _MOST_BYTES)
        stored = msgspec.msgpack.decode(data, type=_StoredEntry)
        if stored.version == _VERSION and stored.stamp == stamp:
            return stored.entry if stored.head == journal_head(run_dir / JOURNAL_DIR) else None
    except Exception:  # missing, damaged or hostile: the journal is read instead
        pass
    return None


def _store(run_dir: Path, stamp: tuple[int, ...], entry: RunEntry) -> None:
    """Store the entry of a run that is over. Failures are ignored: the journal holds everything."""
    if stamp[1:2] < (_LEAST_STORED_BYTES,) or entry.run.status not in _ENDED or entry.run.damage is not None:
        return
    with contextlib.suppress(OSError, ValueError, TypeError, OverflowError, RecursionError):
        data = msgspec.msgpack.encode(_StoredEntry(_VERSION, journal_head(run_dir / JOURNAL_DIR), stamp, entry))
        check_keys(data, 8 * _MOST_BYTES)
        if len(data) <= _MOST_BYTES:
            replace_below(run_dir, STORE_NAME, data, durable=False)
