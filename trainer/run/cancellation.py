"""How a run outlives the cancellation of what is around it, under asyncio and trio, to end in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio


async def outliving(function: Callable[[], Awaitable[None]]) -> None:
    """Run a task that the end of the host's program must not cut short: it ends in order when the run does.

    ``asyncio.run`` cancels all tasks when its main coroutine has returned, the one that holds the run, too, which then
    ends the run; that takes a pump and observers that work. trio cancels only through scopes, which `Session.serve`
    shields, but raises Ctrl-C in whatever code is just running.
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


async def outlast(
    finished: anyio.Event, cancelled: Callable[[], bool], cancel: Callable[[], None]
) -> BaseException | None:
    """Wait for the end of a run through any number of cancellations; returns the first of them.

    Under asyncio a native ``task.cancel()`` cuts through a shield; trio raises Ctrl-C in its main task, wherever that
    waits; both may come again. Each is absorbed here, and the first one goes on when the run has ended.

    Args:
        cancelled: Whether the run has been cancelled already, so that scopes around this wait have nothing to add.
        cancel: Cancels the run.
    """
    first: BaseException | None = None
    while not finished.is_set():
        try:
            with anyio.CancelScope(shield=cancelled()):
                await finished.wait()
        except BaseException as error:
            first = first or error
            cancel()
    return first
