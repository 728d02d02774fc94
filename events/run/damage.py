"""Describes the damage of a run folder, which may also be hostile."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from events.errors import WireError
from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR, open_segment, segment_numbers
from events.run.folder import ARGUMENTS_NAME, CONFIG_NAME, LOCK_NAME
from events.run.summary import Summary
from events.safe_files import UnsafeFile, kind_of, list_below, stat_below
from events.text import plain_text

_MOST_REASON = 300
_PARTS = {JOURNAL_DIR: True, "media": True, LOCK_NAME: False, ARGUMENTS_NAME: False, CONFIG_NAME: False}
_PARTS |= {"live.json": False, "view.msgpack": False, "entry.msgpack": False, "notes.json": False}
"""The parts of a run folder that clients see; True for folders."""


def damage_of(run_dir: Path) -> str | None:
    """Name the first part of a run folder that is a link, a special file, or a folder instead of a file.

    Waits for the disk, and opens nothing. Raises `OSError` if the folder cannot be read.
    """
    try:
        there = {entry.name: entry for entry in list_below(run_dir, ".")}
    except FileNotFoundError:
        return None
    for name, is_folder in _PARTS.items():
        entry = there.get(name)
        if entry is not None and not (entry.is_dir if is_folder else entry.is_file)(follow_symlinks=False):
            kind = kind_of(stat_below(run_dir, name).st_mode)
            return f"{name} is {kind} instead of a {'folder' if is_folder else 'file'}"
    return None


def unreadable(run_dir: Path) -> str | None:
    """Return why a journal cannot be read; None if it can, or does not exist. Waits for the disk."""
    journal_dir = run_dir / JOURNAL_DIR
    try:
        list_below(run_dir, JOURNAL_DIR)
        for number in segment_numbers(journal_dir):
            try:
                os.close(open_segment(journal_dir, number))
            except UnsafeFile:
                continue  # a reader skips it and reports it
    except FileNotFoundError:
        return None
    except OSError as error:
        return reason_of(error, run_dir)
    return None


def damage_in(reader: JournalReader) -> str | None:
    """Name the first line that a reader has skipped, with counts of lines and lost events; None for a whole journal.

    The unfinished line of a killed process is not damage.
    """
    bad = [line for line in reader.skipped if not line.torn]
    if not bad:
        return None
    count = reader.skipped_count - len(reader.skipped) + len(bad)  # the reader keeps the newest ones
    more = f", and {count - 1:,} more" if count > 1 else ""
    first = bad[0]
    lost = sum(line.last_seq - line.first_seq + 1 for line in bad if line.first_seq and line.last_seq)
    lacks = f" ({lost:,} event{'s are' if lost > 1 else ' is'} lost)" if lost else ""
    place = f"{JOURNAL_DIR}/{Path(first.path).name}, line {first.line:,}{more}"
    return plain_text(f"{place}: {first.reason:.200}{lacks}", _MOST_REASON)


def reason_of(error: Exception, run_dir: Path) -> str:
    """Return one line about a failed read, with paths relative to the run folder. Waits for the disk."""
    with contextlib.suppress(OSError):
        if (reason := damage_of(run_dir)) is not None:
            return reason
    if isinstance(error, OSError) and error.filename is not None:
        path = os.path.relpath(os.fspath(error.filename), run_dir)
        return plain_text(f"{path}: {error.strerror}" if path != "." else str(error.strerror), _MOST_REASON)
    name = "" if isinstance(error, WireError) else f"{type(error).__name__}: "
    return plain_text(f"{name}{error}", _MOST_REASON)


def add_damage(run: Summary, reason: str | None) -> None:
    """Add the reason of a damage, if there is one, and none is known yet."""
    if reason is None or run.damage is not None:
        return
    run.damage = reason
    run.problems = [damage_line(reason), *run.problems]
    run.settle(is_held=run.status == "running")


def damage_line(reason: str) -> str:
    """Return the problem that names a damage."""
    return f"the run's folder is damaged: {reason}"
