"""The segments of a journal as files: their names, and the lines in one, whoever prepared the folder.

Segments are opened as `events.safe_files` opens files: the journal's folder and its segments are never links, and only
regular files are read. A line has a maximum size, so a file without newlines costs neither memory nor more time than
reading its data once, up to a bound; holes of a sparse file are skipped.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from pathlib import Path
from typing import BinaryIO

import msgspec

from events.journal.lines import is_checked
from events.safe_files import open_below, open_folder_below

JOURNAL_DIR = "journal"
"""The journal's folder within a run's folder."""

MAX_LINE_BYTES = 8 * 2**20
"""Maximum bytes per line, its newline not counted: some 100,000 metrics in one event, or a configuration of that size.

The writer records a `JournalGap` in place of a larger event; readers skip and report a longer line.
"""

MAX_SEGMENT = 2**52
"""Maximum number of a segment: each ``seq`` after it still fits a float of JSON."""

_SEGMENT = re.compile(r"\d{20}\.jsonl", re.ASCII)
_CHUNK = 2**20
_HEAD = 1_024
_SCAN_BYTES = 256 * 2**20
"""Maximum bytes of data that are searched for the end of a line that is too long; then the rest is skipped."""
_RANGES = 1_024
_LOOKED_AT = 16
"""Maximum lines per read that are looked at for a checksum until one has one."""
_SEEK_DATA = getattr(os, "SEEK_DATA", None)
_SEEK_HOLE = getattr(os, "SEEK_HOLE", None)


class TooLong(msgspec.Struct, frozen=True):
    """In place of a line with more than `MAX_LINE_BYTES`."""

    length: int
    """Bytes, without the newline; up to the end of the file if there is none yet."""


def segment_name(number: int) -> str:
    """The file name of the segment whose first event has this ``seq``."""
    return f"{number:020d}.jsonl"


def segment_numbers(journal_dir: str | os.PathLike[str]) -> list[int]:
    """List the numbers of a journal's segments, ascending; none if the folder does not exist.

    Raises:
        UnsafeFile: The folder is a link.
        OSError: It cannot be listed.
    """
    root, name = _place(journal_dir)
    try:
        with open_folder_below(root, name) as (fd, path):
            names = os.listdir(path if fd is None else fd)
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = (int(name[:20]) for name in names if _SEGMENT.fullmatch(name))
    return sorted(number for number in numbers if number <= MAX_SEGMENT)


def open_segment(journal_dir: str | os.PathLike[str], number: int, flags: int = os.O_RDONLY) -> int:
    """Open a segment and return its descriptor. Raises as `events.safe_files.open_below`."""
    root, name = _place(journal_dir)
    return open_below(root, f"{name}/{segment_name(number)}", flags, 0o644)


def journal_head(journal_dir: str | os.PathLike[str]) -> bytes:
    """Return the start of a journal's first event, which identifies it; empty without one. Raises `OSError`."""
    try:
        with open(open_segment(journal_dir, segment_numbers(journal_dir)[0]), "rb", buffering=0) as file:
            return file.read(_HEAD).partition(b"\n")[0]
    except (FileNotFoundError, IndexError):
        return b""


class SegmentLines:
    """Reads the lines of one segment, which may grow, in order and each once. Belongs to one thread.

    Memory: one line and ``chunk_bytes``, a mebibyte by default.
    """

    def __init__(self, journal_dir: str | os.PathLike[str], number: int, chunk_bytes: int | None = None) -> None:
        self._dir = journal_dir
        self._chunk_bytes = chunk_bytes or _CHUNK
        self.number = number
        self.start = 0
        """Offset of the first line that `read` returned last, or of `rest`."""
        self.rest = b""
        """The beginning of a line whose newline `read` did not find."""
        self.checked = False
        """Whether lines of this segment have checksums: then all have."""
        self.finished = False
        """Whether everything in it was read, and a newer segment exists: its reader sets it."""
        self._next = 0
        self._in_long_line = False  # `_next` lies within a line that was returned as `TooLong`

    def read(self) -> list[bytes | TooLong]:
        """Return the next whole lines without their newlines, at least one; none when no more are written yet.

        Raises:
            UnsafeFile: The segment is not a regular file.
            OSError: It cannot be read, or is gone.
        """
        self.rest = b""
        with open(open_segment(self._dir, self.number), "rb", buffering=0) as file:
            if self._in_long_line:
                self._next, self._in_long_line = _after_long_line(file, self._next)
                if self._in_long_line:
                    return []
            self.start = self._next
            file.seek(self.start)
            data = file.read(self._chunk_bytes)
            newline = data.rfind(b"\n")
            while newline < 0 and len(data) <= MAX_LINE_BYTES and (more := file.read(self._chunk_bytes)):
                newline = more.rfind(b"\n")
                newline += len(data) if newline >= 0 else 0
                data += more
            first = data.find(b"\n", 0, newline + 1)
            if first > MAX_LINE_BYTES:
                self._next += first + 1
                return [TooLong(first)]
            if newline >= 0:
                self._next += newline + 1
                lines = data[:newline].split(b"\n")
                self.checked = self.checked or any(map(is_checked, lines[:_LOOKED_AT]))
                return list[bytes | TooLong](lines)
            if len(data) <= MAX_LINE_BYTES:
                self.rest = data
                return []
            self._next, self._in_long_line = _after_long_line(file, self.start + len(data))
            return [TooLong(self._next - self.start - (0 if self._in_long_line else 1))]


def read_tail(journal_dir: str | os.PathLike[str], number: int, length: int) -> tuple[bytes, bool]:
    """Read the last bytes of a segment, a newline for each hole; and say whether these are all of them.

    Raises:
        UnsafeFile: The segment is not a regular file.
        OSError: It cannot be read, or is gone.
    """
    with open(open_segment(journal_dir, number), "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        parts: list[bytes] = []
        for start, end in reversed(_data_of(file, size)):
            file.seek(max(start, end - length))
            parts.append(file.read(end - file.tell()))
            length -= len(parts[-1])
            if length <= 0:
                return b"\n".join(reversed(parts)), file.tell() - len(parts[-1]) <= 0
        return b"\n".join(reversed(parts)), True


def _data_of(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """List the ranges of data between the holes of a file, the last ones of many."""
    found: deque[tuple[int, int]] = deque(maxlen=_RANGES)
    end = 0
    while end < size and (start := _next_data(file, end, size)) < size:
        end = size if _SEEK_HOLE is None else file.seek(start, _SEEK_HOLE)
        found.append((start, end))
    return list(found)


def _after_long_line(file: BinaryIO, offset: int) -> tuple[int, bool]:
    """Find where the next line begins; or the end of the file, and True if the line may continue there."""
    end = file.seek(0, os.SEEK_END)
    limit = _SCAN_BYTES
    while offset < end and limit > 0:
        offset = _next_data(file, offset, end)
        file.seek(offset)
        chunk = file.read(_CHUNK)
        if not chunk:
            break
        newline = chunk.find(b"\n")
        if newline >= 0:
            return offset + newline + 1, False
        offset += len(chunk)
        limit -= len(chunk)
    return max(offset, end), True


def _next_data(file: BinaryIO, offset: int, end: int) -> int:
    """Skip the hole of a sparse file, where the system can name it."""
    if _SEEK_DATA is None:
        return offset
    try:
        return file.seek(offset, _SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else offset


def _place(journal_dir: str | os.PathLike[str]) -> tuple[Path, str]:
    """Split the path of a journal into the folder that contains it and its name there."""
    path = Path(os.path.abspath(journal_dir))
    return path.parent, path.name
