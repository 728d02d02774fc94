"""Runs inside a service: kept in a folder, queued for the device, held by one task group, and ended cleanly with it.

What was asked for is in the run folders (`events.run.job`), so a service that was killed continues its jobs. Several
processes may share a folder: one has each job, and together they run at most ``at_once``. `trainer.examples.service`
uses it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from events.errors import RunFolderError
from events.log import logger
from events.messages import CommandTaken
from events.protocol import AnyCommand
from events.run.inbox import commands_of
from events.run.job import FileLock, JobState, ServiceJob, read_job
from events.run.run import Run
from trainer.job_folder import JobFolder, TakenJob, Unavailable, Wish

OpenRun = Callable[[ServiceJob], AbstractAsyncContextManager[Run]]
"""Builds and opens the run of a job. It resumes a run that has checkpoints."""
_LOOK_S = 0.25
_ADOPT_S = 1.0
"""Seconds between two looks for jobs whose process has died, and for requests from other processes."""
_SHUTDOWN = "the service shuts down"

T = TypeVar("T")


@dataclass(eq=False)
class _Owned:
    """A job that this process has."""

    taken: TakenJob
    run: Run | None = None
    """Once it is under way."""
    stop_wanted: str | None = None
    """Why it is to stop as soon as it is under way."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    over: anyio.Event = field(default_factory=anyio.Event)
    writing: anyio.Lock = field(default_factory=anyio.Lock)
    """Held while a state is written: the final one is the last."""


