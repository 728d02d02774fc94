"""Delivers a run's journal to sinks, after the run or during it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio

from events.bus.supervisor import unique_name
from events.bus.wakeup import Wakeup
from events.errors import RunFolderError
from events.journal.history import history_filter
from events.journal.reader import SkippedLine
from events.journal.segment import JOURNAL_DIR
from events.journal.tail import journal_tail
from events.messages import Event
from events.protocol import ObserverReport
from events.run.damage import unreadable
from events.run.folder import is_held
from events.sink import RunInfo, Sink, delivery_of
from sinks.host.child import FeedObservers, Place

_LOOK_S = 0.5
"""Seconds between two checks whether the run is still in progress."""


async def replay(
    run_dir: str | os.PathLike[str],
    sinks: Sequence[Sink],
    *,
    since: int = 0,
    on_health: Callable[[Event], None] = lambda event: None,
    skipped: list[SkippedLine] | None = None,
) -> list[ObserverReport]:
    """Deliver a run's history to sinks, each at its own pace and with the retries of its `Delivery`; then close them.

    A run in progress is followed to its end. Steps that a later attempt has repeated are skipped.

    Args:
        since: Events up to this ``seq`` are skipped.
        on_health: Receives each failure and recovery of a sink, in the event loop.
        skipped: Receives the lines that are not events, if given (the newest thousand).

    Returns:
        A report per sink: ``left`` counts the events that a disabled sink did not receive.

    Raises:
        RunFolderError: This folder has no journal, it cannot be read, or no line of it is an event.
    """
    folder = Path(run_dir).absolute()  # noqa: ASYNC240  # asks the system for nothing but the working directory
    if (reason := unreadable(folder)) is not None:
        raise RunFolderError(f"{folder} is damaged: {reason}")
    while not (tail := journal_tail(folder / JOURNAL_DIR)).run_id and is_held(folder):  # noqa: ASYNC110  # as below
        await anyio.sleep(_LOOK_S)  # it has just started
    if not tail.seq:
        raise RunFolderError(f"{folder} has no journal in {JOURNAL_DIR}/; name the folder of a run with a journal")
    if not tail.run_id:
        raise RunFolderError(f"the journal in {folder / JOURNAL_DIR} is damaged: no line of it is an event")
    run = RunInfo(tail.run_id, tail.attempt, 0, os.fspath(folder))
    counts = history_filter(folder / JOURNAL_DIR)
    calls = Wakeup()
    observers = FeedObservers(run, on_health, calls.post, counts)
    names: list[str] = []
    for sink in sinks:
        names.append(unique_name(type(sink).__name__.lower(), names))  # as in the run
        observers.add(names[-1], sink, delivery_of(sink), Place(since), lambda seq, delivered: None)
    reports: list[ObserverReport] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(calls.serve)
        for observer in observers.observers:
            tasks.start_soon(observer.run)
        while is_held(folder):  # noqa: ASYNC110  # the system has no notification of a released lock
            await anyio.sleep(_LOOK_S)
        observers.finish()
        for observer in observers.observers:
            await observer.finished()
        reports += await observers.counted()
        if skipped is not None:
            skipped += observers.skipped
        tasks.cancel_scope.cancel()
    return reports
