"""The jobs of a service in the folder of its runs: asked for, listed, and each taken by one process.

All methods wait for the disk. Several processes may use one folder: locks, which end with a process, however that dies,
decide who has a job, and who has a slot of the device.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from events.journal.segment import JOURNAL_DIR
from events.run.folder import is_held
from events.run.job import JOB_NAME, LOCK_NAME, FileLock, JobState, ServiceJob, read_job, write_job
from events.safe_files import make_folder_below, read_below, replace_below, unlink_below

MOST_JOBS = 100
"""Maximum jobs that are queued or under way."""
MOST_LISTED = 1_000
"""Maximum jobs that are listed, the newest ones, beside those that are not over."""
MOST_KILLS = 5
"""Maximum kills of the service per job; beyond it the job fails, because it may be the cause."""
_SLOTS_DIR = ".slots"
_WISH_NAME = "job-stop.json"
_OVER_S = 0.5
"""Seconds for which a request waits for the process of a job that is over to release it."""


class Unavailable(Exception):
    """A job cannot be started, or commanded, in its state."""


class Wish(msgspec.Struct):
    """A request to end a job, from a process that does not have it."""

    cancel: bool = False
    reason: str = ""


@dataclass(eq=False)
class TakenJob:
    """A job, locked by this process."""

    job: ServiceJob
    folder: Path
    lock: FileLock

    def set(self, state: JobState, reason: str | None) -> None:
        """Write its state. Raises `OSError`; it is set all the same."""
        self.job = msgspec.structs.replace(self.job, state=state, reason=reason)
        self.job = write_job(self.folder, self.job)

    @property
    def is_held(self) -> bool:
        """Whether the run of an earlier attempt still holds the folder."""
        return is_held(self.folder)

    def wish(self) -> Wish | None:
        """Take the request of another process; None if there is none."""
        try:
            data = read_below(self.folder, _WISH_NAME, 65_536)
            _forget_wish(self.folder)
            return msgspec.json.decode(data, type=Wish)
        except (OSError, ValueError, RecursionError):
            return None


class JobFolder:
    """The folder of a service. Any thread; `ask` and `take_orphans` one call at a time.

    Args:
        path: It is made if it is missing.
        slots: Maximum runs that are under way, in all processes.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self.path = path
        self._slots = slots
        self._read: dict[str, tuple[tuple[int, ...], ServiceJob]] = {}
        path.mkdir(parents=True, exist_ok=True)
        make_folder_below(path, _SLOTS_DIR)

    def all(self) -> list[ServiceJob]:
        """Return the newest jobs, and all that are not over, in the order of their requests.

        A file that has not changed is not read again.
        """
        read: dict[str, tuple[tuple[int, ...], ServiceJob]] = {}
        with os.scandir(self.path) as entries:
            folders = list(entries)
        for entry in folders:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(entry.path, JOB_NAME))
                stamp = found.st_mtime_ns, found.st_size, found.st_ino
                known = self._read.get(entry.name)
                job = known[1] if known is not None and known[0] == stamp else read_job(entry.path)
                if job is not None and job.run_id == entry.name:
                    read[entry.name] = stamp, job
        self._read = read
        jobs = sorted((job for _, job in read.values()), key=lambda job: job.asked)
        oldest = len(jobs) - MOST_LISTED
        return [job for index, job in enumerate(jobs) if index >= oldest or not job.is_over]

    def ask(self, run_id: str, request: dict[str, Any], again: bool) -> TakenJob:
        """Write a new job, durably, and take it.

        Raises:
            Unavailable: There is no room, or the name is taken.
            OSError, ValueError: It cannot be written.
        """
        under_way = sum(not job.is_over for job in self.all())
        if under_way >= MOST_JOBS:
            raise Unavailable(f"{under_way} runs are queued or under way, the maximum; wait for one of them")
        run_dir = self.path / run_id
        is_new = not run_dir.exists()
        make_folder_below(self.path, run_id)
        lock = _lock(run_dir)
        try:
            before = read_job(run_dir)
            if lock is None or (before is not None and not before.is_over) or is_held(run_dir):
                raise Unavailable(f"run {run_id} is queued or under way; wait for it, or choose another run_id")
            if not again and (before is not None or (run_dir / JOURNAL_DIR).exists()):
                state = "here" if before is None else before.state
                raise Unavailable(f"run {run_id} is {state} already; ask to continue it, or choose another run_id")
            _forget_wish(run_dir)
            return TakenJob(write_job(run_dir, ServiceJob(run_id, request, time.time())), run_dir, lock)
        except BaseException:  # propagates unchanged, without what was made
            if lock is not None:
                if is_new:
                    with contextlib.suppress(OSError):
                        unlink_below(run_dir, LOCK_NAME)
                        run_dir.rmdir()
                lock.release()
            raise

    def take_orphans(self, own: Container[str]) -> list[TakenJob]:
        """Take the jobs whose process has died, the oldest first; one that has killed it too often fails.

        Args:
            own: The names of the jobs that this process has.
        """
        taken: list[TakenJob] = []
        for listed in self.all():
            run_dir = self.path / listed.run_id
            if listed.is_over or listed.run_id in own:
                continue
            with contextlib.suppress(OSError):
                lock = FileLock.take(run_dir, LOCK_NAME)
                if lock is not None and (one := _queued_again(run_dir, lock)) is not None:
                    taken.append(one)
        return taken

    def take_slot(self) -> FileLock | None:
        """Take a slot of the device; None if all are taken."""
        slots = (FileLock.take(self.path, f"{_SLOTS_DIR}/{number}.lock") for number in range(self._slots))
        return next((slot for slot in slots if slot is not None), None)

    def wish(self, run_id: str, wish: Wish) -> None:
        """Ask the process that has a job to end it. Raises `Unavailable` for one that is over."""
        job = read_job(self.path / run_id)
        if job is None or job.is_over:
            raise Unavailable(f"run {run_id} is {'unknown' if job is None else job.state}")
        replace_below(self.path / run_id, _WISH_NAME, msgspec.json.encode(wish))


def _queued_again(run_dir: Path, lock: FileLock) -> TakenJob | None:
    """Queue the job of a process that has died; None, with the lock released, if it does not run again."""
    queued: TakenJob | None = None
    try:
        job = read_job(run_dir)
        if job is not None and not job.is_over:
            kills = job.kills + (job.state != "queued")
            one = TakenJob(msgspec.structs.replace(job, kills=kills), run_dir, lock)
            if kills > MOST_KILLS:
                one.set("failed", f"the service was killed {kills} times while it ran")
            else:
                one.set("queued", None)
                queued = one
        return queued
    finally:
        if queued is None:
            lock.release()


def _lock(run_dir: Path) -> FileLock | None:
    deadline = time.monotonic() + _OVER_S
    while (lock := FileLock.take(run_dir, LOCK_NAME)) is None:
        job = read_job(run_dir)
        if job is None or not job.is_over or time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    return lock


def _forget_wish(run_dir: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        unlink_below(run_dir, _WISH_NAME)
