"""Threads of our own: daemonic, named, and awaited without the host's thread limiter."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio

Post = Callable[[Callable[[], object]], None]
"""Runs a function in the event loop, from any thread, without waiting: `Bus.post`."""


class Job:
    """One call on a `Worker`. Await `finished`, then read `error` or `value`."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        self.finished = anyio.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        """What the call raised. Kept as data: a SystemExit of a callback must not end the host's event loop."""

    def run(self, post: Post) -> None:
        """Make the call on the current thread and report through ``post``."""
        try:
            self.value = self._function(*self._args)
        except BaseException as error:  # the border of a thread that belongs to an observer: reported, not handled
            self.error = error
        finally:
            del self._function, self._args
        post(self.finished.set)


class Worker:
    """A thread that makes one call at a time.

    It is daemonic, so a call that never returns holds up neither a run nor the end of the process. `anyio.to_thread`
    would share its limiter with the host, and a thread abandoned there keeps an asyncio process alive.
    """

    def __init__(self, name: str, post: Post) -> None:
        self.name = name
        self.post = post
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy_since: float | None = None
        """`time.monotonic` of the start of the call that is running; None while idle."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Job:
        """Queue a call; returns at once. From the event loop only."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
        job = Job(function, args)
        self._jobs.put(job)
        return job

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Make a call and wait for it; what it raises is raised here. Cancelling leaves the call running."""
        job = self.submit(function, *args)
        await job.finished.wait()
        if job.error is not None:
            raise job.error
        return job.value

    def stop(self) -> None:
        """End the thread after the calls that are queued. Does not wait."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.busy_since = time.monotonic()
            job.run(self.post)
            self.busy_since = None
            del job  # or the last batch would stay in memory until the next one
