"""The sink host: a process in which sinks run, so that what they compute never holds the interpreter of the loop.

`sinks.host.process` starts it as an `events.process.Child`. It reads the run's journal (`events.journal.feed`), each
sink from its own place. It receives `HostConfig`, then `Finish`, and sends `HostedEvent`, `Noticed` and `Finished`. A
file of the run's folder keeps how far each sink has come, so that a host that is started again continues from there.

When the process of the run dies, in whatever way, the host delivers what the journal has, and ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import anyio
import msgspec

from events import notice
from events.bus.cpu_time import CpuTime
from events.bus.observer import Observer
from events.bus.supervisor import report_observers
from events.bus.target import SinkTarget
from events.bus.wakeup import Post, Wakeup
from events.bus.worker import Worker
from events.errors import SinkMisconfigured
from events.journal.feed import JournalFeed
from events.journal.reader import SkippedLine
from events.journal.segment import JOURNAL_DIR
from events.log import RunLog, current_origin
from events.messages import EVENT_TYPES, Event
from events.origin import Origin
from events.process import Parent
from events.protocol import ObserverReport
from events.safe_files import open_lock_below, read_below, replace_below
from events.sink import Delivery, RunInfo, Sink
from events.wire import encode_json

PLACES_DIR = "sinks"
"""Folder in the run's folder with the place of each hosted sink in the journal."""
_PLACE_BYTES = 4_096
_WAIT_S = 2.0
"""Seconds beyond the drain of an earlier sink host for which a new one waits; after them it reports the wait."""
_LOOK_S = 0.05


