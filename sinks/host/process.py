"""The run's side of a sink host: starts the process, starts it again when it dies, and ends it with the run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import anyio
import msgspec

from events.bus.ring import Ring
from events.errors import SinkHostFailed
from events.log import in_this_run, logger
from events.messages import Event, ObserverFailed, ObserverRecovered, WarningLogged
from events.notice import notify
from events.process import Child, Program, exit_in_words
from events.protocol import ObserverReport
from events.safe_files import UnsafeFile, make_folder_below, open_below
from events.sink import RunInfo
from events.wire import decode_json
from sinks.host.child import (
    PLACES_DIR,
    Finish,
    Finished,
    FromHost,
    HostConfig,
    HostedSink,
    Noticed,
    Place,
    from_host,
)

LOG_NAME = "host.log"
"""What sinks print in the host, in the folder of their places."""
_MOST_DEATHS = 8
"""Maximum deaths in a row; then the host is not started again."""
_HEALTHY_S = 60.0
"""A host that has lived longer has recovered: its deaths are counted from the first again."""
_EXIT_S = 5.0
"""Maximum seconds from the last message of a host to its end."""
_LEAVE_S = 1.5
"""Seconds beyond the drain's deadline in which the host counts what is left and reports it."""


class SinkHost:
    """The sinks of one run that are in a process of their own.

    `start` and `finish` belong to the event loop's thread. Another thread, ``stagecast-sink-host``, starts the process,
    reads its messages and waits for it.

    Args:
        ring: The run's; receives the events about the sinks.
        drain_timeout_s: Maximum seconds to deliver the rest when this process has died.
        report_s: Seconds between two reports on the health of the sinks.
        on_fatal: Called when a sink with the policy ``fatal`` has failed.
    """

    def __init__(
        self,
        run: RunInfo,
        sinks: Sequence[HostedSink],
        ring: Ring,
        drain_timeout_s: float,
        report_s: float,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        assert run.run_dir is not None
        self._run_dir = run.run_dir
        self._config = HostConfig(run, list(sinks), drain_timeout_s, report_s)
        # As they are now: a host that is started later must find, and write, what the first one did.
        self._program = Program.of_module("sinks.host.child", None, {}, os.getcwd())
        self._ring = ring
        self._on_fatal = on_fatal
        self._lock = threading.Lock()  # held to replace the child, to finish and to kill
        self._child: Child[FromHost] | None = None
        self._finish: Finish | None = None
        self._killed = False
        self._woken = threading.Event()
        self._error: str | None = None
        self._reports: list[ObserverReport] | None = None
        self._ended = anyio.Event()
        self._finishing: anyio.CancelScope | None = None

    @property
    def pid(self) -> int | None:
        """The process that runs now; None between two."""
        child = self._child
        return child.pid if child is not None else None

    def start(self) -> None:
        """Start the process; does not wait for it."""
        for sink in self._config.sinks:
            if (place := Place.read(self._run_dir, sink.name)) is not None:
                # One beyond the end of the journal when the run began belongs to a journal that was removed.
                Place(min(place.seq, sink.since)).write(self._run_dir, sink.name)
        threading.Thread(target=in_this_run(self._run), name="stagecast-sink-host", daemon=True).start()

    async def finish(self, until: int | None, timeout_s: float) -> list[ObserverReport]:
        """Deliver everything up to ``until`` and close the sinks; kill the process if it does not end in time."""
        finish = Finish(until, time.monotonic() + timeout_s)
        with self._lock:
            self._finish = finish
            if self._child is not None:
                self._child.send(finish)
        self._woken.set()
        with anyio.move_on_after(timeout_s + _LEAVE_S) as self._finishing:
            await self._ended.wait()
        self._finishing = None
        if not self._ended.is_set():
            self.kill()
        return self._reports if self._reports is not None else [self._left(sink.name) for sink in self._config.sinks]

    def hurry(self, timeout_s: float) -> None:
        """Shorten the end that is under way: it takes at most ``timeout_s`` from now."""
        if self._finishing is not None:
            self._finishing.deadline = min(self._finishing.deadline, anyio.current_time() + timeout_s)

    def kill(self) -> None:
        """Kill the process and its group at once, and start no other."""
        with self._lock:
            self._killed = True
            if self._child is not None:
                self._child.kill()
        self._woken.set()

    def _left(self, name: str) -> ObserverReport:
        error = self._error or "the sink host was still busy at the end of the drain"
        place = Place.read(self._run_dir, name) or Place(0)
        return ObserverReport(
            observer=name,
            state="stuck",
            published=place.delivered,
            delivered=place.delivered,
            error=f"{error}; the events that are left are in the journal and not counted",
        )

    # --------------------------------------------------------------------------------------- on its own thread

    def _run(self) -> None:
        deaths = 0
        try:
            while True:
                began = time.monotonic()
                try:
                    problem, is_hopeless = self._live(), False
                except (OSError, ValueError) as error:
                    is_hopeless = isinstance(error, UnsafeFile)  # another attempt would find the same
                    problem = f"the sink host could not be started: {error}{'; remove that' if is_hopeless else ''}"
                if self._reports is not None or self._killed:
                    return
                self._error = problem
                deaths = 1 if time.monotonic() - began > _HEALTHY_S else deaths + 1
                if deaths >= _MOST_DEATHS or is_hopeless:
                    self._publish_death(problem, "disabled", deaths)
                    return
                self._publish_death(problem, "retrying", deaths)
                self._woken.clear()
                if self._finish is None:
                    self._woken.wait(min(0.1 * 2.0**deaths, 30.0))
        finally:
            self._ring.post(self._ended.set)

    def _live(self) -> str:
        """Run one process from its start to its end; return how it ended.

        Raises:
            OSError: The process cannot be started.
        """
        make_folder_below(self._run_dir, PLACES_DIR)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with open(open_below(self._run_dir, f"{PLACES_DIR}/{LOG_NAME}", flags), "ab") as log:
            with self._lock:
                if self._killed:
                    return ""
                self._child = child = Child(self._program, log, from_host, self._config)
                if self._finish is not None:
                    child.send(self._finish)
            code = child.run(self._take)
        log_path = Path(self._run_dir, PLACES_DIR, LOG_NAME)
        return f"the sink host {exit_in_words(code)}; the output of its sinks is in {log_path}"

    def _take(self, message: FromHost) -> None:
        if isinstance(message, Noticed):
            notify(message.text, message.without_secrets)
            return
        if isinstance(message, Finished):
            self._reports = message.reports
            assert self._child is not None
            self._child.spares_group = True
            self._child.end_within(_EXIT_S)
            return
        event = decode_json(message.event)
        origin = self._ring.origin
        now = {"attempt": origin.attempt, "rank": origin.rank, "global_step": origin.global_step}
        told: Event = msgspec.structs.replace(event, seq=0, epoch=origin.epoch, stage=origin.stage, **now)
        self._ring.publish(told)
        if isinstance(told, WarningLogged):
            log = logger.error if told.level == "error" else logger.warning
            log(told.message, published=True)
        elif isinstance(told, ObserverFailed):
            logger.warning(
                f"observer {told.observer} failed in {told.during} ({told.action}): {told.error}", published=True
            )
            if told.action == "fatal":
                self._on_fatal(SinkHostFailed(f"the sink {told.observer} failed in {told.during}: {told.error}"))
        elif isinstance(told, ObserverRecovered):
            logger.info(f"observer {told.observer} recovered after {told.outage_s:.1f} s")

    def _publish_death(self, problem: str, action: Literal["disabled", "retrying"], deaths: int) -> None:
        logger.warning(f"{problem} ({action})", published=True)
        for sink in self._config.sinks:
            failed = ObserverFailed(
                *self._ring.origin.header(),
                observer=sink.name,
                error=problem,
                during="host",
                action=action,
                failures=deaths,
            )
            self._ring.publish(failed)
