"""The copy of a run that trains elsewhere: its events, appended to a journal in a run folder here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import xxhash

from events.checkpoint.disk import sync_folder
from events.journal.tail import journal_tail
from events.journal.writer import Journal, JournalWriter
from events.messages import Event, RunEnded, RunStarted
from events.run.folder import RunFolder
from events.text import percent_encoded

_NAME_CHARS = 150


def folder_name(run_id: str) -> str:
    """Return the name of the folder for a copy, which leads nowhere else; a long one ends in a hash."""
    name = percent_encoded(run_id)
    return name if len(name) <= _NAME_CHARS else f"{name[:_NAME_CHARS]}-{xxhash.xxh3_64_hexdigest(name.encode())}"


class RunCopy:
    """Holds the folder of a copy from `open` to `release`. Used by one thread at a time.

    Args:
        path: The run folder.
        is_pushed: See `events.run.folder.Holder`.
    """

    def __init__(self, path: Path, run_id: str, *, is_pushed: bool = False) -> None:
        self.path = path
        self.cursor = 0
        """``seq`` of the last event, once it is open..."""
        self.attempt = 0
        """...and its attempt."""
        self.has_ended = False
        """Whether the loop of the newest attempt has ended."""
        self._run_id = run_id
        self._is_pushed = is_pushed
        self._folder: RunFolder | None = None
        self._journal: JournalWriter | None = None

    @property
    def is_open(self) -> bool:
        """Whether it holds its folder."""
        return self._folder is not None

    def open(self) -> None:
        """Take the folder, and find the end of its journal.

        Raises:
            RunFolderError: As `RunFolder.open`.
            OSError: The disk refused.
        """
        is_new = not self.path.exists()
        folder = RunFolder.open(self.path, self._run_id, is_pushed=self._is_pushed)
        try:
            if is_new:  # a crash of the machine must not take the folder from events that are durable
                for parent in (self.path, *self.path.parents[:2]):
                    sync_folder(parent)
            tail = journal_tail(folder.journal_dir)
        except BaseException:  # propagates unchanged, without the hold
            folder.close()
            raise
        self._folder = folder
        # Not `tail.seq`: an event that a killed process has announced by a segment, and not written, is sent again.
        self.cursor = tail.last_seq
        self._journal = JournalWriter(folder.journal_dir, Journal().segment_bytes, self.cursor, tail.segment)
        self._follow(tail.events)

    def write(self, events: Sequence[Event], *, durable: bool = False) -> None:
        """Append events after the cursor. If the disk refuses, it is released, and nothing is lost that was written.

        Args:
            durable: Whether they are on stable storage when this returns.

        Raises:
            OSError: The disk refused.
        """
        assert self._journal is not None
        if not events:
            return
        try:
            self._journal.write(events)
            if durable:
                self._journal.sync()
        except OSError:
            self.release()
            raise
        self.cursor = self._journal.written_seq
        self._follow(events)

    def release(self) -> None:
        """Close its files, and release the folder. May be called twice."""
        journal, self._journal = self._journal, None
        if journal is not None:
            with contextlib.suppress(OSError):
                journal.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()

    def _follow(self, events: Sequence[Event]) -> None:
        for event in events:
            self.attempt = event.attempt
            if isinstance(event, (RunStarted, RunEnded)):
                self.has_ended = isinstance(event, RunEnded)
