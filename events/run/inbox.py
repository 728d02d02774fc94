"""Commands to a run: in its process directly, from other processes as files in its folder.

A file holds one command in JSON. It is written under ``commands/`` and appears there complete, because it is renamed.
The run looks for files a few times per second, takes them in the order in which they were sent, and removes them. Only
files of the run's user, the folder's owner or root are taken. This works wherever the run folder is visible, also on a
network file system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from pathlib import Path

from events.errors import RunFolderError, WireError
from events.log import in_this_run, logger
from events.protocol import AnyCommand, Commands
from events.run.folder import is_held
from events.run.pushed import is_pushed
from events.safe_files import (
    UnsafeFile,
    list_below,
    make_folder_below,
    open_folder_below,
    read_below,
    replace_below,
    unlink_below,
)
from events.wire import decode_command, encode_command

COMMANDS_DIR = "commands"
"""The folder of the files within a run folder."""
_LOOK_S = 0.25
"""Seconds between two looks for files."""
_COMMAND_BYTES = 2**20
_AHEAD_NS = 60 * 10**9
"""Nanoseconds by which the clock of another machine may be ahead."""
_COARSE_NS = 10**9
"""Nanoseconds by which times of a file system may be behind the clock."""


_Identity = tuple[int, int]
_here: dict[_Identity, Commands] = {}
"""The runs of this process, by the device and inode of their folders."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_here.clear)  # the runs are the parent's


def commands_of(run_dir: str | os.PathLike[str]) -> Commands:
    """Return where to send commands for the run of a folder; asks the disk for the folder's identity."""
    with contextlib.suppress(OSError):
        if (commands := _here.get(_identity_of(Path(run_dir)))) is not None:
            return commands
    return FolderCommands(run_dir)


class FolderCommands:
    """The `events.protocol.Commands` of a run in another process."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._run_dir = Path(run_dir)

    def send(self, command: AnyCommand) -> None:
        """Write a command to the run folder. Waits for the disk; `CommandTaken` reports that the run has taken it.

        Raises:
            RunFolderError: No run is under way there, or the folder is not writable.
        """
        run_dir = self._run_dir
        if not is_held(run_dir):
            raise RunFolderError(f"no run is under way in {run_dir}, so the command {command!r:.80} was not sent")
        if is_pushed(run_dir):
            raise RunFolderError(f"the run in {run_dir} trains elsewhere and is only pushed here; send commands there")
        name = f"{_name_of(time.time_ns())}-{uuid.uuid4().hex[:8]}"
        try:
            make_folder_below(run_dir, COMMANDS_DIR)
            replace_below(run_dir, f"{COMMANDS_DIR}/{name}.json", encode_command(command), durable=False)
        except OSError as error:
            raise RunFolderError(f"the command cannot be written to {run_dir / COMMANDS_DIR}: {error}") from error


class Inbox:
    """Receives the commands for a run: `commands_of` in this process, and files on a thread of its own.

    Args:
        run_dir: The run folder, which the caller holds.
        commands: Takes each command; must not raise. Any thread.
        since_ns: Unix nanoseconds at which the run started to open its folder: earlier files were meant for an earlier
            attempt.
    """

    def __init__(self, run_dir: Path, commands: Commands, since_ns: int) -> None:
        self._run_dir = run_dir
        self._commands = commands
        self._identity: _Identity | None = None
        self._since_ns = since_ns
        self._over = threading.Event()
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=in_this_run(self._run), name="stagecast-inbox", daemon=True)

    def start(self) -> None:
        """Start to receive. Removes files that were not sent since the run started: for an earlier attempt, or by an
        archive."""
        with contextlib.suppress(OSError):
            self._identity = _identity_of(self._run_dir)
            _here[self._identity] = self._commands
        names = _name_of(self._since_ns), _name_of(time.time_ns() + _AHEAD_NS)
        for entry in self._entries():
            was_here = entry.stat(follow_symlinks=False).st_ctime_ns < self._since_ns - _COARSE_NS
            if was_here or not names[0] <= entry.name <= names[1]:
                with contextlib.suppress(OSError):
                    unlink_below(self._run_dir, f"{COMMANDS_DIR}/{entry.name}")
        self._thread.start()

    def stop(self) -> None:
        """Receive no more. Does not wait: the thread may be waiting for a disk."""
        if self._identity is not None and _here.get(self._identity) is self._commands:
            del _here[self._identity]
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            for entry in self._entries():
                path = f"{COMMANDS_DIR}/{entry.name}"
                try:
                    self._check_owner(entry)
                    data = read_below(self._run_dir, path, _COMMAND_BYTES)
                except UnsafeFile as error:
                    self._warn(f"{self._run_dir / path} is not a command: {error}")
                    with contextlib.suppress(OSError):
                        unlink_below(self._run_dir, path)
                    continue
                except OSError:
                    continue
                try:
                    unlink_below(self._run_dir, path)
                except OSError:  # not ours to remove, or gone: it would be taken again and again
                    continue
                try:
                    command = decode_command(data)
                except WireError as error:
                    logger.warning(f"{self._run_dir / path} is not a command: {error}")
                    continue
                if self._over.is_set():
                    return
                self._commands.send(command)

    def _check_owner(self, entry: os.DirEntry[str]) -> None:
        """Raises `UnsafeFile` for the file of a user who is neither this one, nor the folder's owner, nor root."""
        owner = entry.stat(follow_symlinks=False).st_uid
        if hasattr(os, "geteuid") and owner not in (0, os.geteuid(), os.stat(self._run_dir).st_uid):
            raise UnsafeFile(errno.EPERM, f"it belongs to another user ({owner})")

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            entries = list_below(self._run_dir, COMMANDS_DIR)
        except UnsafeFile as error:
            self._warn(f"commands from other processes are not taken: {error}; remove it")
            return []
        except OSError:  # no command was sent yet, or the disk failed
            return []
        return [entry for entry in entries if entry.name.endswith(".json") and not entry.name.startswith(".")]

    def _warn(self, problem: str) -> None:
        """Warn once per problem: the thread finds it a few times per second."""
        if problem not in self._warned and len(self._warned) < 100:
            self._warned.add(problem)
            logger.warning(problem)


def _identity_of(run_dir: Path) -> _Identity:
    """Return the device and inode of a run folder. Raises `OSError`."""
    with open_folder_below(run_dir, ".") as (fd, path):
        found = os.stat(path if fd is None else fd)
    return found.st_dev, found.st_ino


def _name_of(time_ns: int) -> str:
    """Return the beginning of a file name, which sorts by time."""
    return f"{time_ns:020d}"
