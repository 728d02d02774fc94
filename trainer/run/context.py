"""A run inside a host's event loop: its block, and the protocol, whose messages are handed over as they are."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from events.messages import Event
from events.protocol import AnyCommand, EventStream, RunResult
from events.run.run import Run
from events.run.stream import LocalEventStream
from trainer.loop.control import Control
from trainer.run.cancellation import end_with_block
from trainer.run.session import Session

if TYPE_CHECKING:
    from trainer.trainer import Trainer


class RunContext(AbstractAsyncContextManager[Run]):
    """The life of a run inside a host's task. Not a generator, which asyncio would close in another task if dropped."""

    session: Session
    """Once it is entered."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def __aenter__(self) -> Run:
        place = self._trainer._place()
        if place.is_remote:
            # A native cancellation leaves the thread behind, which releases the run's folder when it has ended.
            await anyio.to_thread.run_sync(place.fetch, limiter=anyio.CapacityLimiter(1))
        self.session = self._trainer._session(
            "train", Control(), place, self._trainer._sinks_here(()), interactive=False, on_stderr=False
        )
        try:
            self.session.loop.start()  # first, because it may fail; entering the task group cannot
        except BaseException:
            self.session.discard()
            raise
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self.session.serve, name="stagecast run")
        return Run(LocalConnection(self.session))

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            await end_with_block(self.session, error)
        finally:
            await self._tasks.__aexit__(None, None, None)  # empty by now: only a bug of ours can make it raise


class LocalConnection:
    """The run protocol inside a process."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def run_id(self) -> str:
        return self._session.origin.run_id

    def send(self, command: AnyCommand) -> None:
        self._session.control.send(command)

    def events(self, since: int | None, types: Iterable[type[Event]] | None) -> EventStream:
        return LocalEventStream(self._session.pump, since, types)

    async def result(self) -> RunResult:
        await self._session.finished.wait()
        return self._session.outcome()
