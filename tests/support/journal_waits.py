"""Waits for events of a run in another process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio

from events.journal.follow import Follower
from events.messages import Event

EventT = TypeVar("EventT", bound=Event)


class JournalWaiter:
    """Follows the journal of a run, which may not have begun.

    Args:
        run_dir: The run folder.
        over: Whether nothing more is written.
    """

    def __init__(self, run_dir: Path, over: Callable[[], bool]) -> None:
        self._journal, self._over = run_dir / "journal", over
        self._cursor = 0

    def wait_for(self, kind: type[EventT], test: Callable[[EventT], bool], timeout_s: float = 100.0) -> EventT:
        """Return the first event of a kind that passes a test, after the one that was returned before."""

        async def find() -> EventT:
            follower = Follower(self._journal, self._cursor, over=self._over)
            with anyio.fail_after(timeout_s):
                while True:
                    for event in await follower.receive():
                        self._cursor = event.seq
                        if isinstance(event, kind) and test(event):
                            return event

        try:
            return anyio.run(find)
        except (TimeoutError, anyio.EndOfStream) as error:
            raise AssertionError(f"no {kind.__name__} after the event {self._cursor}") from error
