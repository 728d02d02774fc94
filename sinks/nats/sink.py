"""A sink that publishes a run's events to NATS JetStream."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from events.errors import SinkMisconfigured
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.continued import ContinuedWriter
from sinks.nats.address import NatsAddress


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

    def open(self, run: RunInfo) -> ContinuedWriter:
        """Connect, find or create the stream, and find the last event of the run in it.

        Raises:
            SinkMisconfigured: A setting is invalid, or the server refuses the credentials or the stream.
            ConnectionError: The server is away, or has no JetStream. A retry may help.
        """
        self.check()
        from sinks.nats.publisher import Publisher  # needs nats

        return ContinuedWriter(Publisher(self, self._address(), run), run.run_dir, "NATS")
