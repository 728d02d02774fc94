"""Commands to a run from other processes: files in its folder, of the run's user, the folder's owner or root.

A command is one file of JSON under ``commands/``, put there as a whole by renaming it. The run looks a few times a
second, takes what it finds in the order in which it was sent, and removes it. Nothing listens anywhere, so there is
nothing to guard but the folder; it works wherever the run's folder can be seen, on a network file system too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from events.errors import RunFolderError, WireError
from events.log import in_this_run, logger
from events.protocol import AnyCommand
from events.run.folder import is_held
from events.safe_files import UnsafeFile, list_below, make_folder_below, read_below, replace_below, unlink_below
from events.wire import decode_command_json, encode_command_json

COMMANDS_DIR = "commands"
"""Within a run's folder."""
LOOK_S = 0.25
"""How often a run looks for commands."""
_COMMAND_BYTES = 2**20
_AHEAD_NS = 60 * 10**9
"""Nanoseconds by which the clock of another machine may be ahead."""
_COARSE_NS = 10**9
"""Nanoseconds by which times of a file system may be behind the clock."""


def send_command(run_dir: str | os.PathLike[str], command: AnyCommand) -> None:
    """Leave a command for the run of this folder. Waits for the disk, not for the run: `CommandTaken` tells of that.

    Raises:
        RunFolderError: No run is under way there, or the folder cannot be written to.
    """
    run_dir = Path(run_dir)
    if not is_held(run_dir):
        raise RunFolderError(f"no run is under way in {run_dir}, so nobody would take the command {command!r:.80}")
    name = f"{_name_of(time.time_ns())}-{uuid.uuid4().hex[:8]}"
    try:
        make_folder_below(run_dir, COMMANDS_DIR)
        replace_below(run_dir, f"{COMMANDS_DIR}/{name}.json", encode_command_json(command), durable=False)
    except OSError as error:
        raise RunFolderError(f"the command cannot be left in {run_dir / COMMANDS_DIR}: {error}") from error


class Inbox:
    """Takes the commands that are left for a run, on a thread of its own.

    Args:
        run_dir: The run's folder, which the caller holds.
        take: Gets each command, on the inbox's thread; must not raise.
        since_ns: Unix nanoseconds at which the run began to take its folder: what was left before was meant for an
            earlier attempt.
    """

    def __init__(self, run_dir: Path, take: Callable[[AnyCommand], None], since_ns: int) -> None:
        self._run_dir = run_dir
        self._take = take
        self._since_ns = since_ns
        self._over = threading.Event()
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=in_this_run(self._run), name="stagecast-inbox", daemon=True)

    def start(self) -> None:
        """Begin to look. Remove all that was not sent since the run began: to an earlier attempt, or by an archive."""
        names = _name_of(self._since_ns), _name_of(time.time_ns() + _AHEAD_NS)
        for entry in self._entries():
            was_here = entry.stat(follow_symlinks=False).st_ctime_ns < self._since_ns - _COARSE_NS
            if was_here or not names[0] <= entry.name <= names[1]:
                with contextlib.suppress(OSError):
                    unlink_below(self._run_dir, f"{COMMANDS_DIR}/{entry.name}")
        self._thread.start()

    def stop(self) -> None:
        """Look no more. Does not wait: the thread may be waiting for a disk."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(LOOK_S):
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
                    command = decode_command_json(data)
                except WireError as error:
                    logger.warning(f"{self._run_dir / path} is not a command: {error}")
                    continue
                if self._over.is_set():
                    return
                self._take(command)

    def _check_owner(self, entry: os.DirEntry[str]) -> None:
        """Raises `UnsafeFile` for the file of a user who is neither this one, nor the folder's owner, nor root."""
        owner = entry.stat(follow_symlinks=False).st_uid
        if hasattr(os, "geteuid") and owner not in (0, os.geteuid(), os.stat(self._run_dir).st_uid):
            raise UnsafeFile(errno.EPERM, f"it belongs to another user ({owner})")

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            entries = list_below(self._run_dir, COMMANDS_DIR)
        except UnsafeFile as error:
            self._warn(f"commands that are left in the folder are not taken: {error}; remove that")
            return []
        except OSError:  # nobody has left anything yet, or the disk does not answer
            return []
        return [entry for entry in entries if entry.name.endswith(".json") and not entry.name.startswith(".")]

    def _warn(self, problem: str) -> None:
        """Warn once: the thread meets the same a few times a second."""
        if problem not in self._warned and len(self._warned) < 100:
            self._warned.add(problem)
            logger.warning(problem)


def _name_of(time_ns: int) -> str:
    """Sorts by time."""
    return f"{time_ns:020d}"
