"""Alerts about the runs of a folder, whichever processes train them: also when such a process is killed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import anyio
import msgspec

from events.errors import RunFolderError
from events.journal.segment import JOURNAL_DIR
from events.journal.tail import journal_tail
from events.log import logger
from events.messages import Event, ObserverFailed
from events.sink import Delivery, RunInfo
from sinks.alerts.alert import Alert, AlertWriter
from sinks.live.runs import RunsOfFolder
from sinks.replay import replay

_LOOK_S = 2.0
"""Seconds between two looks for runs that have started."""


class FolderAlerts:
    """Follows each run of a folder while it is in progress, on a thread of its own.

    What had happened in a run before is taken into account, but not told.

    Args:
        folder: A run folder, or a folder of them.
    """

    def __init__(self, folder: Path, alerts: Sequence[Alert]) -> None:
        self._folder = folder
        self._alerts = alerts
        self._followed: set[Path] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=anyio.run, args=(self._serve,), name="stagecast-alerts", daemon=True)

    def start(self) -> None:
        """Begin to look for runs."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; waits for a message that is being sent."""
        self._stopped.set()
        self._thread.join()

    async def _serve(self) -> None:
        runs = RunsOfFolder(self._folder)
        async with anyio.create_task_group() as tasks:
            while not self._stopped.is_set():
                for run in await runs.summaries(commands=False):
                    hub = await runs.hub(run.run_id) if run.status == "running" else None
                    path = hub.run_dir if hub is not None else None
                    if path is not None and path not in self._followed:
                        self._followed.add(path)
                        tasks.start_soon(self._follow, path)
                await anyio.to_thread.run_sync(self._stopped.wait, _LOOK_S)
            tasks.cancel_scope.cancel()

    async def _follow(self, path: Path) -> None:
        try:
            seq = journal_tail(path / JOURNAL_DIR).seq
            await replay(path, [_Following(one, seq) for one in self._alerts], on_health=_report)
        except (RunFolderError, OSError) as error:
            logger.warning(f"{path.name} is not watched for alerts any more: {error}")
        else:
            self._followed.discard(path)  # its next attempt


class _Following(msgspec.Struct, frozen=True):
    """An alert about a run that is under way."""

    alert: Alert
    seq: int
    """That of the newest event that is not told."""
    delivery: ClassVar[Delivery] = Alert.delivery

    def open(self, run: RunInfo) -> AlertWriter:
        return self.alert.open_after(run, self.seq)


def _report(event: Event) -> None:
    if isinstance(event, ObserverFailed):
        logger.warning(f"an alert about {event.run_id} could not be sent: {event.error}")
