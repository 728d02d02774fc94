"""The folder that a run lives in: one run, one process at a time.

::

    <path>/
        run.lock          who holds it: {"pid": ..., "host": ..., "run_id": ..., "since": ...}
        arguments.json    the arguments of the newest attempt
        config.json       the user's hyperparameters of the newest attempt, if there are any
        journal/          the run's history (`events.journal.writer`)
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from events.bounds import LAST_ATTEMPT
from events.checkpoint.store import CHECKPOINTS_DIR, CheckpointStore
from events.errors import CheckpointError, RunFolderError, RunFolderHeld, RunFolderMismatch
from events.journal.segment import JOURNAL_DIR, segment_name, segment_numbers
from events.journal.tail import JournalTail, journal_tail
from events.safe_files import (
    UnsafeFile,
    make_folder_below,
    open_below,
    open_folder_below,
    open_lock_below,
    read_below,
    replace_below,
    stat_below,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_NAME = "run.lock"
ARGUMENTS_NAME = "arguments.json"
CONFIG_NAME = "config.json"

# What a second holder meets: EWOULDBLOCK from flock, EACCES or EDEADLOCK from Windows.
HELD = {errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS}
_QUIET_S = 120.0
"""Seconds without an event after which another user's run counts as over: a run reports its observers more often."""
_ATTEMPTS = 16
LOCK_BYTES = 65_536
_LOOKED_AT_S = 0.1
"""How long a folder must be held to be held by a run; who only looks lets go within microseconds."""


class Holder(msgspec.Struct, frozen=True):
    """What a lock file says about who holds the folder. For people: the lock itself is the operating
    system's."""

    pid: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    host: str
    run_id: str
    since: float
    """Unix seconds."""
    attempt: int = 0
    """The newest attempt that a holder has claimed."""
    is_pushed: bool = False
    """Whether a server holds it for a run that trains elsewhere, which may continue when the server has stopped."""

    def __str__(self) -> str:
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.since))
        except (OSError, OverflowError, ValueError):  # not a time: the file is damaged or a stranger's
            since = "an unknown time"
        host = self.host if self.host.isprintable() else repr(self.host)
        return f"process {self.pid} on {host:.255} (run {self.run_id!r:.255}, since {since})"


def run_id_of(run_dir: str | os.PathLike[str]) -> str | None:
    """The id of the run that a folder holds: by its journal, its checkpoints, or its last holder; None if it has none.

    Waits for the disk, and never raises: opening the folder says what is wrong with it.
    """
    folder = Path(run_dir)
    with contextlib.suppress(OSError, ValueError):
        if run_id := journal_tail(folder / JOURNAL_DIR).run_id:
            return run_id
    with contextlib.suppress(OSError, ValueError):
        store = CheckpointStore(folder / CHECKPOINTS_DIR)
        for name in reversed(store.names()):
            with contextlib.suppress(CheckpointError):
                return store.manifest(name).run_id
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return msgspec.json.decode(read_below(folder, LOCK_NAME, LOCK_BYTES), type=Holder).run_id or None
    return None


