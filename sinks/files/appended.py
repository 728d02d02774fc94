"""A file that a sink appends to: whole batches, each event once, even after the process was killed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

import msgspec

from events.errors import SinkMisconfigured
from events.log import logger
from events.messages import AudioLogged, Event, ImageLogged, TableLogged, TextLogged
from events.safe_files import UnsafeFile, make_folder_below, open_below, read_below
from events.sink import RunInfo

if sys.platform != "win32":
    import fcntl

_TAIL_BYTES = 2**20
"""Bytes of a file's end that are read first; they nearly always contain the last event."""

Position = tuple[int, int]
"""``attempt`` and ``seq`` of an event."""

Rows = Iterator[tuple[tuple[Position, float] | None, int]]
"""For each whole row: its event's position and Unix time (None: not an event of the run), and the row's end, in bytes
from the start of rows."""
LINE_BYTES = 64 * 2**20
"""Maximum bytes per line or row of a continued file, because lines are read into memory."""
_MEDIA_BYTES = 2**30
"""Maximum bytes per image or text in the run folder."""
_APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT
_RANGE = struct.Struct("hhqqi0q")
"""``struct flock``: type, origin of the start, start, length, process."""
_CLOCK_S = 1.0
"""Maximum seconds by which events may be out of order."""


class AppendedFile:
    """A file that grows by whole blocks, and has one writer at a time. Used by one thread.

    Args:
        path: The file; missing files and folders are created.
        run_dir: The run folder; no link below it is followed.

    Raises:
        SinkMisconfigured: It is reached through a link below ``run_dir``, or is not a regular file.
        OSError: It cannot be opened, or another run has it open. A retry may help.
    """

    def __init__(self, path: str, run_dir: str | None) -> None:
        self.path = path
        make_folders(os.path.dirname(path) or ".", run_dir)
        self._file = open(open_file(path, run_dir, _APPENDING), "a+b", buffering=0)  # noqa: SIM115  # see `close`
        self._cut_to: int | None = None  # start of a block that was only written in part
        try:
            self._lock()
        except BaseException:  # close the file first
            self._file.close()
            raise

    @property
    def size(self) -> int:
        """Its bytes."""
        return os.fstat(self._file.fileno()).st_size

    def reader(self) -> BinaryIO:
        """Open the file for reading from its beginning, with a descriptor of its own."""
        file = open(os.dup(self._file.fileno()), "rb")  # noqa: SIM115  # closed by the caller
        file.seek(0)
        return file

    def append(self, block: bytes) -> None:
        """Write a block to the operating system; if this raises, nothing of it stays. May wait for the disk.

        Raises:
            OSError: The disk is full or fails, or the file was deleted.
        """
        self._mend()
        status = os.fstat(self._file.fileno())
        if not status.st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the file was deleted while it was being written", self.path)
        left = memoryview(block)
        self._cut_to = status.st_size
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError:
            # The retry writes the block again, so cut its first part now or, if that fails, before the next block.
            with contextlib.suppress(OSError):
                self._mend()
            raise
        self._cut_to = None

    def cut(self, size: int) -> None:
        """Truncate the file to its first ``size`` bytes."""
        self._file.truncate(size)

    def close(self) -> None:
        """Flush to the disk and close. Raises `OSError` if the disk fails; the file is closed nevertheless."""
        if self._file.closed:
            return
        with self._file:
            self._mend()
            os.fsync(self._file.fileno())

    def _mend(self) -> None:
        if self._cut_to is not None:
            self.cut(self._cut_to)
            self._cut_to = None

    def _lock(self) -> None:
        """Lock the file, because two runs would cut each other's rows. The lock ends with the process."""
        if sys.platform != "win32":
            try:
                _lock(self._file.fileno(), self.path)
            except OSError as error:
                # A file system without locks is used without one.
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise OSError(
                        error.errno, "another run is writing to this file; wait for it, or give each its own", self.path
                    ) from None


def _lock(fd: int, path: str) -> None:
    """Lock a file that others may read. Raises `OSError`.

    A reader of a file can lock it with `flock`. A write lock on a range requires write access, and a reader's read lock
    is distinguishable from a run's lock: it is reported, and ignored.
    """
    if not hasattr(fcntl, "F_OFD_SETLK"):  # macOS: a process with read access can block the sink there
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    whole = _RANGE.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a kernel without such locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif _RANGE.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, whole))[0] == fcntl.F_RDLCK:
            logger.warning(f"{path} has a read lock of another process, so it is written without a lock")
        else:
            raise


class End(msgspec.Struct, frozen=True):
    """The end of a continued file."""

    size: int
    """Its bytes without a torn row."""
    last: Position
    """The run's last event in it; ``(0, 0)`` if there is none."""
    rows: int
    """Number of rows of that event."""
    time: float
    """Unix seconds of that event."""

    def is_of_another(self, first: Event) -> bool:
        """Whether the first delivered event belongs to another run of the same name, with the same numbers.

        An event that is delivered again is not later than the last one in the file.
        """
        return position_of(first) <= self.last and first.time > self.time + _CLOCK_S


