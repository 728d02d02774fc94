"""A project whose runs are pushed here, and a run of it. No endpoints: see `sinks.live.pushes`."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import BinaryIO

from events.errors import SinkMisconfigured, WireError
from events.journal.lines import decode_line, encode_lines
from events.journal.segment import JOURNAL_DIR
from events.journal.tail import journal_tail
from events.messages import Event, UnknownEvent
from events.run.copy import RunCopy
from events.safe_files import make_folder_below, replace_below
from events.text import plain_text
from sinks.live.access import Refused
from sinks.push.sink import PROJECT

MOST_RUNS = 10_000
"""Maximum run folders per project."""
MOST_PROJECT_BYTES = 100 * 2**30
"""Maximum bytes on disk per project, if no other limit is given."""
REQUESTS_PER_S, BURST = 50.0, 500.0
"""Maximum requests per second and project, in the long run and at once; further ones get 429."""
SILENT_S = 30.0
"""Seconds without a request after which a run is silent; its sender reports every `sinks.push.sender.ALIVE_S`."""
_ENDED_S = 5.0
"""Seconds without a request after which a run that has ended is complete."""
_RECOUNT_S = 600.0
"""Seconds between two counts of the bytes on disk: runs may be removed meanwhile."""
_FULL_S = 5.0
"""The same while the project is full: someone may make room."""
_LEAST_FREE_BYTES = 2**30
_LEAST_FILE_BYTES = 4_096
_PART_BYTES = 2**20


class Project:
    """The token of a project, and the limits of all its runs.

    Args:
        folder: Has its run folders.
        most_bytes: Maximum bytes on disk.
    """

    def __init__(self, folder: Path, token: str, most_bytes: int) -> None:
        self.folder = folder
        self.token = token.encode()
        self._most_bytes = most_bytes
        self._used_bytes, self._counted_at = 0, -_RECOUNT_S
        self._counting = threading.Lock()
        self._allowance, self._at = BURST, time.monotonic()

    def count_request(self) -> None:
        """Raise `Refused` for too many requests per second (a token bucket). In the event loop."""
        now = time.monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._at) * REQUESTS_PER_S)
        self._at = now
        if self._allowance < 1.0:
            raise Refused(
                429, f"the project sends more than {REQUESTS_PER_S:g} requests/s", headers={"retry-after": "1"}
            )
        self._allowance -= 1.0

    def reserve(self, size: int, path: Path) -> None:
        """Count bytes that are about to be written to a run folder. On a thread.

        Raises:
            Refused: The disk, or the limit of the project, leaves no room for them.
            OSError: The disk refused.
        """
        with self._counting:
            self.folder.mkdir(parents=True, exist_ok=True)
            if time.monotonic() - self._counted_at >= _RECOUNT_S:
                self._used_bytes, self._counted_at = _used_bytes(self.folder), time.monotonic()
            if self._used_bytes + size > self._most_bytes:
                self._counted_at = min(self._counted_at, time.monotonic() - _RECOUNT_S + _FULL_S)
                raise _full(f"the project has {self._used_bytes:,} bytes, of {self._most_bytes:,}; remove runs")
            if shutil.disk_usage(self.folder).free < _LEAST_FREE_BYTES + size:
                raise _full("the server's disk is nearly full; make room there")
            if not path.exists() and len(os.listdir(self.folder)) >= MOST_RUNS:
                raise _full(f"the project has {MOST_RUNS:,} runs, the maximum; remove some")
            self._used_bytes += max(size, _LEAST_FILE_BYTES)


class PushedRun:
    """One run, and its folder while its sender is there. Its methods wait for the disk: they run on threads."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self.heard_at = time.monotonic()
        """Time of the newest request..."""
        self.requests = 0
        """...and how many are handled now."""
        self._run_id = run_id
        self._copy = RunCopy(path, run_id, is_pushed=True)
        self._sender = ""
        self._lock = threading.Lock()  # its requests come one after the other, except those of an earlier connection

    def take_over(self, sender: str) -> dict[str, object]:
        """Let a sender take the place of an earlier one; return the newest event."""
        with self._lock:
            self._sender = sender
            tail = journal_tail(self.path / JOURNAL_DIR)
            newest = tail.events[-1] if tail.events else None
            line = None if newest is None else encode_lines([newest], newest.seq - 1)[:-1].decode()
            return {"cursor": tail.last_seq, "newest": line}

    def write(self, sender: str, body: bytes, ends: bool) -> int:
        """Append the events of some lines; return the ``seq`` of the newest durable one. Raises `Refused`."""
        with self._lock:
            self._check_sender(sender)
            lines = [line for line in body.split(b"\n") if line]
            if (lines or self.path.exists()) and not self._copy.is_open:
                self._copy.open()
            events: list[Event] = []
            cursor, attempt = self._copy.cursor, self._copy.attempt
            for line in lines:
                event, previous = self._decode(line)
                if event.seq <= cursor:
                    if event.attempt > attempt:
                        raise Refused(
                            422, f"attempt {event.attempt} begins before event {cursor}, which is here already"
                        )
                    continue
                if previous is None or previous > cursor:
                    raise Refused(409, f"event {event.seq} does not follow event {cursor}")
                events.append(event)
                cursor, attempt = event.seq, event.attempt
            self._copy.write(events, durable=True)
            if ends or (not lines and self._copy.has_ended):
                self._copy.release()
            return cursor

    def keep(self, sender: str, path: str, file: BinaryIO) -> None:
        """Write a file to the run folder, durably. Raises `Refused`."""
        with self._lock:
            self._check_sender(sender)
            if not self._copy.is_open:
                self._copy.open()
            parts = path.split("/")
            for end in range(1, len(parts)):
                make_folder_below(self.path, "/".join(parts[:end]))
            file.seek(0)
            replace_below(self.path, path, iter(partial(file.read, _PART_BYTES), b""))

    @property
    def is_quiet(self) -> bool:
        """Whether its sender has been silent for the time after which the server releases the folder."""
        quiet_s = time.monotonic() - self.heard_at
        return not self.requests and quiet_s > (_ENDED_S if self._copy.has_ended else SILENT_S)

    def release(self) -> None:
        """Release the folder; the next request takes it again."""
        with self._lock:
            self._copy.release()

    def _check_sender(self, sender: str) -> None:
        if sender != self._sender:
            raise Refused(409, "another sender has the run, or none has asked for its newest event")

    def _decode(self, line: bytes) -> tuple[Event, int | None]:
        try:
            event, previous = decode_line(line)
        except WireError as error:
            raise Refused(400, f"a line is not an event: {plain_text(str(error), 200)}") from None
        is_nameless = not event.run_id and isinstance(event, UnknownEvent)  # of a later version
        if (event.run_id != self._run_id and not is_nameless) or event.seq < 1:
            raise Refused(400, f"a line is event {event.seq} of run {plain_text(event.run_id, 80)!r}")
        return event, previous


def _full(reason: str) -> Refused:
    return Refused(507, reason, headers={"retry-after": "5"})


def _used_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += max(os.lstat(os.path.join(parent, name)).st_size, _LEAST_FILE_BYTES)
    return size


def read_tokens(path: str) -> dict[str, str]:
    """Read a file with a line ``PROJECT=TOKEN`` per project; empty lines and lines with ``#`` in front are skipped.

    Raises:
        SinkMisconfigured: It cannot be read, or a line is not of this form.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise SinkMisconfigured(f"the tokens of the projects cannot be read: {error}") from None
    tokens: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        project, equals, token = (part.strip() for part in line.partition("="))
        if line.strip() and not line.lstrip().startswith("#"):
            if not equals or not PROJECT.fullmatch(project) or project in tokens:
                raise SinkMisconfigured(f"{path}, line {number} is not PROJECT=TOKEN, or its project is there twice")
            tokens[project] = token
    if not tokens:
        raise SinkMisconfigured(f"{path} has no tokens; write a line PROJECT=TOKEN per project")
    return tokens
