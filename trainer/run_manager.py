"""Runs inside a service: queued for the device, held by one task group, and ended cleanly with it.

`trainer.examples.service` uses it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import anyio
from anyio.abc import TaskGroup

from events.run.run import Run

State = Literal["queued", "starting", "running", "finished", "stopped", "failed", "cancelled"]
OpenRun = Callable[[], AbstractAsyncContextManager[Run]]
MOST_JOBS = 100
"""Maximum number of runs that are queued or under way, and maximum number of runs that are remembered."""


class Unavailable(Exception):
    """A run cannot be started now."""


@dataclass(eq=False)
class ManagedRun:
    """A run from its request on, also after its end."""

    run_id: str
    state: State = "queued"
    reason: str | None = None
    """Why it stopped, or failed."""
    run: Run | None = None
    """Once it is under way."""
    stop_wanted: str | None = None
    """Why it is to stop as soon as it is under way."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    over: anyio.Event = field(default_factory=anyio.Event)


class RunManager:
    """Runs that share a device: a few at a time, the others queued. A failed run does not affect the others."""

    def __init__(self, tasks: TaskGroup, at_once: int) -> None:
        self.jobs: dict[str, ManagedRun] = {}  # in the order in which they were asked for
        self._tasks = tasks
        self._device = anyio.Semaphore(at_once)
        self._closing = False

    @classmethod
    @asynccontextmanager
    async def open(cls, at_once: int, stop_s: float) -> AsyncIterator[RunManager]:
        """Hold runs until the end of the block: it stops them with a checkpoint, and cancels them after ``stop_s``."""
        async with anyio.create_task_group() as tasks:
            manager = cls(tasks, at_once)
            yield manager  # an exception here, a cancellation too, cancels the task group, and thereby all runs
            manager._closing = True
            for job in manager.jobs.values():
                manager.stop(job, "the service shuts down")
            with anyio.move_on_after(stop_s):
                for job in manager.jobs.values():
                    await job.over.wait()
            tasks.cancel_scope.cancel()

    def start(self, run_id: str, open_run: OpenRun) -> ManagedRun:
        """Queue a run. Raises `Unavailable`."""
        under_way = [job for job in self.jobs.values() if not job.over.is_set()]
        if self._closing or len(under_way) >= MOST_JOBS:
            raise Unavailable("the service shuts down" if self._closing else f"{len(under_way)} runs are queued")
        if any(job.run_id == run_id for job in under_way):
            raise Unavailable(f"run {run_id} is queued or under way")
        self.jobs.pop(run_id, None)  # a resumed run goes to the end of the queue
        over = [job for job in self.jobs.values() if job.over.is_set()]
        for job in over[: max(0, len(self.jobs) + 1 - MOST_JOBS)]:
            del self.jobs[job.run_id]
        job = self.jobs[run_id] = ManagedRun(run_id)
        self._tasks.start_soon(self._train, job, open_run, name=f"run {run_id}")
        return job

    def stop(self, job: ManagedRun, reason: str) -> None:
        """Stop a run at its next step, with a checkpoint."""
        if job.run is not None:
            job.run.stop(reason)
        elif job.state == "queued":
            job.reason = reason
            job.scope.cancel()
        else:
            job.stop_wanted = reason  # its process or its trainer is starting: there is no step to stop at yet

    def position(self, job: ManagedRun) -> int | None:
        """The position in the queue, from 1; None for a run that is not queued."""
        queue = [other for other in self.jobs.values() if other.state == "queued"]
        return queue.index(job) + 1 if job in queue else None

    async def _train(self, job: ManagedRun, open_run: OpenRun) -> None:
        try:
            with job.scope:
                async with self._device:
                    job.state = "starting"
                    async with open_run() as job.run:  # the end of the block waits for the run, even if it is cancelled
                        job.state = "running"
                        if job.stop_wanted is not None:
                            job.run.stop(job.stop_wanted)
                    result = await job.run.result()
                    job.state, job.reason = result.status, result.reason
        except (Exception, SystemExit) as error:  # the run's border: the others are not affected
            job.state, job.reason = "failed", f"{type(error).__name__}: {error}"
        finally:
            if job.state in ("queued", "starting", "running"):
                job.state = "cancelled"
            job.over.set()
