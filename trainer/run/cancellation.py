"""How a run ends with the block that holds it, and outlives the cancellation of the tasks around it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import anyio

from events.errors import TrainingThreadStuck
from events.protocol import RunResult


async def outliving(function: Callable[[], Awaitable[None]]) -> None:
    """Run a task that ends with the run, and that the end of the host's program does not cancel.

    ``asyncio.run`` cancels all tasks when its main coroutine has returned, including the one that holds the run, which
    then ends the run; that takes a working pump and working observers. trio cancels only through scopes, which
    `Session.serve` shields, but raises Ctrl-C in whatever code is running.
    """
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        asyncio._unregister_task(task)  # documented in "Extending asyncio"
        # An eager task is registered only when it waits for the first time.
        asyncio.get_running_loop().call_soon(asyncio._unregister_task, task)
        await function()
    else:
        import trio

        @trio.lowlevel.enable_ki_protection
        async def protected() -> None:
            await function()

        await protected()


class Waitable(Protocol):
    """As much of `anyio.Event` as a run has to offer."""

    def is_set(self) -> bool: ...

    async def wait(self) -> None: ...


class Endable(Protocol):
    """A run that a block holds, in this process or in another."""

    error: BaseException | None

    @property
    def finished(self) -> Waitable: ...

    @property
    def cancelled(self) -> bool: ...

    def cancel(self, reason: str) -> None:
        """End the run at its next step boundary."""

    def outcome(self) -> RunResult:
        """Return the result of the finished run; raises what the run raised."""
        ...


@contextlib.asynccontextmanager
async def ending_with_block(run: Endable) -> AsyncIterator[None]:
    """Wait at the end of the block for the end of the run. An exception or a cancellation cancels the run first.

    Under asyncio a native ``task.cancel()`` cuts through a shield, and trio raises Ctrl-C in its main task, wherever
    that waits. Both may come repeatedly. Each is absorbed here, and the first is raised when the run has ended.

    Raises:
        TrainingThreadStuck: The loop did not reach a step boundary in time.
        BaseException: What left the block or cancelled it; after a normal end, what the run raised.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
        run.cancel("an exception left the block" if isinstance(error, Exception) else "its task was cancelled")
    interruption: BaseException | None = None
    while not run.finished.is_set():
        try:
            with anyio.CancelScope(shield=run.cancelled):  # scopes around the block have nothing to add then
                await run.finished.wait()
        except BaseException as caught:
            interruption = interruption or caught
            run.cancel("its task was cancelled")
    try:
        if isinstance(run.error, TrainingThreadStuck):
            raise run.error from error
        if error is not None and (interruption is None or not isinstance(error, Exception)):
            raise error
        if interruption is not None:
            raise interruption  # the exception that left the block, if there is one, is its context
        run.outcome()
    finally:
        del error, interruption  # or this frame and the exception would keep each other
