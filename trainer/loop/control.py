"""Where commands, cancellation and fatal observers reach the loop."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable

from events.protocol import AnyCommand, Stop


class Control:
    """The loop's inbox. Everything but `take` and `wait` may be called from any thread, and from a signal handler.

    No lock is involved: a signal handler runs on the thread it interrupts, and would wait for itself.
    """

    def __init__(self) -> None:
        self.pending = False
        """Whether the loop has anything to look at; the one thing it reads at every step."""
        self.error: BaseException | None = None
        """What the loop must raise at its next step boundary: a cancellation, or what a fatal observer raised."""
        self.phase: str | None = None
        """The hook or call that raised `error`; None where nobody was in one."""
        self.on_stop: Callable[[], object] | None = None
        """Called by a signal instead of sending a stop, once there is no loop any more that would take it."""
        self.stopped_by: str | None = None
        """The first signal that arrived, such as ``SIGINT``; only `Trainer.train` and `Trainer.test` handle any."""
        self.interruption: BaseException | None = None
        """What a second signal has to raise."""
        self.interruptible = False
        """Whether the signal handler may raise it where the loop's thread is: in the module's own code."""
        self.reading = False
        """Whether the loop waits for data on the main thread, where a signal handler may end the wait."""
        self.dead_worker: str | None = None
        """What torch reports about a dataloader's worker that died; kept for the loop's next read of data."""
        self._commands: deque[AnyCommand] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def send(self, command: AnyCommand) -> None:
        """Queue a command."""
        self._commands.append(command)
        self._notify()

    def fail(self, error: BaseException, phase: str | None = None) -> None:
        """Have the loop raise ``error`` at its next step boundary. The first one stays.

        Args:
            phase: The hook or call that raised it.
        """
        if self.error is None:
            self.phase, self.error = phase, error
        self._notify()

    @property
    def stops_without_checkpoint(self) -> bool:
        """Whether somebody wants the run to stop, and no checkpoint of it. The loop's thread only."""
        return any(isinstance(command, Stop) and not command.checkpoint for command in list(self._commands))

    @property
    def ends_run(self) -> bool:
        """Whether a stop, a cancellation or a fatal observer waits for the loop. The loop's thread only."""
        return self.error is not None or any(isinstance(command, Stop) for command in list(self._commands))

    def end_wait(self) -> None:
        """In a signal handler: end the loop's wait for data that a dead worker was to read.

        Raises:
            RuntimeError: what torch reports about the worker.
        """
        if self.reading and self.dead_worker is not None:
            raise RuntimeError(self.dead_worker)

    def raise_if_failed(self) -> None:
        """Raise what `fail` was given, if anything was. The loop's thread only."""
        if self.error is not None:
            raise self.error

    def raise_if_interrupted(self) -> None:
        """Raise what a second signal has to raise, if one arrived. The loop's thread only."""
        if self.interruption is not None:
            raise self.interruption

    def take(self) -> list[AnyCommand]:
        """All pending commands, in order of arrival. The loop's thread only."""
        self.pending = False  # before the queue is emptied: what comes in between is seen next time
        taken: list[AnyCommand] = []
        while self._commands:
            taken.append(self._commands.popleft())
        return taken

    def wait(self, timeout_s: float) -> None:
        """Wait on the loop's thread until something is sent, or ``timeout_s`` has passed."""
        try:
            self._wake.get(timeout=timeout_s)
        except queue.Empty:
            return

    def _notify(self) -> None:
        self.pending = True
        self._wake.put(None)  # SimpleQueue.put is reentrant
