"""Waking an event loop from another thread, and running functions there, without ever waiting for it."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

import anyio

Post = Callable[[Callable[[], object]], None]
"""Runs a function in the event loop's thread soon, from any thread, without waiting: `Ring.post`, `Wakeup.post`."""


class Wakeup:
    """A socket pair that one task waits on and any thread writes to, and the functions that this task is to run.

    AnyIO itself has no call that a foreign thread can use without waiting for the loop (`anyio.from_thread` waits,
    ``send_nowait`` of a memory stream is not thread-safe). A non-blocking write to a socket is safe from any thread,
    costs a system call, and wakes asyncio and trio alike.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._set = False
        self.posted: deque[Callable[[], object]] = deque()
        """Functions that wait to be run."""
        self.urgent = False
        """Whether the waiting task must act at once. Any thread sets it, before `set`; the task clears it."""

    def set(self) -> None:
        """Wake the waiting task; if it is not waiting, its next wait returns at once. Any thread; never waits."""
        if self._set:
            return
        self._set = True
        try:
            self._sender.send(b"\0")
        except BlockingIOError:
            pass  # the socket is full of wake-ups that nobody has read yet
        except OSError:
            pass  # closed: there is nobody left to wake

    def post(self, function: Callable[[], object]) -> None:
        """Have the waiting task run a function. Any thread; never waits. The function must not raise."""
        self.posted.append(function)
        self.set()

    def run_posted(self) -> None:
        """Run the functions that were posted, in the waiting task."""
        while self.posted:
            self.posted.popleft()()

    async def serve(self) -> None:
        """Run what is posted, until it is cancelled; where no `Pump` does."""
        try:
            while True:
                self.run_posted()
                await self.wait(None)
        finally:
            self.close()

    async def wait(self, timeout_s: float | None) -> None:
        """Wait until `set`, or until ``timeout_s`` has passed. One task at a time."""
        with anyio.move_on_after(timeout_s):
            await anyio.wait_readable(self._receiver)
        try:
            while len(self._receiver.recv(4096)) == 4096:
                pass
        except BlockingIOError:
            pass
        # The flag falls after the bytes are taken. A `set` in between sends nothing, and need not: what it
        # announces was done before it, and the waiter looks at everything after this.
        self._set = False

    def close(self) -> None:
        """Close both sockets; `set` does nothing from then on."""
        self._receiver.close()
        self._sender.close()
