"""How a rank ends: what it leaves for the next attempt, and its exit code."""

from __future__ import annotations

import atexit
import functools
import os
import sys
from types import TracebackType
from typing import NoReturn

import msgspec

from events.log import flush_stderr, logger
from events.messages import Status
from events.safe_files import list_below, make_folder_below, read_below, replace_below
from trainer.errors import PeerFailed

EXIT_CODE = 3
"""That of a process which another rank has ended."""
RANKS_DIR = "ranks"
_END_BYTES = 64 * 2**10


class RankEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a rank has ended an attempt: ``ranks/aN.rK.json`` in the run folder."""

    attempt: int
    rank: int
    host: str
    status: Status
    reason: str | None = None
    phase: str | None = None

    def write(self, run_dir: str) -> None:
        """Leave it for the next attempt; a failure is logged."""
        try:
            make_folder_below(run_dir, RANKS_DIR)
            data = msgspec.json.format(msgspec.json.encode(self), indent=2)
            replace_below(run_dir, f"{RANKS_DIR}/a{self.attempt}.r{self.rank}.json", data, durable=False)
        except OSError as error:
            logger.warning(f"the end of rank {self.rank} cannot be written to {run_dir}: {error}")


def ends_of(run_dir: str | os.PathLike[str], attempt: int) -> list[RankEnd]:
    """Return how the ranks have ended an attempt, if rank 0 has died in it, which else has published why it ended."""
    ends: list[RankEnd] = []
    try:
        names = [entry.name for entry in list_below(run_dir, RANKS_DIR) if entry.name.startswith(f"a{attempt}.r")]
        for name in names:
            data = read_below(run_dir, f"{RANKS_DIR}/{name}", _END_BYTES)
            ends.append(msgspec.json.decode(data, type=RankEnd))
    except (OSError, msgspec.MsgspecError):  # a copy of the folder may lack them: they are for people
        return []
    ends.sort(key=lambda one: one.rank)
    return [] if any(one.rank == 0 for one in ends) else ends


@functools.cache
def arm(rank: int) -> None:
    """Let an uncaught `PeerFailed` end this process with its exit code, without a traceback on each rank.

    The interpreter's own end is skipped: what it would take apart may hang, because another rank is gone.
    """
    before = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, PeerFailed):
            before(kind, error, trace)
        elif not error.reported and speaks(rank, error.rank):
            logger.error(str(error))

    sys.excepthook = report
    atexit.register(_exit_if_failed)


def speaks(rank: int, culprit: int) -> bool:
    """Whether this rank reports a failure on the terminal: one of the others must, and a culprit that knows of it.

    A rank that is cut off names itself: no other rank can report what it has seen.
    """
    return rank in (culprit, 1 if culprit == 0 else 0)


def _exit_if_failed() -> None:
    if isinstance(getattr(sys, "last_value", None), PeerFailed):
        exit_now()


def exit_now() -> NoReturn:
    """End this process at once, with what it has logged on its terminal."""
    flush_stderr()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(EXIT_CODE)
