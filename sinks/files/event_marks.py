"""Marks in TensorBoard's event files: the position in a run's history up to which they contain events.

An event file has times and steps, but no positions. So a record with the position follows each batch: a log message,
which TensorBoard ignores. All marks have the same length, so the last one is found from the end of a file, although
records can only be read from its beginning.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from typing import BinaryIO, NamedTuple

from sinks.files.appended import AppendedFile, Position, event_records, open_file

EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{1,12})\.", re.ASCII)
"""The start of an event file's name; its number is the time of its creation."""

_CHUNK = 2**20
_TEXT = re.compile(rb"stagecast [0-9a-f]{16} (\d{10}) (\d{20}) (\d{15})")


class Mark(NamedTuple):
    """The position of a run's last event in a file."""

    position: Position = (0, 0)
    milliseconds: int = 0
    """Unix time of the latest event, rounded up: a later event whose position is not greater belongs to another run of
    the same name."""

    def reached(self, position: Position, time: float) -> Mark:
        """Advance to a position; ``time``: the Unix time of the latest event up to it."""
        return Mark(position, max(self.milliseconds, math.ceil(time * 1_000)))

    def is_before(self, time: float) -> bool:
        """Whether all events happened before a Unix time."""
        return self.milliseconds < time * 1_000


def mark_record(run_id: str, mark: Mark) -> bytes:
    """Encode a mark as a record."""
    text = b"stagecast %b %010d %020d %015d" % (_digest(run_id), *mark.position, mark.milliseconds)
    # An `Event` with a `log_message` (6), whose fields are `level` (1), 20 for INFO, and `message` (2).
    message = b"\x08\x14\x12%c%b" % (len(text), text)
    return event_records([b"\x32%c%b" % (len(message), message)])


def go_on_in(folder: str, run_id: str, run_dir: str | None) -> Mark:
    """Find the last mark of a run in a folder, and prepare its file to be continued.

    A partial batch after the mark is cut away, because it is delivered again. Nearly always reads only the end of the
    newest file; files without a mark of the run are read completely.

    Args:
        run_dir: The run folder; no link below it is followed.

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
            with file.reader() as reader:  # again, because its writer may have closed it just before the lock
                mark, end = _last_mark(reader, run_id) or (Mark(), file.size)
            if file.size > end:
                file.cut(end)
        finally:
            file.close()
        return mark
    return Mark()


def _last_mark(file: BinaryIO, run_id: str) -> tuple[Mark, int] | None:
    """The last mark of a run in a file, and its end in bytes; None without a mark."""
    example = mark_record(run_id, Mark())
    begin = example[: example.index(_digest(run_id)) + 16]
    start = file.seek(0, os.SEEK_END)
    data = b""
    while start:
        length = min(start, _CHUNK)
        start -= length
        file.seek(start)
        data = file.read(length) + data[: len(example) - 1]  # a mark may cross chunks
        at = len(data)
        while (at := data.rfind(begin, 0, at)) >= 0:
            record = data[at : at + len(example)]
            if (found := _TEXT.search(record)) is not None:
                mark = Mark((int(found[1]), int(found[2])), int(found[3]))
                if record == mark_record(run_id, mark):  # including its checksum
                    return mark, start + at + len(record)
    return None


def _digest(run_id: str) -> bytes:
    return hashlib.sha256(run_id.encode("utf-8", "backslashreplace")).hexdigest()[:16].encode()
