"""The run's side of a sink host: starts the process, starts it again when it dies, and has it end with the run."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec

from events.bus.ring import Ring
from events.errors import SinkHostFailed
from events.log import in_this_run, logger
from events.messages import Event, ObserverFailed, ObserverRecovered, WarningLogged
from events.notice import notify
from events.protocol import ObserverReport
from events.safe_files import UnsafeFile, make_folder_below, open_below
from events.sink import RunInfo
from events.wire import decode_json
from sinks.host.child import PLACES_DIR, Finish, Finished, HealthTold, HostConfig, HostedSink, Noticed, Place

LOG_NAME = "host.log"
"""What sinks print in the host, in the folder of their places."""
_MOST_DEATHS = 8
"""A host that dies so many times in a row is not started again."""
_HEALTHY_S = 60.0
"""One that has lived so long has recovered."""
_LOOK_S = 0.25
"""How often it is seen whether the process lives, should the end of its output not say so."""
_LEAVE_S = 1.5
"""Beyond the drain's deadline, for the host to count what is left and to say so."""

_Message = HealthTold | Noticed | Finished


class SinkHost:
    """The sinks of one run that are in a process of their own.

    `start` and `finish` belong to the event loop's thread; the rest happens on a thread named ``stagecast-sink-host``,
    which reads and waits and never touches the loop.

    Args:
        bus: The run's, for what is told about the sinks.
        drain_timeout_s: How long delivering the rest may take when this process has died.
        report_s: How often it is told how the sinks are doing.
        on_fatal: Told when a sink with the policy ``fatal`` has failed.
    """

    def __init__(
        self,
        run: RunInfo,
        sinks: Sequence[HostedSink],
        bus: Ring,
        drain_timeout_s: float,
        report_s: float,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        assert run.run_dir is not None
        self._config = HostConfig(run, list(sinks), os.getpid(), drain_timeout_s, min(report_s, 1e9))
        self._run_dir = run.run_dir
        self._run_dir = run.run_dir
        self._bus = bus
        self._on_fatal = on_fatal
        self._names = [sink.name for sink in sinks]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # around starting a process, telling it to finish, and killing it
        self._finish: Finish | None = None
        self._woken = threading.Event()
        self._given_up = False
        self._is_hopeless = False  # another try would find the same
        self._error: str | None = None
        self._reports: list[ObserverReport] | None = None
        self._ended = anyio.Event()
        self._finishing: anyio.CancelScope | None = None
        self._thread = threading.Thread(target=in_this_run(self._run), name="stagecast-sink-host", daemon=True)
        # As they are now: one that is started later must find, and write, what the first one did.
        self._cwd = os.getcwd()
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}

    @property
    def pid(self) -> int | None:
        """The process that runs now; None between two."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the process; does not wait for it."""
        for sink in self._config.sinks:
            if (place := Place.read(self._run_dir, sink.name)) is not None:
                # One beyond what the journal had when the run began is in a journal that is not there any more.
                Place(min(place.seq, sink.since)).write(self._run_dir, sink.name)
        self._thread.start()

    async def finish(self, until: int | None, timeout_s: float) -> list[ObserverReport]:
        """Have everything up to ``until`` delivered, and the sinks closed; kills what has not ended in time."""
        finish = Finish.within(until, timeout_s)
        with self._lock:
            self._finish = finish
            self._send(finish)
        self._woken.set()
        with anyio.move_on_after(timeout_s + _LEAVE_S) as self._finishing:
            await self._ended.wait()
        self._finishing = None
        self.kill()
        return self._reports if self._reports is not None else [self._left(name) for name in self._names]

    def hurry(self, timeout_s: float) -> None:
        """Let the end that is under way take no longer than this from now on."""
        if self._finishing is not None:
            self._finishing.deadline = min(self._finishing.deadline, anyio.current_time() + timeout_s)

    def kill(self) -> None:
        """End it at once, and start none again."""
        with self._lock:
            self._given_up = True
            if self._process is not None:
                with contextlib.suppress(OSError):
                    self._process.kill()
        self._woken.set()

    def _left(self, name: str) -> ObserverReport:
        error = self._error or "the sink host was still busy at the end of the drain"
        place = Place.read(self._run_dir, name) or Place(0)
        return ObserverReport(
            observer=name,
            state="stuck",
            published=place.delivered,
            delivered=place.delivered,
            error=f"{error}; what is left stands in the journal, and is not counted",
        )

    # --------------------------------------------------------------------------------------- on its own thread

    def _run(self) -> None:
        deaths = 0
        try:
            while not self._given_up:
                began = time.monotonic()
                problem = self._live()
                if self._reports is not None or self._given_up:
                    return
                deaths = 1 if time.monotonic() - began > _HEALTHY_S else deaths + 1
                self._error = problem
                if deaths >= _MOST_DEATHS or self._is_hopeless:
                    self._tell_of_death(problem, "disabled", deaths)
                    return
                self._tell_of_death(problem, "retrying", deaths)
                self._woken.clear()
                if self._finish is None:
                    self._woken.wait(min(0.1 * 2.0**deaths, 30.0))
        finally:
            self._bus.post(self._ended.set)

    def _live(self) -> str:
        """One process, from its start to its end; returns how that came about."""
        try:
            process = self._start()
        except (OSError, ValueError) as error:
            self._is_hopeless = isinstance(error, UnsafeFile)
            fix = "; remove that" if self._is_hopeless else ""
            return f"the sink host could not be started: {error}{fix}"
        if process is None:
            return "given up"
        with process:
            for line in self._lines(process):
                self._take(line)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            if process.poll() is None:
                process.kill()
        code = process.returncode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        log = Path(self._run_dir, PLACES_DIR, LOG_NAME)
        return f"the sink host ended {how}; what its sinks printed stands in {log}"

    def _start(self) -> subprocess.Popen[bytes] | None:
        make_folder_below(self._run_dir, PLACES_DIR)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with self._lock, open(open_below(self._run_dir, f"{PLACES_DIR}/{LOG_NAME}", flags), "ab") as log:
            if self._given_up:
                return None
            self._process = subprocess.Popen(
                # -P: not from the working directory, where a stranger may have put modules.
                [sys.executable, "-P", "-m", "sinks.host.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                cwd=self._cwd,
                bufsize=0,  # what could not be sent to a dead one must not be tried again when the pipe is closed
                start_new_session=True,  # what a terminal sends to the run's group is the run's
            )
            self._send(self._config)
            if self._finish is not None:
                self._send(self._finish)
            return self._process

    def _send(self, message: HostConfig | Finish) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it has died: whoever reads from it sees that
                process.stdin.write(msgspec.json.encode(message) + b"\n")
                process.stdin.flush()

    def _lines(self, process: subprocess.Popen[bytes]) -> Any:
        """The lines it says, until it has died.

        The end of its output alone does not tell that: a worker that was forked while the pipe was made holds it open.
        """
        assert process.stdout is not None
        fd, rest = process.stdout.fileno(), b""
        while True:
            dead = process.poll() is not None
            ready, _, _ = select.select([fd], [], [], 0 if dead else _LOOK_S)
            data = os.read(fd, 2**16) if ready else b""
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
            if (ready and not data) or (dead and not ready):
                return

    def _take(self, line: bytes) -> None:
        try:
            message: _Message = msgspec.json.decode(line, type=_Message)
        except (msgspec.DecodeError, RecursionError) as error:
            logger.warning(f"the sink host said what cannot be read: {error}")
            return
        if isinstance(message, Finished):
            self._reports = message.reports
            return
        if isinstance(message, Noticed):
            notify(message.text, message.without_secrets)
            return
        event = decode_json(bytes(message.event))
        origin = self._bus.origin
        now = {"attempt": origin.attempt, "rank": origin.rank, "global_step": origin.global_step}
        told: Event = msgspec.structs.replace(event, seq=0, epoch=origin.epoch, stage=origin.stage, **now)
        self._bus.publish(told)
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

    def _tell_of_death(self, problem: str, action: Any, deaths: int) -> None:
        logger.warning(f"{problem} ({action})", published=True)
        for name in self._names:
            failed = ObserverFailed(*self._bus.origin.header(), name, problem, "host", action, deaths)
            self._bus.publish(failed)