def open_file(path: str, run_dir: str | None, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, following no link below the run folder; returns its descriptor.

    Raises:
        SinkMisconfigured: It is reached through a link below ``run_dir``, or is not a regular file.
        OSError: As `os.open` raises it.
    """
    name = _below(path, run_dir)
    if name is not None and run_dir is not None:
        with _explained():
            return open_below(run_dir, name, flags)
    more = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags | more, 0o666)  # follows a link that the user names
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SinkMisconfigured(f"{path} is not a regular file; name another path")
    return fd


def make_folders(path: str, run_dir: str | None) -> None:
    """Create a folder and its parents, following no link below the run folder. Raises as `open_file` does."""
    name = _below(path, run_dir)
    if name is None or run_dir is None:
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(run_dir, exist_ok=True)
    parts = [part for part in name.split("/") if part != "."]
    with _explained():
        for count in range(1, len(parts) + 1):
            make_folder_below(run_dir, "/".join(parts[:count]))


def _below(path: str, run_dir: str | None) -> str | None:
    """A path relative to the run folder; None if it is not below it."""
    if run_dir is None:
        return None
    try:
        name = os.path.relpath(os.path.abspath(path), os.path.abspath(run_dir)).replace(os.sep, "/")
    except ValueError:  # another drive
        return None
    return None if name.split("/")[0] == ".." else name


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except UnsafeFile as error:  # a retry cannot help
        raise SinkMisconfigured(f"{error}; remove it, or name another path") from error


Media = ImageLogged | AudioLogged | TableLogged | TextLogged
"""Events that may name a file of the run folder."""


def read_media(run_dir: str | None, event: Media, user: str) -> bytes | None:
    """Read the file of an image, sound, table or text in the run folder, following no link.

    Returns:
        None, with a warning, if the file was deleted or is unsafe: a retry cannot help.

    Raises:
        OSError: The disk fails. A retry may help.
    """
    try:
        if run_dir is None or event.path is None:
            raise FileNotFoundError("this run has no folder")
        return read_below(run_dir, event.path, _MEDIA_BYTES)
    except (FileNotFoundError, UnsafeFile, ValueError) as error:  # ValueError: a path that leads out of the folder
        logger.warning(f"{user} cannot show all of {event.name!r:.200} of step {event.global_step}: {error}")
        return None


def read_text(run_dir: str | None, event: TextLogged, user: str) -> bytes:
    """Read a whole text in UTF-8: that of its file or, with a warning if the file is missing, that of the event."""
    data = None if event.path is None else read_media(run_dir, event, user)
    return event.text.encode("utf-8", "backslashreplace") if data is None else data


def find_end(file: AppendedFile, rows_of: Callable[[Iterable[bytes]], Rows]) -> End:
    """Find the position to continue a file from. Reads its last megabyte, and all of it only if necessary.

    Args:
        rows_of: Reads whole rows from the lines of the file, or of its end.

    Raises:
        SinkMisconfigured: A line has more than `LINE_BYTES`.
    """
    with file.reader() as found:
        start = max(0, found.seek(0, os.SEEK_END) - _TAIL_BYTES)
        if start:
            found.seek(start)
            found.readline()  # the rest of a row; within a quoted row, the next rows match no run
            start = found.tell()
            end, is_all = _end_of(rows_of(_lines(found, file.path)), start)
            if is_all:
                return end
        found.seek(0)
        return _end_of(rows_of(_lines(found, file.path)), 0)[0]


def _lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    while line := file.readline(LINE_BYTES):
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            raise too_long(path)
        yield line


def too_long(path: str) -> SinkMisconfigured:
    """The error for a line or row longer than `LINE_BYTES`."""
    return SinkMisconfigured(f"{path} has a line of more than {LINE_BYTES:,} bytes; move it away, or name another path")


def _end_of(rows: Rows, start: int) -> tuple[End, bool]:
    """The end; and whether all rows of the last event were read, because an earlier event precedes them."""
    last: Position | None = None
    size = count = 0
    time = 0.0
    is_all = False
    for event, end in rows:
        size = end
        if event is None:
            continue
        position, time = event
        if position == last:
            count += 1
        else:
            is_all = last is not None
            last, count = position, 1
    return End(start + size, last or (0, 0), count, time), is_all


def position_of(event: Event) -> Position:
    """The position of an event in its run's history."""
    return event.attempt, event.seq


def newer(events: Sequence[Event], last: Position) -> Sequence[Event]:
    """The events after a position. Events arrive in order, so the first one nearly always decides."""
    if not events or position_of(events[0]) > last:
        return events
    return [event for event in events if position_of(event) > last]


def warn_of_another(user: str, path: str, run_id: str) -> None:
    """Warn that a file, or a folder of event files, now has two runs of one name."""
    logger.warning(
        f"{user} adds a run to {path}, which contains an earlier run of the same name, {run_id!r:.200}; give each run"
        f" its own name or path"
    )


def path_in(run: RunInfo, given: str | None, default: str, user: str) -> str:
    """The absolute path of a sink: the given one, or the default in the run folder.

    Raises:
        SinkMisconfigured: No path is given, and the run has no folder.
    """
    if given is not None:
        return os.path.abspath(given)
    if run.run_dir is None:
        raise SinkMisconfigured(
            f"{user} has no path, and this run has no folder for {default}; name a path, or enable the journal"
        )
    return os.path.join(run.run_dir, default)


def check_path(given: object, what: str) -> None:
    """Check an optional path.

    Raises:
        ValueError: It is not a path.
    """
    if given is not None and (not isinstance(given, str) or not given or "\0" in given):
        raise ValueError(f"{what}={given!r:.200}: give a path as a string, or None for one in the run folder")
