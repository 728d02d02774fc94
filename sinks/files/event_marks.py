"""Marks in TensorBoard's event files: up to where in a run's history they go.

An event file knows times and steps, but not which events it has. So behind each batch stands a record that says it: a
message for a log, which TensorBoard reads and shows nowhere. All marks have one length, so that the last is found from
the end of a file, whose records can be read from its beginning only.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from typing import BinaryIO, NamedTuple

from sinks.files.appended import AppendedFile, Position, event_records, open_file

EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{1,12})\.", re.ASCII)
"""How the name of an event file begins; its number says when it was begun."""

_CHUNK = 2**20
_TEXT = re.compile(rb"stagecast [0-9a-f]{16} (\d{10}) (\d{20}) (\d{15})")


class Mark(NamedTuple):
    """Up to where a file has a run's events."""

    position: Position = (0, 0)
    milliseconds: int = 0
    """Unix time of the latest of them, rounded up: an event that is later, and not behind the position, belongs to a
    history that was begun anew under the same name."""

    def reached(self, position: Position, time: float) -> Mark:
        """With events up to a position, of which the latest happened at a Unix time."""
        return Mark(position, max(self.milliseconds, math.ceil(time * 1_000)))

    def is_before(self, time: float) -> bool:
        """Whether all of them happened before a Unix time."""
        return self.milliseconds < time * 1_000


def mark_record(run_id: str, mark: Mark) -> bytes:
    """The record that says it."""
    text = b"stagecast %b %010d %020d %015d" % (_digest(run_id), *mark.position, mark.milliseconds)
    # An `Event` with a `log_message` (6), whose fields are `level` (1), 20 for news, and `message` (2).
    message = b"\x08\x14\x12%c%b" % (len(text), text)
    return event_records([b"\x32%c%b" % (len(message), message)])


def go_on_in(folder: str, run_id: str, run_dir: str | None) -> Mark:
    """Up to where a folder has a run's events.

    What stands behind the last mark is a part of a batch, which comes again: it is cut away. Reads the end of the
    newest file, nearly always; all of those that have no mark of the run.

    Args:
        run_dir: The run's folder; no link below it is followed.

    Raises:
        OSError: A file cannot be read, or is still being written to.
    """
    names = [(int(found[1]), name) for name in os.listdir(folder) if (found := EVENT_FILE.match(name))]
    for _, name in sorted(names, reverse=True):
        path = os.path.join(folder, name)
        with open(open_file(path, run_dir), "rb") as reader:
            if _last_mark(reader, run_id) is None:
                continue
        file = AppendedFile(path, run_dir)
        try:
            with file.reader() as reader:  # again: its writer may have closed it a moment ago
                mark, end = _last_mark(reader, run_id) or (Mark(), file.size)
            if file.size > end:
                file.cut(end)
        finally:
            file.close()
        return mark
    return Mark()


def _last_mark(file: BinaryIO, run_id: str) -> tuple[Mark, int] | None:
    """The last mark of a run in a file, and where it ends; None if there is none."""
    example = mark_record(run_id, Mark())
    begin = example[: example.index(_digest(run_id)) + 16]
    start = file.seek(0, os.SEEK_END)
    data = b""
    while start:
        length = min(start, _CHUNK)
        start -= length
        file.seek(start)
        data = file.read(length) + data[: len(example) - 1]  # a mark may lie across
        at = len(data)
        while (at := data.rfind(begin, 0, at)) >= 0:
            record = data[at : at + len(example)]
            if (found := _TEXT.search(record)) is not None:
                mark = Mark((int(found[1]), int(found[2])), int(found[3]))
                if record == mark_record(run_id, mark):  # its checksum, too
                    return mark, start + at + len(record)
    return None


def _digest(run_id: str) -> bytes:
    return hashlib.sha256(run_id.encode("utf-8", "backslashreplace")).hexdigest()[:16].encode()
