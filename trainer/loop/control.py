"""The inbox of the loop: commands, cancellation, and failures of fatal observers."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from events.protocol import AnyCommand, Stop

if TYPE_CHECKING:
    from trainer.distributed.agent import Agent


class Control:
    """The loop's inbox. All methods but `take` and `wait` may be called on any thread, and in a signal handler.

    It has no lock: a signal handler runs on the interrupted thread, and would wait for itself.
    """

    def __init__(self) -> None:
        self.pending = False
        """Whether the inbox has content; the only field that the loop reads at every step."""
        self.error: BaseException | None = None
        """The exception for the next step boundary: a cancellation, or that of a fatal observer."""
        self.phase: str | None = None
        """The hook or call that raised `error`; None outside of one."""
        self.on_stop: Callable[[], object] | None = None
        """Called by a signal instead of sending a stop, once the loop has ended."""
        self.stopped_by: str | None = None
        """The first received signal, such as ``SIGINT``; only `Trainer.train` and `Trainer.test` handle signals."""
        self.interruption: BaseException | None = None
        """The exception of a second signal."""
        self.interruptible = False
        """Whether the signal handler may raise it at once: the loop's thread runs the module's code."""
        self.reading = False
        """Whether the loop waits for data on the main thread, so that a signal handler may end the wait."""
        self.dead_worker: str | None = None
        """Torch's message about a dead dataloader worker, for the loop's next read of data."""
        self.agent: Agent | None = None
        """With several ranks: agrees with the others on the tick at which all take a command or a failure."""
        self._commands: deque[AnyCommand] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def join(self, agent: Agent) -> None:
        """Agree with other ranks on commands from now on, also on those that are pending."""
        self.agent = agent  # first, because a signal handler may send one now
        for command in self.take():
            agent.send(command)
        if self.error is not None:
            agent.fail(self.error, self.phase)

    def send(self, command: AnyCommand) -> None:
        """Queue a command."""
        if self.agent is not None:
            self.agent.send(command)
            return
        self._commands.append(command)
        self._notify()

    def fail(self, error: BaseException, phase: str | None = None) -> None:
        """Make the loop raise ``error`` at its next step boundary. The first error counts.

        Args:
            phase: The hook or call that raised it.
        """
        if self.error is None:
            self.phase, self.error = phase, error
            if self.agent is not None:
                self.agent.fail(error, phase)
        self._notify()

    @property
    def stops_without_checkpoint(self) -> bool:
        """Whether a stop without a checkpoint is pending. The loop's thread only."""
        return any(isinstance(command, Stop) and not command.checkpoint for command in list(self._commands))

    @property
    def ends_run(self) -> bool:
        """Whether a stop, a cancellation or a fatal failure is pending. The loop's thread only."""
        return self.error is not None or any(isinstance(command, Stop) for command in list(self._commands))

    def end_wait(self) -> None:
        """In a signal handler: end the loop's wait for data of a dead worker.

        Raises:
            RuntimeError: Torch's message about the worker.
        """
        if self.reading and self.dead_worker is not None:
            raise RuntimeError(self.dead_worker)

    def raise_if_failed(self) -> None:
        """Raise the exception given to `fail`, or the failure of another rank. The loop's thread only."""
        if self.error is not None:
            raise self.error
        if self.agent is not None:
            self.agent.raise_if_failed()

    def raise_if_interrupted(self) -> None:
        """Raise the exception of a second signal, if there was one. The loop's thread only."""
        if self.interruption is not None:
            raise self.interruption

    def take(self) -> list[AnyCommand]:
        """Return and remove all pending commands, in order of arrival. The loop's thread only."""
        self.pending = False  # first, so that a command during the loop below sets it again
        taken: list[AnyCommand] = []
        while self._commands:
            taken.append(self._commands.popleft())
        return taken

    def wait(self, timeout_s: float) -> None:
        """Wait on the loop's thread for the next entry, for at most ``timeout_s``."""
        try:
            self._wake.get(timeout=timeout_s)
        except queue.Empty:
            return

    def _notify(self) -> None:
        self.pending = True
        self._wake.put(None)  # SimpleQueue.put is reentrant
