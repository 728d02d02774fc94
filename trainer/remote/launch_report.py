"""The exceptions that the launching process raises for a run that failed or crashed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import IO

from events.journal.tail import journal_tail
from events.messages import Event
from events.process import exit_in_words
from events.safe_files import open_below
from events.text import plain_text
from trainer.errors import LaunchedRunCrashed, LaunchedRunFailed, add_note
from trainer.remote.child import Failed, Ready, log_name

_LAST_EVENTS = 20
_TAIL_BYTES = 8 * 1024
_SHOWN_EVENTS = 3
_SHOWN_LINES = 20
_OWN_ERRORS = ("events.errors", "trainer.errors")


def error_of(failed: Failed, rank: int | None = None) -> BaseException:
    """The exception to raise for one of a launched process: an error of stagecast keeps its type.

    Args:
        rank: Of the process; None if it is the only one.
    """
    error: BaseException
    of = "" if rank is None or failed.name == "PeerFailed" else f"rank {rank}: "
    kind: Callable[[str], BaseException] | None = None
    if failed.module in _OWN_ERRORS:
        kind = getattr(importlib.import_module(failed.module), failed.name, None)
    if kind is not None:
        error = kind(f"{of}{failed.text}")
    else:
        name = failed.name if failed.module == "builtins" else f"{failed.module}.{failed.name}"
        message = f"{name}: {failed.text}" if failed.text else name
        error = LaunchedRunFailed(f"{of}{message}", type_name=name, text=failed.text, traceback=failed.traceback)
    add_note(error, f"in the launched process:\n{failed.traceback}")
    return error


def crash(
    factory: str,
    ready: Ready | None,
    own: Ready | None,
    returncode: int | None,
    early_log: IO[bytes],
    *,
    rank: int | None = None,
) -> LaunchedRunCrashed:
    """Make the exception for a process that died. Waits for the disk.

    Args:
        ready: The message of rank 0; None if it died before it sent `Ready`.
        own: That of the process itself.
        returncode: See `LaunchedRunCrashed.returncode`.
        early_log: The file with its output from before the run had a folder.
        rank: Of the process; None if it is the only one.
    """
    events = _events(ready)
    tail = _log_tail(own, rank or 0, early_log)
    error = LaunchedRunCrashed("", returncode=returncode, last_events=events[-_LAST_EVENTS:], log_tail=tail)
    how = exit_in_words(returncode)
    of = "" if rank is None else f" of rank {rank}"
    if ready is None:
        parts = [f"the process{of} that {factory!r} was to build a trainer in {how} before the run began"]
    else:
        step = max((event.global_step for event in events), default=0)
        parts = [f"the process{of} of run {ready.run_id} {how}"]
        if events:
            parts.append(
                f"its journal reaches global_step {step}, and ends with "
                + ", ".join(type(one).__name__ for one in events[-_SHOWN_EVENTS:])
            )
        folder = f", run_dir={ready.run_dir!r}" if ready.run_dir is not None else ""
        parts.append(
            f'to resume from its newest checkpoint, launch it again with run_id={ready.run_id!r}{folder}, resume="auto"'
        )
    log = None if own is None or own.run_dir is None else os.path.join(own.run_dir, log_name(rank or 0))
    where = "" if log is None else f" ({log})"
    error.args = (f"{'; '.join(parts)}. Its last output{where}:\n{_shown(tail)}",)
    return error


def _shown(tail: str) -> str:
    """The part of a log to show: its end, or the crashed thread's stack that `faulthandler` wrote."""
    lines = tail.splitlines()
    chosen = lines[-_SHOWN_LINES:]
    for number, line in enumerate(lines):
        if line.startswith("Current thread"):
            fatal = [one for one in lines[:number] if one.startswith("Fatal Python error")]
            chosen = [*fatal[-1:], *lines[number : number + _SHOWN_LINES]]
    return "\n".join(f"    {plain_text(line, 200)}" for line in chosen) or "    (nothing)"


def _events(ready: Ready | None) -> list[Event]:
    if ready is None or ready.journal_dir is None:
        return []
    try:
        return [event for event in journal_tail(ready.journal_dir).events if event.attempt == ready.attempt]
    except OSError:
        return []


def _log_tail(own: Ready | None, rank: int, early_log: IO[bytes]) -> str:
    """The end of this attempt's output."""
    try:
        if own is None or own.run_dir is None:
            begin, fd = 0, os.dup(early_log.fileno())
        else:
            begin, fd = own.log_offset, open_below(own.run_dir, log_name(rank))
        with open(fd, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(begin if begin <= size else 0, size - _TAIL_BYTES))  # it may have been cut since
            return log.read().decode("utf-8", "replace")
    except OSError:
        return ""