class RunManager:
    """Runs that share a device: a few at a time, the others queued. A failed run does not affect the others.

    Belongs to an event loop; waits for the disk on threads of its own.
    """

    def __init__(self, folder: JobFolder, open_run: OpenRun, tasks: TaskGroup) -> None:
        """Not called directly: see `open`."""
        self._folder = folder
        self._open_run = open_run
        self._tasks = tasks
        self._owned: dict[str, _Owned] = {}
        self._line = anyio.Lock()  # its holder is the next one to get the device
        self._asking = anyio.Lock()
        self._threads = anyio.CapacityLimiter(4)
        self._closing = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, folder: str | os.PathLike[str], open_run: OpenRun, *, at_once: int = 1, stop_s: float = 60.0
    ) -> AsyncIterator[RunManager]:
        """Hold runs until the end of the block; take up the jobs of the folder that no process has.

        The end stops running jobs with a checkpoint, and cancels them after ``stop_s``; they and the queued ones stay
        queued for the next service.

        Args:
            folder: Of the run folders; it is made if it is missing.
            at_once: Maximum runs that are under way, in all processes that share the folder.
        """
        async with anyio.create_task_group() as tasks:
            path = Path(os.path.abspath(folder))  # noqa: ASYNC240  # asks the system for the working directory only
            manager = cls(await anyio.to_thread.run_sync(JobFolder, path, at_once), open_run, tasks)
            await manager._adopt()
            tasks.start_soon(manager._watch, name="jobs")
            yield manager  # an exception here, a cancellation too, cancels the task group, and thereby all runs
            manager._closing = True
            for owned in list(manager._owned.values()):
                manager._stop(owned, _SHUTDOWN)
            with anyio.move_on_after(stop_s):
                for owned in list(manager._owned.values()):
                    await owned.over.wait()
            tasks.cancel_scope.cancel()

    # ------------------------------------------------------------------------------------------ requests

    async def start(self, run_id: str, request: Mapping[str, Any], *, again: bool = False) -> ServiceJob:
        """Queue a run; when it returns, the request is durable.

        Args:
            run_id: The name of the run and of its folder: one part of a path.
            request: Plain values, for ``open_run``.
            again: Whether to continue an earlier run of this name; otherwise the name must be new.

        Raises:
            Unavailable: There is no room, or the name is taken.
            ValueError: The request is too large, or has values that JSON does not have.
        """
        async with self._asking:
            if self._closing:
                raise Unavailable(_SHUTDOWN)
            taken = await self._on_thread(functools.partial(self._folder.ask, run_id, dict(request), again))
            self._own(taken)
            return taken.job

    async def jobs(self) -> list[ServiceJob]:
        """The jobs of the folder in the order of their requests, whichever process has them; see `JobFolder.all`."""
        return await self._on_thread(self._folder.all)

    async def job(self, run_id: str) -> ServiceJob | None:
        """A job by its name; None if there is none."""
        return await self._on_thread(functools.partial(read_job, self._folder.path / run_id))

    def position(self, job: ServiceJob, jobs: list[ServiceJob]) -> int | None:
        """The position in the queue, from 1, among the jobs of the folder; None for a job that is not queued."""
        queue = [other.run_id for other in jobs if other.state == "queued"]
        return queue.index(job.run_id) + 1 if job.run_id in queue else None

    async def stop(self, run_id: str, reason: str) -> None:
        """Stop a run at its next step, with a checkpoint; a queued one is cancelled. Raises `Unavailable` if over."""
        if (owned := self._owned.get(run_id)) is not None:
            self._stop(owned, reason)
        else:
            await self._on_thread(lambda: self._folder.wish(run_id, Wish(reason=reason)))

    async def cancel(self, run_id: str) -> None:
        """Cancel a job, without a checkpoint. Raises `Unavailable` if it is over."""
        if (owned := self._owned.get(run_id)) is not None:
            owned.scope.cancel()
        else:
            await self._on_thread(lambda: self._folder.wish(run_id, Wish(cancel=True)))

    async def send(self, run_id: str, command: AnyCommand) -> None:
        """Send a command to a run that is under way, in whichever process. Raises `Unavailable` if it is not."""
        try:
            await self._on_thread(lambda: commands_of(self._folder.path / run_id).send(command))
        except RunFolderError as error:
            job = await self.job(run_id)
            raise Unavailable(f"run {run_id} is {job.state}" if job is not None else str(error)) from None

    def run(self, run_id: str) -> Run | None:
        """The run of a job that is under way in this process; None for any other."""
        owned = self._owned.get(run_id)
        return None if owned is None or owned.over.is_set() else owned.run

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    # ------------------------------------------------------------------------------------- in the event loop

    def _own(self, taken: TakenJob) -> None:
        owned = self._owned[taken.job.run_id] = _Owned(taken)
        self._tasks.start_soon(self._train, owned, name=f"run {taken.job.run_id}")

    async def _adopt(self) -> None:
        async with self._asking:
            own = frozenset(self._owned)
            for taken in await self._on_thread(lambda: self._folder.take_orphans(own)):
                self._own(taken)

    async def _watch(self) -> None:
        is_failing = False
        while not self._closing:
            await anyio.sleep(_ADOPT_S)
            for one in list(self._owned.values()):
                wish = await self._on_thread(one.taken.wish)
                if wish is not None and wish.cancel:
                    one.scope.cancel()
                elif wish is not None:
                    self._stop(one, wish.reason)
            try:
                if not self._closing:
                    await self._adopt()
                is_failing = False
            except OSError as error:
                if not is_failing:
                    logger.warning(f"the jobs in {self._folder.path} cannot be read: {error}")
                is_failing = True

    def _stop(self, owned: _Owned, reason: str) -> None:
        if owned.run is not None:
            owned.run.stop(reason)
            return
        owned.stop_wanted = reason  # a run that starts has no step yet at which it could stop
        if owned.taken.job.state == "queued":
            owned.scope.cancel()

    async def _set(self, owned: _Owned, state: JobState, reason: str | None = None) -> None:
        """Write the state of a job. If the disk refuses, the run is not affected."""
        with anyio.CancelScope(shield=True):
            async with owned.writing:
                try:
                    await self._on_thread(lambda: owned.taken.set(state, reason))
                except OSError as error:
                    logger.warning(f"the state of run {owned.taken.job.run_id} cannot be written: {error}")

    async def _train(self, owned: _Owned) -> None:
        job, slot = owned.taken.job, None
        state: JobState = "cancelled"
        reason: str | None = None
        try:
            with owned.scope:
                slot = await self._turn(owned)
                async with self._open_run(job) as owned.run:  # the end of the block waits for the run
                    await self._set(owned, "running")
                    self._tasks.start_soon(self._follow_pauses, owned, owned.run)
                    if owned.stop_wanted is not None:
                        owned.run.stop(owned.stop_wanted)
                result = await owned.run.result()
                state, reason = result.status, result.reason
        except (Exception, SystemExit) as error:  # the run's border: the others are not affected
            state, reason = "failed", f"{type(error).__name__}: {error}"
        finally:
            reason = reason or (owned.stop_wanted if state == "cancelled" else None)
            is_closing = self._closing or self._tasks.cancel_scope.cancel_called
            if is_closing and (state == "cancelled" or (state, reason) == ("stopped", _SHUTDOWN)):
                state, reason = "queued", None  # for the next service
            owned.over.set()
            await self._set(owned, state, reason)
            for lock in (slot, owned.taken.lock):
                if lock is not None:
                    lock.release()
            del self._owned[job.run_id]

    async def _turn(self, owned: _Owned) -> FileLock:
        """Wait for the device, and for the end of an earlier attempt whose process is about to die."""
        async with self._line:
            while (slot := await self._on_thread(self._folder.take_slot)) is None:  # noqa: ASYNC110  # nothing reports it
                await anyio.sleep(_LOOK_S)
        try:
            await self._set(owned, "starting")
            while await self._on_thread(lambda: owned.taken.is_held):  # noqa: ASYNC110
                await anyio.sleep(_LOOK_S)
        except BaseException:  # propagates unchanged, without the slot
            slot.release()
            raise
        return slot

    async def _follow_pauses(self, owned: _Owned, run: Run) -> None:
        with contextlib.suppress(Exception):  # of a run that fails, which `_train` reports
            async for event in run.events(types=[CommandTaken]):
                if owned.over.is_set():
                    return
                if isinstance(event, CommandTaken) and event.command in ("pause", "resume"):
                    await self._set(owned, "paused" if event.command == "pause" else "running")
