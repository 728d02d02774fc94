"""The request for a run of a service, kept in the run folder: it survives the service.

``job.json`` has the request and its state. The process that holds ``job.lock`` runs the job; if the state is not one
of `OVER` and no process holds the lock, the process that ran it has died.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from events.bounds import BoundName, BoundText, UnixTime
from events.run.folder import HELD, lock_descriptor
from events.run.summary import Summary
from events.safe_files import open_lock_below, read_below, replace_below

JOB_NAME = "job.json"
LOCK_NAME = "job.lock"
MOST_BYTES = 2**20
"""Maximum bytes per request, as JSON."""
_MOST_FILE_BYTES = MOST_BYTES + 2**16
"""Maximum bytes per file: a request of any allowed size has room for its state."""
JobState = Literal["queued", "starting", "running", "paused", "finished", "stopped", "failed", "cancelled"]
OVER: frozenset[str] = frozenset({"finished", "stopped", "failed", "cancelled"})
"""The states of a job that is not under way."""


class ServiceJob(msgspec.Struct, frozen=True):
    """A request for a run, and its state."""

    run_id: BoundName
    request: dict[str, Any]
    """Plain values, by which the service builds the run."""
    asked: UnixTime
    """Unix seconds of the request..."""
    updated: UnixTime = 0.0
    """...and of the newest state."""
    state: JobState = "queued"
    reason: BoundText | None = None
    """Why it stopped, or failed."""
    kills: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """How often the process of the service has died while it ran."""

    @property
    def is_over(self) -> bool:
        """Whether it is neither queued nor under way."""
        return self.state in OVER


def read_job(run_dir: str | os.PathLike[str]) -> ServiceJob | None:
    """Read the job of a run folder; None if there is none, or the file is damaged. Waits for the disk."""
    try:
        return msgspec.json.decode(read_below(run_dir, JOB_NAME, _MOST_FILE_BYTES), type=ServiceJob)
    except (OSError, ValueError, RecursionError):
        return None


def write_job(run_dir: str | os.PathLike[str], job: ServiceJob) -> ServiceJob:
    """Write a job to its run folder, durably; return it with the time of now.

    Only its owner may read the file, because arguments may hold secrets. Waits for the disk.

    Raises:
        OSError: The disk refused; the earlier file is still there.
        ValueError: The request has more than `MOST_BYTES`, or cannot be encoded.
    """
    # An exception's text may have lone surrogates, which cannot be encoded.
    reason = None if job.reason is None else job.reason.encode("utf-8", "backslashreplace").decode()[:2_000]
    job = msgspec.structs.replace(job, updated=time.time(), reason=reason)
    if (size := len(msgspec.json.encode(job.request))) > MOST_BYTES:
        raise ValueError(f"the request has {size:,} bytes, more than {MOST_BYTES:,}; give shorter arguments")
    replace_below(run_dir, JOB_NAME, msgspec.json.encode(job) + b"\n", mode=0o600)
    return job


def settle_job(run: Summary, job: ServiceJob | None) -> None:
    """Set the status of a run whose journal says nothing about its newest request: it is queued, or has failed."""
    if job is None:
        return
    run.run_id = run.run_id or job.run_id
    run.started, run.updated = run.started or job.asked, run.updated or job.updated
    if run.status == "running":
        return
    if job.state in ("queued", "starting") or (not job.is_over and run.status == "unknown"):
        run.status, run.reason, run.ended = "queued", None, None
        return
    is_unsaid = run.status in ("unknown", "lost", "queued") or run.updated < job.asked
    if job.state in ("failed", "cancelled") and is_unsaid:
        run.status = "failed" if job.state == "failed" else "cancelled"
        run.reason, run.ended, run.updated = job.reason, job.updated, job.updated
        if job.state == "failed":
            run.problems = [f"the run failed before its first event: {job.reason}"]


class FileLock:
    """An exclusive lock on a file, until `release` or the end of the process. Forked children do not share it."""

    def __init__(self, fd: int) -> None:
        """Not called directly: see `take`."""
        self._fd: int | None = fd
        _locks.add(self)

    @classmethod
    def take(cls, folder: Path, name: str) -> FileLock | None:
        """Lock a file of a folder, which is created if it is missing; None if someone else has it. Never waits.

        Raises:
            OSError: It cannot be opened, or the file system has no locks.
        """
        fd = open_lock_below(folder, name)
        try:
            lock_descriptor(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in HELD:
                return None
            raise
        if not os.fstat(fd).st_nlink:  # removed since it was opened: a lock on it excludes no other process
            os.close(fd)
            return None
        return cls(fd)

    def release(self) -> None:
        """Release it. May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # An orphaned dataloader worker would hold the job of a service that is dead.
    for lock in list(_locks):
        with contextlib.suppress(OSError):
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
