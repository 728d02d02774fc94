"""A run as its watchers and operators see it, wherever its loop is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

from events.errors import CheckpointError, CursorError
from events.messages import CheckpointFailed, CheckpointSaved, Event
from events.protocol import AnyCommand, Checkpoint, Connection, EventStream, Pause, Resume, RunResult, Stop

_numbers = itertools.count(1)


class Run:
    """Events out, commands in.

    Commands are requests: they return at once, may be sent from any thread, and are taken by the loop at its next step
    boundary, in whatever phase it is. `CommandTaken` is published when that has happened.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self._connection.run_id

    def __repr__(self) -> str:
        return f"Run({self.run_id!r})"

    def events(self, *, since: int | None = None, types: Iterable[type[Event]] | None = None) -> EventStream:
        """Watch the run.

        Args:
            since: Cursor: only events with a greater ``seq``; 0 for all of the run's history. None: from now on.
            types: Only events of these types. None: all that the journal keeps; `BackwardEnded`, `ValStepEnded` and
                `TestStepEnded` come only to those who name them.

        Returns:
            An asynchronous iterator with a ``cursor``. It ends after the run's last event. Left early, it goes on
            collecting until it is closed, or nothing refers to it any more.

        Raises:
            CursorError: ``since`` is no cursor; or the run keeps no journal and the events after it are gone from
                memory.
            TypeError: ``types`` are no event types.
        """
        if since is not None and (isinstance(since, bool) or not isinstance(since, int) or since < 0):
            raise CursorError(f"since={since!r:.80}: give the seq of an event, 0 for all, None for those from now on")
        if types is not None:
            problem = f"types={types!r:.200}: give a list of event types, such as [TrainEpochEnded]"
            if not isinstance(types, Iterable):
                raise TypeError(problem)
            types = tuple(types)
            if not all(isinstance(one, type) and issubclass(one, Event) for one in types):
                raise TypeError(problem)
        return self._connection.events(since, types)

    def stop(self, reason: str | None = None, *, checkpoint: bool = True) -> None:
        """End training after the current step, orderly; the result's status is ``stopped``.

        Args:
            checkpoint: Whether to take a checkpoint first, if the run takes any.
        """
        self._send(Stop(id=_new_id(), reason=reason, checkpoint=checkpoint))

    async def checkpoint(self, reason: str | None = None) -> str:
        """Take a checkpoint at the next step boundary, and wait until it is durable. The loop goes on meanwhile.

        Returns:
            The path of its folder.

        Raises:
            CheckpointError: It could not be made durable, or the run takes none, or ended before it was taken.
        """
        command = Checkpoint(id=_new_id(), reason=reason)
        events = self.events(types=[CheckpointSaved, CheckpointFailed])
        try:
            self._send(command)
            async for event in events:
                if isinstance(event, CheckpointSaved) and command.id in event.command_ids:
                    return event.path
                if isinstance(event, CheckpointFailed) and command.id in event.command_ids:
                    which = f" {event.checkpoint}" if event.checkpoint else ""
                    raise CheckpointError(f"the checkpoint{which} could not be taken: {event.error}")
        finally:
            await events.aclose()
        raise CheckpointError("the run ended before it took the checkpoint")

    def pause(self, reason: str | None = None) -> None:
        """Wait at the next step boundary until `resume` or `stop`. Leaving the block is neither."""
        self._send(Pause(id=_new_id(), reason=reason))

    def resume(self, reason: str | None = None) -> None:
        """Go on after `pause`."""
        self._send(Resume(id=_new_id(), reason=reason))

    async def result(self) -> RunResult:
        """Wait until the loop has ended and the observers have been drained.

        Raises:
            BaseException: what ended the run, as itself: the exception of a step or of a fatal observer.
            RunCancelled: the run was cancelled.
        """
        __tracebackhide__ = True
        return await self._connection.result()

    def _send(self, command: AnyCommand) -> None:
        self._connection.send(command)


def _new_id() -> str:
    return f"{os.getpid()}-{next(_numbers)}"
