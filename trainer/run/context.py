"""A run inside a host's event loop: its block, and the protocol, whose messages are handed over as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from events.messages import Event
from events.protocol import AnyCommand, EventStream, RunResult
from events.run.run import Run
from events.run.stream import LocalEventStream
from trainer.distributed.world import joins_ranks, opened
from trainer.loop.control import Control
from trainer.run.cancellation import end_with_block
from trainer.run.defaults import default_sinks
from trainer.run.observers import SinkLike
from trainer.run.place import RunPlace
from trainer.run.session import Session

if TYPE_CHECKING:
    from trainer.trainer import Trainer

T = TypeVar("T")


class RunContext(AbstractAsyncContextManager[Run]):
    """The life of a run inside a host's task. Not a generator, which asyncio would close in another task if dropped."""

    session: Session
    """Once it is entered."""

    def __init__(self, trainer: Trainer, sinks: Sequence[SinkLike] | None = None) -> None:
        """Args: ``sinks``: as described on the thread that starts the run, if that is not this task's."""
        self._trainer, self._sinks = trainer, sinks
        self._joined: contextlib.ExitStack | None = None  # closed to leave the other ranks

    async def __aenter__(self) -> Run:
        trainer = self._trainer
        async with contextlib.AsyncExitStack() as unused:
            unused.push_async_callback(self._leave)
            place = await self._place()
            sinks = self._sinks if self._sinks is not None else trainer._sinks_here(default_sinks())
            sinks = sinks if place.world.leads else []
            # With several ranks it waits a moment for the others, which are here, too.
            self.session = trainer._session("train", Control(), place, sinks, interactive=False, on_stderr=False)
            try:
                self.session.loop.start()  # first, because it may fail; entering the task group cannot
            except BaseException:
                self.session.discard()
                raise
            unused.pop_all()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self.session.serve, name="stagecast run")
        return Run(LocalConnection(self.session))

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        __tracebackhide__ = True
        try:
            await end_with_block(self.session, error)
        finally:
            await self._tasks.__aexit__(None, None, None)  # empty by now: only a bug of ours can make it raise
            await self._leave()

    async def _place(self) -> RunPlace:
        """Join the other ranks, if there are any, and choose the folder."""
        trainer = self._trainer
        if not joins_ranks(trainer.arguments):
            place = trainer._place()
            if place.is_remote:
                # A native cancellation leaves the thread behind, which releases the run's folder when it has ended.
                await _in_thread(place.fetch)
            return place
        joined = self._joined = contextlib.ExitStack()
        world = await _in_thread(lambda: joined.enter_context(opened(trainer.arguments)))
        return await _in_thread(lambda: trainer._place_of(world, lambda fetch: fetch()))

    async def _leave(self) -> None:
        """Leave the other ranks."""
        joined, self._joined = self._joined, None
        if joined is not None:
            with anyio.CancelScope(shield=True):
                await _in_thread(joined.close)


async def _in_thread(function: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))


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
        return LocalEventStream(self._session.observers.pump, since, types)

    async def result(self) -> RunResult:
        __tracebackhide__ = True
        await self._session.finished.wait()
        return self._session.outcome()
