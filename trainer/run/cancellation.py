"""How a run ends with the block that holds it, and outlives the cancellation of the tasks around it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio

from events.errors import TrainingThreadStuck

if TYPE_CHECKING:
    from trainer.remote.launch import LaunchedRun
    from trainer.run.session import Session


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


async def end_with_block(run: Session | LaunchedRun, error: BaseException | None) -> None:
    """Wait for the end of a run at the end of its block; an exception or a cancellation cancels the run first.

    Under asyncio a native ``task.cancel()`` cuts through a shield, and trio raises Ctrl-C in its main task, wherever
    that waits. Both may come repeatedly. Each is absorbed here, and the first is raised when the run has ended.

    Args:
        error: Left the block, and propagates when this returns.

    Raises:
        TrainingThreadStuck: The loop did not reach a step boundary in time.
        BaseException: The first cancellation; or, if the block was left normally, what the run raised.
    """
    __tracebackhide__ = True
    if error is not None:
        run.cancel("an exception left the block" if isinstance(error, Exception) else "its task was cancelled")
    cancellation: BaseException | None = None
    while not run.finished.is_set():
        try:
            with anyio.CancelScope(shield=run.cancelled):  # scopes around the block have nothing to add then
                await run.finished.wait()
        except BaseException as caught:
            cancellation = cancellation or caught
            run.cancel("its task was cancelled")
    if isinstance(run.error, TrainingThreadStuck):
        raise run.error from error
    if cancellation is not None and (error is None or isinstance(error, Exception)):
        raise cancellation  # the exception that left the block, if there is one, is its context
    if error is None:
        run.outcome()