class HostedSink(msgspec.Struct, frozen=True):
    """A sink in a form that can be sent to another process."""

    name: str
    """The observer's."""
    kind: str
    """``module:Class``."""
    fields: dict[str, object]
    delivery: dict[str, object]
    """`events.sink.Delivery` without ``types``..."""
    types: list[str] | None
    """...whose names are here."""
    since: int
    """Its place in the journal if this run's host has not had it before."""

    @classmethod
    def of(cls, name: str, sink: Sink, delivery: Delivery, since: int) -> HostedSink:
        """Describe a sink.

        Raises:
            SinkMisconfigured: The sink cannot be sent.
        """
        kind = type(sink)
        if not isinstance(sink, msgspec.Struct):
            raise SinkMisconfigured(
                f"{kind.__name__} cannot run in a sink host: it is not a msgspec.Struct of plain values"
            )
        if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
            raise SinkMisconfigured(
                f"{kind.__qualname__} cannot run in a sink host, which could not import it; define it at the top level"
                f" of a module"
            )
        unkept = sorted(one.__name__ for one in delivery.types or () if not one.journalled)
        if unkept:
            raise SinkMisconfigured(
                f"{kind.__name__} cannot run in a sink host: its journal does not keep {', '.join(unkept)}"
            )
        types = None if delivery.types is None else sorted(one.__name__ for one in delivery.types)
        plain = msgspec.to_builtins(msgspec.structs.replace(delivery, types=None))
        try:
            fields = msgspec.to_builtins(sink)
            msgspec.msgpack.encode(fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise SinkMisconfigured(f"{kind.__name__} cannot run in a sink host: {error}") from error
        return cls(name, f"{kind.__module__}:{kind.__qualname__}", fields, plain, types, since)

    def build(self) -> tuple[Sink, Delivery]:
        """Build the sink and its delivery. Raises what its import or its constructor raises."""
        kind: type[Sink] = pkgutil.resolve_name(self.kind)
        known = {one.__name__: one for one in EVENT_TYPES}
        types = None if self.types is None else frozenset(known[one] for one in self.types)
        delivery = msgspec.structs.replace(msgspec.convert(self.delivery, Delivery), types=types)
        return msgspec.convert(self.fields, kind), delivery


class HostConfig(msgspec.Struct, frozen=True):
    """The first message to a host."""

    run: RunInfo
    sinks: list[HostedSink]
    drain_timeout_s: float
    """Maximum seconds to deliver the rest when the process of the run has died."""
    report_s: float
    """Seconds between two reports on the health of the sinks."""


class Finish(msgspec.Struct, frozen=True):
    """The run is over: deliver up to ``until``, close, report, end."""

    until: int | None
    """The last ``seq`` to deliver; None for all that the journal holds."""
    deadline: float
    """By `time.monotonic`, which all processes of a machine share: a host may have just been started."""


class Noticed(msgspec.Struct, frozen=True, tag=True):
    """A line for the person at the run's terminal: see `events.notice`."""

    text: str
    without_secrets: str

    def __repr__(self) -> str:
        return f"Noticed({self.without_secrets!r})"


class HostedEvent(msgspec.Struct, frozen=True, tag=True):
    """An event about a sink, or a warning that one has logged."""

    event: bytes
    """In JSON (`events.wire`)."""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The last message of a host that ends cleanly."""

    reports: list[ObserverReport]


FromHost = HostedEvent | Noticed | Finished
from_host: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost)
_config: msgspec.msgpack.Decoder[HostConfig] = msgspec.msgpack.Decoder(HostConfig)
_finish: msgspec.msgpack.Decoder[Finish] = msgspec.msgpack.Decoder(Finish)


class Place(msgspec.Struct, frozen=True):
    """The place of a sink in the journal, kept in a file of the run's folder."""

    seq: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    delivered: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    """Events that this attempt's hosts have delivered to it."""

    @staticmethod
    def file(name: str) -> str:
        """The file, below the run's folder."""
        return f"{PLACES_DIR}/{name}.json"

    @classmethod
    def read(cls, run_dir: str | os.PathLike[str], name: str) -> Place | None:
        """Read the place of a sink; None if there is none, or it cannot be read."""
        try:
            return msgspec.json.decode(read_below(run_dir, cls.file(name), _PLACE_BYTES), type=cls)
        except (OSError, ValueError, RecursionError):
            return None

    def write(self, run_dir: str | os.PathLike[str], name: str) -> None:
        """Write the file. If the disk refuses, the older one stays, and the events since are delivered again."""
        with contextlib.suppress(OSError):
            replace_below(run_dir, self.file(name), msgspec.json.encode(self), durable=False)


class _Unbuilt:
    """A sink that cannot be built: opening it raises why."""

    def __init__(self, error: Exception | SystemExit) -> None:
        self._error = error

    def open(self, run: RunInfo) -> NoReturn:
        raise SinkMisconfigured(f"it cannot be built in the sink host: {self._error!r}") from self._error


class FeedObservers:
    """Sinks that are fed from a journal: for the host of a run, and for `sinks.replay`.

    Args:
        publish: Receives the events about the observers, in the event loop.
        post: Runs a function in the event loop.
        wanted: See `JournalFeed`.
    """

    def __init__(
        self,
        run: RunInfo,
        publish: Callable[[Event], object],
        post: Post,
        wanted: Callable[[Event], bool] | None = None,
    ) -> None:
        self.origin = Origin(run.run_id, run.attempt)
        self._run = run
        self._publish = publish
        self._post = post
        self._wanted = wanted
        self._feeds: list[JournalFeed] = []
        self.observers: list[Observer] = []

    def add(
        self, name: str, sink: Sink, delivery: Delivery, place: Place, on_delivered: Callable[[int, int], None]
    ) -> None:
        """Add a sink that continues from a place."""
        assert self._run.run_dir is not None
        journal_dir = Path(self._run.run_dir) / JOURNAL_DIR
        feed = JournalFeed(name, delivery, journal_dir, place.seq, on_delivered, self._wanted, place.delivered)
        observer = Observer(
            feed,
            SinkTarget(sink, self._run),
            worker=Worker(f"stagecast-{name}", self._post, CpuTime()),
            origin=self.origin,
            publish=self._publish,
            on_fatal=lambda error: None,
        )
        self._feeds.append(feed)
        self.observers.append(observer)

    def finish(self) -> None:
        """Nothing more is written to the journal: close each sink when it has received all of it."""
        for feed in self._feeds:
            feed.finish()

    @property
    def skipped(self) -> list[SkippedLine]:
        """Lines of the journal that are not events, of the feed that has met most of them."""
        return max((feed.skipped for feed in self._feeds), key=len, default=[])

    async def drain(self, until: int | None, timeout_s: float) -> list[ObserverReport]:
        """Deliver the rest, close and report, in ``timeout_s`` and a moment to count."""
        for feed, observer in zip(self._feeds, self.observers, strict=True):
            feed.stop_at(until)
            observer.drain()
        with anyio.move_on_after(timeout_s):
            for observer in self.observers:
                await observer.finished()
        return await self.counted()

    async def counted(self) -> list[ObserverReport]:
        """Report on each observer, with the number of events that it did not receive."""
        async with anyio.create_task_group() as counting:
            for feed, observer in zip(self._feeds, self.observers, strict=True):
                if feed.statistics.queued or observer.circuit != "closed" or not observer.is_finished:
                    counting.start_soon(feed.count_left)
        return [observer.report() for observer in self.observers]


def main() -> None:
    """Run the program."""
    # A signal to the group of a service must not keep the host from delivering what the run still publishes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = Parent()
    notice.forward = lambda text, without_secrets: parent.send(Noticed(text, without_secrets))
    config = parent.receive(_config)
    if config is None:
        return
    _wait_for_others(config, parent)
    anyio.run(_serve, config, parent)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a sink that hangs must not hold the end


async def _serve(config: HostConfig, parent: Parent) -> None:
    def publish(event: Event) -> None:
        parent.send(HostedEvent(encode_json(event)))

    calls = Wakeup()
    observers = FeedObservers(config.run, publish, calls.post)
    current_origin.set(observers.origin)
    RunLog(observers.origin, publish).start()
    finish: list[Finish] = []
    over = anyio.Event()

    def end(how: Finish | None) -> None:
        finish.append(how or Finish(None, time.monotonic() + config.drain_timeout_s))
        calls.post(over.set)

    parent.serve(_finish, end)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(calls.serve)
        _add_sinks(observers, config)
        for observer in observers.observers:
            tasks.start_soon(observer.run)
        tasks.start_soon(report_observers, observers.observers, observers.origin, publish, config.report_s)
        await over.wait()
        reports = await observers.drain(finish[0].until, max(0.0, finish[0].deadline - time.monotonic()))
        parent.send(Finished(reports))
        tasks.cancel_scope.cancel()


def _add_sinks(observers: FeedObservers, config: HostConfig) -> None:
    run_dir = config.run.run_dir
    assert run_dir is not None
    for one in config.sinks:
        place = Place.read(run_dir, one.name) or Place(one.since)
        try:
            sink, delivery = one.build()
        except (Exception, SystemExit) as error:  # the user's module: the report must name it
            sink, delivery = _Unbuilt(error), Delivery(on_error="disable")
        observers.add(one.name, sink, delivery, place, functools.partial(_keep, run_dir, one.name))


def _keep(run_dir: str, name: str, seq: int, delivered: int) -> None:
    Place(seq, delivered).write(run_dir, name)


def _wait_for_others(config: HostConfig, parent: Parent) -> None:
    """Wait until no other host of this run is left: one whose run has died may still be delivering its events.

    Exits where the other host outlasts the time that it has to deliver them.
    """
    import fcntl  # not at the top: what needs no host is imported on Windows, too

    name = f"{PLACES_DIR}/host.lock"
    fd = open_lock_below(config.run.run_dir or "", name)
    began, is_told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends
            return
        except BlockingIOError:
            waited_s = time.monotonic() - began
        if waited_s > config.drain_timeout_s + _WAIT_S:
            sys.exit(f"{name} has been held by another process for {waited_s:.0f} s; end that process")
        if waited_s > _WAIT_S and not is_told:
            is_told = True
            told = f"the sink host waits for an earlier one of this run, which holds {name}"
            parent.send(Noticed(told, told))
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
