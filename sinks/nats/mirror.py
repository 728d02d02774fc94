"""Copies the runs of a NATS server to run folders, so that whatever reads run folders shows them.

A run that is under way holds its folder, as it does where it trains, and commands to the folder reach it through NATS.
Needs the extra ``stagecast[nats]``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from nats.errors import Error

from events.errors import RunFolderError, SinkMisconfigured
from events.log import in_this_run, logger
from events.messages import Event
from events.protocol import AnyCommand
from events.run.copy import RunCopy, folder_name
from events.run.inbox import Inbox
from events.text import name_problem, plain_text
from events.wire import encode_command
from sinks.nats.address import NatsAddress
from sinks.nats.client import ANSWER_S, Messages, NatsClient
from sinks.nats.liveness import Liveness
from sinks.nats.order import InOrder

_READ_S = 0.25
_LOOK_S = 0.5
"""Seconds between two looks at the runs that are open."""
_FEW = 500
"""Fewer messages at a time show that the copy has caught up with the stream."""
_MOST_PAUSE_S = 5.0
_MOST_OPEN = 64
"""Maximum runs whose files are open."""
_COMMAND_S = 5.0


class NatsMirror:
    """Keeps a run folder for each run of the stream, from `start` to `stop`, on a thread of its own.

    Args:
        address: Of the server; with a run, only this one is copied.
        folder: Receives the run folders.
    """

    def __init__(self, address: NatsAddress, folder: Path) -> None:
        self._address = address
        self._folder = folder
        self._runs: dict[str, MirroredRun] = {}
        self._next = 1  # number of the next message in the stream
        self._client: NatsClient | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=in_this_run(self._run), name="stagecast-nats-mirror", daemon=True)

    def start(self) -> None:
        """Connect, and start to copy.

        Raises:
            ConnectionError: Nothing answers there.
            SinkMisconfigured: The server refuses the credentials or the certificate.
        """
        self._client = NatsClient.connected(self._address)
        self._thread.start()

    def stop(self) -> None:
        """Disconnect, and release the folders."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER_S)
        for run in self._runs.values():
            run.release()

    def _run(self) -> None:
        pause_s, is_told = 0.1, False
        while not self._stopped.is_set():
            try:
                if self._client is None:
                    self._client = NatsClient.connected(self._address)
                    pause_s, is_told = 0.1, False
                self._copy(self._client)
            except (OSError, SinkMisconfigured, RunFolderError, Error) as error:
                if not is_told and not self._stopped.is_set():
                    logger.warning(f"{plain_text(str(error))}; the page shows what was there, and tries again")
                is_told = True
                self._disconnect()
                self._stopped.wait(pause_s)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)
        self._disconnect()

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _copy(self, client: NatsClient) -> None:
        address = self._address
        subject = address.events(address.run_id) if address.run_id else address.all_events
        while (stream := client.call(client.stream(), ANSWER_S)) is None:
            if self._stopped.wait(_LOOK_S):  # no run has published yet
                return
        newest = client.call(client.last(stream, subject), ANSWER_S)
        if newest is None or newest[0] < self._next - 1:
            self._next = 1  # another stream; events that are here already are skipped
        messages = Messages(client, stream, subject, self._next)
        looked_at = time.monotonic()
        while not self._stopped.is_set():
            batch = client.call(messages.read(_READ_S), ANSWER_S)
            by_run: dict[str, list[bytes]] = {}
            for message in batch:
                if (run_id := address.run_of(message.subject)) is not None:
                    by_run.setdefault(run_id, []).append(message.data)
            for run_id, lines in by_run.items():
                self._add(client, run_id, lines)
            self._next = messages.next
            if len(batch) < _FEW and time.monotonic() - looked_at > _LOOK_S:
                looked_at = time.monotonic()
                for run in list(self._runs.values()):
                    run.look(client)

    def _add(self, client: NatsClient, run_id: str, lines: Iterable[bytes]) -> None:
        run = self._runs.get(run_id)
        if run is None:
            if (problem := name_problem(run_id)) is not None:
                return self._refuse(run_id, problem)
            run = MirroredRun(run_id, self._folder / folder_name(run_id), self._address)
        self._runs[run_id] = self._runs.pop(run_id, run)  # the last one is the newest
        run.commands.client = client
        run.add(lines)
        open_ones = [one for one in self._runs.values() if one.is_open]
        for one in open_ones[:-_MOST_OPEN]:
            one.release()
        return None

    def _refuse(self, run_id: str, problem: str) -> None:
        logger.warning(f"a run in the stream is not shown: its run_id {plain_text(run_id, 80)!r} {problem}")
        self._runs[run_id] = MirroredRun(run_id, None, self._address)


