"""Calls that can be abandoned: on threads and in tasks of our own, awaited without the host's thread limiter."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import queue
import threading
from collections.abc import Callable

import anyio

from events.bus.cpu_time import CpuTime
from events.bus.wakeup import Post


class ThreadJob:
    """One call on a `Worker`. Await `finished`, then read `error` or `value`."""

    def __init__(self, function: Callable[..., object], args: tuple[object, ...]) -> None:
        self._function = function
        self._args = args
        self.finished = anyio.Event()
        self.value: object = None
        self.error: BaseException | None = None
        """The exception of the call. It is data: a SystemExit of a callback must not end the host's event loop."""

    def run(self, post: Post) -> None:
        """Make the call on the current thread and report through ``post``."""
        try:
            self.value = self._function(*self._args)
        except BaseException as error:  # the border of a thread that belongs to an observer: reported, not handled
            self.error = error
        finally:
            del self._function, self._args
        post(self.finished.set)

    def cancel(self) -> None:
        """Do nothing: a thread cannot be interrupted."""


class AsyncJob:
    """One call that may return an awaitable, in a task of its own. Create it in the event loop; then as `ThreadJob`.

    The task is in no task group, because a group waits for its tasks: one that shields itself from cancellation, as
    every `anyio.to_thread` does, would hold up the end of the run for as long as it likes. What it raises is kept as
    data too, a cancellation included that nobody has asked for.
    """

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._function = function
        self._args = args
        self._scope = anyio.CancelScope()
        self.finished = anyio.Event()
        self.value: object = None
        self.error: BaseException | None = None
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            task = asyncio.get_running_loop().create_task(self._run())
            _tasks.add(task)  # the event loop itself holds no reference to it
            task.add_done_callback(_tasks.discard)
        else:
            import trio

            trio.lowlevel.spawn_system_task(self._run, context=contextvars.copy_context())

    def cancel(self) -> None:
        """Cancel its task; does not wait for it."""
        self._scope.cancel()

    async def _run(self) -> None:
        with self._scope:
            try:
                value = self._function(*self._args)
                self.value = await value if inspect.isawaitable(value) else value
            except BaseException as error:  # the border of a task that belongs to an observer: reported, not handled
                self.error = error
        del self._function, self._args
        self.finished.set()


_tasks: set[asyncio.Task[None]] = set()


class Worker:
    """A thread that makes one call at a time.

    It is daemonic, so a call that never returns holds up neither a run nor the end of the process. `anyio.to_thread`
    would share its limiter with the host, and a thread abandoned there keeps an asyncio process alive.
    """

    def __init__(self, name: str, post: Post, cpu_time: CpuTime) -> None:
        self.name = name
        self.post = post
        self._cpu_time = cpu_time
        self._jobs: queue.SimpleQueue[ThreadJob | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[..., object], *args: object) -> ThreadJob:
        """Queue a call; returns at once. From the event loop only."""
        job = ThreadJob(function, args)
        if self._thread is None:
            from events.log import in_this_run  # not at the top: structlog is slow to import, and threads are optional

            thread = threading.Thread(target=in_this_run(self._run), name=self.name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads: this call failed, the next one may not
                job.error = error
                job.finished.set()
                return job
            self._thread = thread
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        """End the thread after the calls that are queued. Does not wait; later calls are never run."""
        self._jobs.put(None)

    def _run(self) -> None:
        with self._cpu_time.counting():
            while (job := self._jobs.get()) is not None:
                job.run(self.post)
                del job  # or the last batch would stay in memory until the next one