class RunFolder:
    """A run's folder, held from `open` to `close`.

    The hold is a lock on an open file, so it ends with the process however that dies, and a second `open`
    fails also within the same process. Forked children do not share in it. Used by one thread.
    """

    def __init__(
        self, path: Path, run_id: str, fd: int, tail: JournalTail, claimed: int, is_pushed: bool = False
    ) -> None:
        """Not called directly: see `open`."""
        self._path = path
        self._run_id = run_id
        self._is_pushed = is_pushed
        self._fd: int | None = fd
        self._tail = tail
        self._claimed = claimed
        _open_folders.add(self)

    @classmethod
    def open(cls, path: str | os.PathLike[str], run_id: str, *, is_pushed: bool = False) -> RunFolder:
        """Take a run's folder, creating it and its parents where they are missing. Does not wait for a
        holder, but a tenth of a second for who only looks.

        What it has created is removed again when it fails. ``is_pushed``: see `Holder`.

        Raises:
            RunFolderHeld: Another process, or another run of this one, holds it; the message names it.
            RunFolderMismatch: The journal there belongs to another run.
            RunFolderError: It is not a folder, cannot be made, read or written, or cannot be locked.
        """
        folder = Path(os.path.abspath(path))
        with contextlib.ExitStack() as undo:
            try:
                _make_folders(folder, undo)
                fd = _lock(folder, undo)
                _check_checkpoints(folder)
                if not os.path.lexists(folder / JOURNAL_DIR):
                    undo.callback(_remove, os.rmdir, folder / JOURNAL_DIR)
                make_folder_below(folder, JOURNAL_DIR)
                tail = _read_tail(folder, run_id)
                claimed = _claimed(fd, run_id)
                _sign(fd, run_id, claimed, is_pushed)
            except UnsafeFile as error:
                raise RunFolderError(
                    f"the run folder {folder} cannot be used: {error}; remove that, or choose another folder"
                ) from error
            except (OSError, ValueError) as error:  # ValueError: a path that no system call takes
                raise RunFolderError(
                    f"the run folder {folder} cannot be used: {error}; choose another folder, or make "
                    "this one a folder that you may write to, on a disk with room"
                ) from error
            undo.pop_all()
        return cls(folder, run_id, fd, tail, claimed, is_pushed)

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return self._path

    @property
    def journal_dir(self) -> Path:
        """The folder of the journal's segments; it exists."""
        return self._path / JOURNAL_DIR

    @property
    def last_attempt(self) -> int:
        """The newest attempt that is in the journal or was claimed when the folder was opened; 0 if there was none."""
        return max(self._tail.attempt, self._claimed)

    def claim(self, attempt: int) -> None:
        """Record durably that this attempt's number is in use, though nothing of it may reach the journal.

        Raises:
            RunFolderError: The folder was closed, or the disk refused.
        """
        path = self._path / LOCK_NAME
        if self._fd is None:
            raise RunFolderError(f"{path} cannot be written: the run folder was closed; claim before `close`")
        try:
            _sign(self._fd, self._run_id, attempt, self._is_pushed)
            os.fsync(self._fd)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error}; make room or choose another folder") from error

    @property
    def last_seq(self) -> int:
        """No event in the journal lay above it when the folder was opened; 0 for an empty one. Number on from
        here."""
        return self._tail.seq

    def write_json(self, name: str, values: Mapping[str, object]) -> None:
        """Write ``arguments.json`` or ``config.json``, replacing that of an earlier attempt at once and as a whole.

        The file is for people: a value that JSON does not have is written as text, NaN as null, and an infinity as
        ``1e999``, which readers of JSON take for one. The values of each attempt stay in the journal, in its
        `RunStarted`.

        Raises:
            RunFolderError: The folder was closed, or the disk refused; an earlier file is still there.
        """
        path = self._path / name
        if self._fd is None:
            raise RunFolderError(f"{path} cannot be written: the run folder was closed; write before `close`")
        text = msgspec.json.encode(_with_infinities(values), enc_hook=str)
        try:
            replace_below(self._path, name, msgspec.json.format(text, indent=2) + b"\n")
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error}; make room or choose another folder") from error

    def close(self) -> None:
        """Let the folder go. The lock file stays, as a trace of the last holder. May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


_open_folders: weakref.WeakSet[RunFolder] = weakref.WeakSet()


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether a process has the run's folder, so that more may be written to it.

    It takes the lock for a moment: the system answers nobody who only asks. `RunFolder.open` waits for that. Of another
    user's run, whose lock cannot be opened, it is known by how lately the journal was written.
    """
    try:
        fd = open_below(path, LOCK_NAME, os.O_RDWR)  # some network file systems lock only what may be written
    except OSError as error:
        return error.errno in _NOT_OURS and _is_written(Path(path))
    try:
        lock_descriptor(fd)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(fd)
    return False


def _is_written(folder: Path) -> bool:
    """Whether the newest segment of a journal has grown within `_QUIET_S`."""
    with contextlib.suppress(OSError):
        for number in segment_numbers(folder / JOURNAL_DIR)[-1:]:
            written = stat_below(folder, f"{JOURNAL_DIR}/{segment_name(number)}").st_mtime
            return abs(time.time() - written) < _QUIET_S  # an archive may hold a time that is to come
    return False