class MirroredRun:
    """One run, and its folder; without a folder its events are dropped. Belongs to the mirror's thread."""

    def __init__(self, run_id: str, path: Path | None, address: NatsAddress) -> None:
        self.commands = NatsCommands(run_id, address)
        self._copy = None if path is None else RunCopy(path, run_id)
        self._order = InOrder(run_id)
        self._liveness = Liveness()
        self._unwritten: list[Event] = []
        self._inbox: Inbox | None = None

    @property
    def is_open(self) -> bool:
        """Whether it holds its folder."""
        return self._copy is not None and self._copy.is_open

    def add(self, lines: Iterable[bytes]) -> None:
        """Append events to its journal. Raises `OSError` if the disk refuses."""
        now = time.monotonic()
        self._write([event for line in lines for event in self._order.add(line, now)])

    def look(self, client: NatsClient) -> None:
        """Release the folder if the run has ended or is lost; waits for its sink's answer."""
        self._write(self._order.wait(time.monotonic()))
        if self._copy is None or not self.is_open or not (self._copy.has_ended or self._liveness.is_quiet):
            return
        served = self.commands.is_served(client)
        if served is not True if self._copy.has_ended else self._liveness.is_lost(served):
            self.release()
        elif served:
            self._liveness.heard()

    def release(self) -> None:
        """Close its files, and let the folder go."""
        inbox, self._inbox = self._inbox, None
        if inbox is not None:
            inbox.stop()
        if self._copy is not None:
            self._copy.release()

    def _write(self, events: list[Event]) -> None:
        self._unwritten += events  # with those that the disk has refused
        if not self._unwritten or self._copy is None:
            self._unwritten.clear()
            return
        if not self._copy.is_open:
            self.release()
            since_ns = time.time_ns()
            self._copy.open()
            self._inbox = Inbox(self._copy.path, self.commands, since_ns)
            self._inbox.start()
        self._copy.write(self._unwritten)
        self._liveness.heard(time.time() - self._unwritten[-1].time)
        self._unwritten = []


class NatsCommands:
    """The `events.protocol.Commands` of a run that a sink `NATS` serves. Any thread."""

    def __init__(self, run_id: str, address: NatsAddress) -> None:
        self.client: NatsClient | None = None
        self._subject = address.commands(run_id)
        self._run_id = run_id

    def send(self, command: AnyCommand) -> None:
        """Send a command, and wait for the sink's answer. Raises `RunFolderError` if the run does not take it."""
        client = self.client
        run = plain_text(self._run_id, 80)
        try:
            answer = client and client.call(client.request(self._subject, encode_command(command), _COMMAND_S))
        except ConnectionError as error:
            raise RunFolderError(f"the command did not reach run {run}: {error}") from None
        if not answer:
            raise RunFolderError(f"no sink NATS serves run {run}, so the command {command!r:.80} was not taken")
        with contextlib.suppress(ValueError, RecursionError):
            reply = msgspec.json.decode(answer, type=dict[str, object])
            if reply.get("type") == "sent":
                return
            raise RunFolderError(plain_text(str(reply.get("reason"))))
        raise RunFolderError(f"run {run} has not answered the command as a sink NATS does")

    def is_served(self, client: NatsClient) -> bool | None:
        """Whether a sink serves the run; None if that is not known."""
        try:
            return client.call(client.request(self._subject, b"", 1.0)) is not None
        except ConnectionError:
            return None
