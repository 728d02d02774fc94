"""A sink that publishes a run's events to NATS JetStream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta

from events.errors import SinkMisconfigured, WireError
from events.journal.lines import encode_lines, gap_before
from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR
from events.log import logger
from events.messages import Event
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.files.appended import newer, position_of
from sinks.nats.address import NatsAddress
from sinks.nats.order import WINDOW

if TYPE_CHECKING:
    from sinks.nats.publisher import Message, Publisher

_HEADER_BYTES = 1_024
"""Bytes of a message that are left for its headers."""
_CLOCK_S = 1.0


class NATS(Strict, frozen=True):
    """Publishes each event to NATS JetStream, for readers on any machine::

        Trainer(module, arguments, sinks=[NATS("nats://nats.example.org", commands=True)]).train()
        $ stagecast watch nats://nats.example.org                        # the page, from anywhere
        async with connect("nats://nats.example.org/RUN") as run: ...    # the same Run

    **Messages.** The subject is ``stagecast.RUN.TYPE``; characters that subjects do not allow, dots among them, are
    percent-encoded. The data is the event's line in the journal (`events.journal.lines`): JSON with ``previous_seq``
    and ``crc32``. The header ``Nats-Msg-Id`` is ``RUN/ATTEMPT/SEQ``, so that the server drops repeated events.

    **Stream.** If no stream keeps these subjects, one is created: named after the prefix, on disk, without its oldest
    messages once it exceeds ``max_age_s`` or ``max_bytes``. An existing one keeps its own limits. All runs share it.

    **Delivery.** Every event is acknowledged. Up to 4,096 are sent before the first acknowledgement; the others stay in
    the journal, so a server that is away for hours costs neither memory nor an event. The sink runs in the sink host,
    and continues behind the last event in the stream. What the server has not received when the drain of the run ends,
    ``stagecast replay`` or a resumed run sends later. A `JournalGap` replaces an event that exceeds the server's
    ``max_payload``, with a warning. NATS syncs its disk every two minutes by default: a crash of the server's machine,
    not of the server, may lose acknowledged events.

    **Names.** Two runs with one ``run_id`` cannot share a prefix: the sink of the later one is disabled, with the
    reason.

    **Commands.** With ``commands``, whoever may publish to ``stagecast-commands.RUN`` may stop and pause the run.
    """

    url: str
    """``nats://HOST:4222``, or ``tls://`` for TLS. A token or ``USER:PASSWORD`` stands before the host, as in
    ``nats://TOKEN@HOST``; options follow a ``?``: ``creds=FILE`` (a credentials file), ``ca=FILE`` (the certificate of
    your own authority), ``prefix=NAME`` (instead of ``stagecast``)."""
    commands: bool = False
    """Whether readers may stop and pause the run, and request checkpoints."""
    max_age_s: Annotated[float, Meta(ge=0)] = 30 * 86_400.0
    """Seconds for which a new stream keeps an event; 0 for no limit."""
    max_bytes: Annotated[int, Meta(ge=-1)] = 10 * 2**30
    """Maximum bytes of a new stream, which the server reserves; -1 for no limit."""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Servers of a cluster that keep a new stream."""

    # The server may be away for hours: the journal is the queue.
    delivery: ClassVar[Delivery] = Delivery(
        overflow="catch_up",
        latency_s=0.1,
        batch=8_192,
        timeout_s=120.0,
        retries=2**31 - 1,
        max_backoff_s=5.0,
        runs_in="process",
    )

    def __repr__(self) -> str:
        # The address may hold a token.
        return f"NATS({self._shown!r}, commands={self.commands!r})"

    def __rich_repr__(self) -> Any:
        yield from (self._shown, ("commands", self.commands))  # for rich tracebacks

    @property
    def _shown(self) -> str:
        try:
            return NatsAddress.of(self.url).server
        except ValueError:
            return "..."

    def check(self) -> None:
        """Raise `SinkMisconfigured` for a wrong option, or if the client is not installed."""
        address = self._address()
        for name, least in (("max_age_s", 0), ("max_bytes", -1), ("replicas", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= least):
                raise SinkMisconfigured(f"NATS({name}={value!r:.80}) is not a limit; give a number >= {least}")
        require("nats", "nats", "the sink NATS")
        if address.creds:
            require("nkeys", "nats", "the sink NATS")

    def _address(self) -> NatsAddress:
        try:
            address = NatsAddress.of(self.url)
        except ValueError as error:
            raise SinkMisconfigured(f"NATS: {error}") from None
        if address.run_id:
            raise SinkMisconfigured(
                f"NATS: the address names a run, {address.run_id!r:.80}, but the sink publishes its own; remove it"
            )
        return address

    def open(self, run: RunInfo) -> NATSWriter:
        """Connect, find or create the stream, and find the last event of the run in it.

        Raises:
            SinkMisconfigured: A setting is invalid, or the server refuses the credentials or the stream.
            ConnectionError: The server is away, or has no JetStream. A retry may help.
        """
        self.check()
        from sinks.nats.publisher import Publisher  # needs nats

        return NATSWriter(Publisher(self, self._address(), run), run.run_dir)


class NATSWriter:
    """An open `NATS`. A write returns when the server has acknowledged all events."""

    def __init__(self, publisher: Publisher, run_dir: str | None) -> None:
        self._publisher = publisher
        self._journal_dir = None if run_dir is None else Path(run_dir) / JOURNAL_DIR
        self._last = (0, 0)
        self._is_first = True
        self._warned: set[str] = set()
        if publisher.newest is not None:
            self._last = position_of(publisher.newest)

    def write(self, events: Sequence[Event]) -> None:
        """Publish the events that are not in the stream yet.

        Raises:
            ConnectionError: The server is away, does not answer, or does not take them now.
            SinkMisconfigured: The stream has another run of this ``run_id``.
        """
        if self._is_first and events:
            if self._publisher.newest is not None:
                self._continue(events, self._publisher.newest)
            self._is_first = False
        self._publish(newer(events, self._last))

    def _continue(self, events: Sequence[Event], newest: Event) -> None:
        """Check that the stream's events are of this run; publish those that an earlier attempt has not."""
        same = next((event for event in events if position_of(event) == self._last), None)
        # Otherwise, an event that is delivered again is not later than the newest one in the stream.
        is_later = position_of(events[0]) <= self._last and events[0].time > newest.time + _CLOCK_S
        if is_later if same is None else same.time != newest.time:
            raise self._publisher.is_taken()
        if self._journal_dir is not None and events[0].seq > self._last[1] + 1:
            reader = JournalReader(self._journal_dir, self._last[1])
            while missed := [event for event in reader.read() if event.seq < events[0].seq]:
                self._publish(missed)

    def _publish(self, events: Sequence[Event]) -> None:
        for start in range(0, len(events), WINDOW):
            window = events[start : start + WINDOW]
            self._publisher.publish(self._messages(window))
            self._last = position_of(window[-1])

    def _messages(self, events: Sequence[Event]) -> list[Message]:
        """The events with their lines; a gap replaces one that the server or the encoding does not allow."""
        most = self._publisher.max_payload - _HEADER_BYTES
        previous = self._last[1]
        try:
            lines = encode_lines(events, previous).split(b"\n")[:-1]
            if max(map(len, lines)) <= most:
                return list(zip(events, lines, strict=True))
        except WireError:
            pass
        messages: list[Message] = []
        for event in events:
            try:
                line = encode_lines([event], previous)[:-1]
                reason = f"its line has {len(line):,} bytes, and the server takes {most:,}; raise its max_payload"
            except WireError as error:
                line, reason = b"", str(error)
            if not line or len(line) > most:
                name = type(event).__name__
                if name not in self._warned:
                    self._warned.add(name)
                    logger.warning(f"NATS does not publish event {event.seq}, {name}: {reason}")
                event = gap_before(event, event.seq, event.seq, event.seq, 1, f"{name}: {reason}")
                line = encode_lines([event], previous)[:-1]
            messages.append((event, line))
            previous = event.seq
        return messages

    def close(self) -> None:
        """Disconnect. All that was written is acknowledged."""
        self._publisher.close()