def _close_in_child() -> None:
    # A forked child shares the open file and with it the lock: an orphaned dataloader worker would hold the
    # folder of a trainer that is long dead. Closing its copy leaves the parent's lock alone, which unlocking
    # would not.
    for folder in list(_open_folders):
        folder.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _read_tail(folder: Path, run_id: str) -> JournalTail:
    tail = journal_tail(folder / JOURNAL_DIR)
    if tail.run_id not in ("", run_id):
        raise RunFolderMismatch(
            f"the run folder {folder} belongs to run {tail.run_id!r}, not to {run_id!r}; "
            f"choose another folder, or run_id={tail.run_id!r} to continue that run"
        )
    return tail


def _check_checkpoints(folder: Path) -> None:
    """See that the checkpoints do not lead elsewhere; taking one sees it too, but only once the run has begun."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open_folder_below(folder, CHECKPOINTS_DIR):
        pass


def _make_folders(folder: Path, undo: contextlib.ExitStack) -> None:
    """Create the folder and its parents, to be removed again on failure where they are still empty."""
    missing = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        missing.append(parent)
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        undo.callback(_remove, os.rmdir, parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _remove(how: Callable[[Path], object], path: Path) -> None:
    with contextlib.suppress(OSError):
        how(path)


def _lock(folder: Path, undo: contextlib.ExitStack) -> int:
    """Open the lock file and lock it. Raises `RunFolderHeld`, or `OSError` if the file system cannot lock."""
    path = folder / LOCK_NAME
    for _ in range(_ATTEMPTS):
        created = not os.path.lexists(path)
        fd = open_lock_below(folder, LOCK_NAME)
        try:
            _lock_patiently(fd)
        except OSError as error:
            try:
                if error.errno in HELD:
                    raise _held(path, fd) from None
                if created:
                    _remove(os.unlink, path)  # where nobody can lock, nobody holds it
                raise
            finally:
                os.close(fd)
        # Whoever held it before may have removed the file between our opening and our locking it: a lock on a
        # file that has no name excludes nobody.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), stat_below(folder, LOCK_NAME)):
                undo.callback(os.close, fd)
                if created:
                    undo.callback(_remove, os.unlink, path)  # before the close: while nobody else can hold it
                return fd
        os.close(fd)
    raise OSError(errno.EBUSY, "the lock file is removed again and again", str(path))


def _lock_patiently(fd: int) -> None:
    """Lock it; `is_held` in another process may hold it for a moment."""
    deadline = time.monotonic() + _LOOKED_AT_S
    while True:
        try:
            return lock_descriptor(fd)
        except OSError as error:
            if error.errno not in HELD or time.monotonic() > deadline:
                raise
        time.sleep(0.002)


def lock_descriptor(fd: int) -> None:
    """Lock an open file exclusively, or raise `OSError` with an errno of `HELD` if it is locked."""
    if sys.platform == "win32":
        # Windows forbids others to read what is locked, so lock a byte far behind the text.
        os.lseek(fd, 2**30, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _held(path: Path, fd: int) -> RunFolderHeld:
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        holder: object = msgspec.json.decode(os.read(fd, 4096), type=Holder)
    except (OSError, ValueError, OverflowError):
        holder = "a process that has not signed yet"
    return RunFolderHeld(
        f"the run folder {path.parent} is held by {holder}; wait for it, stop it, or choose another folder"
    )


def _claimed(fd: int, run_id: str) -> int:
    """The newest attempt that the file of a lock names for this run; 0 for none."""
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        holder = msgspec.json.decode(os.read(fd, LOCK_BYTES), type=Holder)
    except (ValueError, OverflowError, RecursionError):
        return 0
    return holder.attempt if holder.run_id == run_id and 0 <= holder.attempt < LAST_ATTEMPT else 0


def _sign(fd: int, run_id: str, attempt: int, is_pushed: bool) -> None:
    holder = Holder(os.getpid(), socket.gethostname(), run_id, time.time(), attempt, is_pushed)
    text = msgspec.json.encode(holder) + b"\n"
    # One write over the old text, which may be longer: a process that is killed here leaves a number that can be read.
    if (size := os.fstat(fd).st_size) > LOCK_BYTES:
        os.ftruncate(fd, 0)  # nobody signed that
    else:
        text += b" " * max(0, size - len(text))
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, text)


def _with_infinities(value: object) -> object:
    """JSON has no infinity, but numbers too large to be anything else."""
    if isinstance(value, dict):
        return {key: _with_infinities(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_infinities(part) for part in value]
    if isinstance(value, float) and math.isinf(value):
        return msgspec.Raw(b"1e999" if value > 0 else b"-1e999")
    return value
