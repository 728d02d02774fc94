"""The sink's side of a NATS server: it publishes events, awaits their acknowledgements, and takes commands.

Needs the extra ``stagecast[nats]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError

from events.errors import RunFolderError, SinkMisconfigured, WireError
from events.journal.lines import decode_line
from events.log import logger
from events.messages import Event
from events.run.inbox import commands_of
from events.sink import RunInfo
from events.text import plain_text
from events.wire import decode_command
from sinks.continued import Message
from sinks.nats.address import NatsAddress
from sinks.nats.client import ANSWER_S, NatsClient

if TYPE_CHECKING:
    from sinks.nats.sink import NATS

_HEADER_BYTES = 1_024
"""Bytes of a message that are left for its headers."""
_WINDOW_BYTES = 8 * 2**20
"""Bytes after which the sink waits for the acknowledgements of what it has sent."""
_PROGRESS = 64
"""Answers between two extensions of the time for the others."""
_DUPLICATE_WINDOW_S = 120.0
"""Seconds for which the server of a new stream knows the identity of an event."""
_TOO_LARGE = 10_054
"""Code of the server's error for a message that exceeds the stream's ``max_msg_size``."""


class _Acknowledged(msgspec.Struct):
    """The server's answer to a message."""

    seq: int = 0
    duplicate: bool = False
    error: dict[str, Any] | None = None


class Publisher:
    """Publishes the events of one run: a `sinks.continued.Store`.

    Belongs to the sink's thread; connects again when it is used after a loss.

    Raises:
        SinkMisconfigured: The server refuses the credentials, or to create the stream.
        ConnectionError: It is away, or has no JetStream.
    """

    fix = "raise its max_payload"

    def __init__(self, sink: NATS, address: NatsAddress, run: RunInfo) -> None:
        self._sink = sink
        self._address = address
        self._run = run
        self._client: NatsClient | None = None
        self._stream = ""  # empty once it is gone
        self._inbox = ""
        self.newest: Event | None = None
        """The run's newest event in the stream when the connection was made."""
        self.most_bytes = 0
        """Maximum bytes per line."""
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Message] = {}  # sent and not acknowledged, by the number of their inbox
        self._answered = asyncio.Event()  # set when there are none
        self._deadline = asyncio.Timeout(None)
        self._failure: str | None = None
        self._duplicate: tuple[Event, int] | None = None
        self._refused: set[int] = set()  # `seq` of events that the server has refused, and later ones not
        self._since: float | None = None  # when the first of the events was sent that are not acknowledged
        self._connect()

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish events, at most `sinks.continued.WINDOW`, and wait until the server has acknowledged all of them.

        Raises:
            ConnectionError: The server is away, does not answer, or does not take them now. Publish them again.
            SinkMisconfigured: Another run has published an event of the same identity.
        """
        client = self._client
        if client is None or client.is_lost or not self._stream:
            try:
                client = self._connect()
            except SinkMisconfigured as error:  # it has worked before, and may again
                raise ConnectionError(str(error)) from None
        if self.newest is not None and self._since is not None:
            newest, is_forgotten = self.newest.seq, time.monotonic() - self._since > _DUPLICATE_WINDOW_S / 2
            if is_forgotten:  # the server would store them twice
                messages = [one for one in messages if one[0].seq > newest or one[0].seq in self._refused]
        self._since = time.monotonic() if self._since is None else self._since
        try:
            client.call(self._publish(client, messages))
        except ConnectionError:
            if client.is_lost:
                self.close()
            raise
        self._since = None
        self._refused.clear()

    def is_taken(self) -> SinkMisconfigured:
        """The error for a run whose name is that of another run in the stream."""
        return SinkMisconfigured(
            f"the stream {self._stream} has another run with the run_id {self._run.run_id!r}; give this run another"
            f" run_id, or the address another prefix"
        )

    def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # ------------------------------------------------------------------------------------------ the connection

    def _connect(self) -> NatsClient:
        self.close()
        client = NatsClient.connected(self._address)
        try:
            client.call(self._prepare(client), 3 * ANSWER_S)
        except BaseException:
            client.close()
            raise
        self._client = client
        return client

    async def _prepare(self, client: NatsClient) -> None:
        address, run_id = self._address, self._run.run_id
        self._stream = await client.stream() or await self._create(client)
        self.most_bytes = client.max_payload - _HEADER_BYTES
        with contextlib.suppress(APIError, ConnectionError):  # a user who may only publish
            config = (await client.asked(client.core.jsm().stream_info(self._stream))).config
            if config.max_msg_size is not None and config.max_msg_size > 0:
                self.most_bytes = min(self.most_bytes, config.max_msg_size - _HEADER_BYTES)
        found = await client.last(self._stream, address.events(run_id))
        try:
            self.newest = None if found is None else decode_line(found[1])[0]
        except WireError:  # a stranger's message
            self.newest = None
        self._inbox = client.inbox()
        self._answered = asyncio.Event()  # of this event loop
        client.when_lost = self._answered.set
        await client.core.subscribe(f"{self._inbox}.*", cb=self._take)
        await client.core.subscribe(address.commands(run_id), cb=self._serve)
        await client.asked(client.core.flush())
        if client.problem:  # the server does not allow one of the subscriptions
            logger.warning(
                f"NATS: the server at {address.server} says {client.problem}; allow {address.commands(run_id)}"
            )
            client.problem = ""

    async def _create(self, client: NatsClient) -> str:
        address, sink = self._address, self._sink
        config = StreamConfig(
            name=address.prefix.replace(".", "_"),
            subjects=[address.all_events],
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            max_age=sink.max_age_s,
            max_bytes=sink.max_bytes or -1,
            duplicate_window=min(_DUPLICATE_WINDOW_S, sink.max_age_s or _DUPLICATE_WINDOW_S),
            num_replicas=sink.replicas,
        )
        try:
            await client.asked(client.core.jsm().add_stream(config))
        except APIError as error:
            if (found := await client.stream()) is not None:  # another run was faster
                return found
            raise SinkMisconfigured(
                f"the NATS server at {address.server} refuses to create the stream {config.name}:"
                f" {plain_text(error.description or '')}; give NATS(max_bytes=...) that fits, or create a stream with"
                f" the subject {address.all_events}"
            ) from None
        return str(config.name)

    # ------------------------------------------------------------------------------------------- in the event loop

    async def _publish(self, client: NatsClient, messages: Sequence[Message]) -> None:
        self._failure = self._duplicate = None
        prefix, core, run_id = f"{self._inbox}.", client.core, self._run.run_id
        subjects: dict[type[Event], str] = {}
        sent = 0
        try:
            async with asyncio.timeout(ANSWER_S) as self._deadline:
                for event, line in messages:
                    number = next(self._numbers)
                    kind = type(event)
                    if kind not in subjects:
                        subjects[kind] = self._address.events(run_id, kind.__name__)
                    self._waiting[number] = event, line
                    # The identity's name is part of the subject: encoded, as headers hold ASCII.
                    identity = {"Nats-Msg-Id": f"{subjects[kind].split('.')[-2]}/{event.attempt}/{event.seq}"}
                    await core.publish(subjects[kind], line, reply=f"{prefix}{number}", headers=identity)
                    sent += len(line)
                    if sent > _WINDOW_BYTES:
                        sent = 0
                        await self._acknowledged(client)
                await self._acknowledged(client)
        except TimeoutError:
            reason = f"has not acknowledged {len(self._waiting):,} events in {ANSWER_S:g} s"
            raise ConnectionError(f"the NATS server at {self._address.server} {reason}") from None
        except (Error, OSError) as error:
            if isinstance(error, ConnectionError):
                raise
            raise ConnectionError(f"the NATS server at {self._address.server}: {error}") from None
        finally:
            self._waiting.clear()
        if self._failure is not None:
            raise ConnectionError(f"the NATS server at {self._address.server} does not take events: {self._failure}")
        await self._compare(client)

    async def _acknowledged(self, client: NatsClient) -> None:
        """Wait for the answers to all that was sent."""
        while self._waiting:
            if client.is_lost:
                raise ConnectionError(f"the NATS server at {self._address.server} has closed the connection")
            self._answered.clear()
            await self._answered.wait()

    async def _take(self, message: Msg) -> None:
        """Take the server's answer to an event."""
        number = int(message.subject.rpartition(".")[2])
        sent = self._waiting.pop(number, None)
        if sent is None:  # to one that was given up
            return
        if not self._waiting:
            self._answered.set()
        elif number % _PROGRESS == 0:
            self._deadline.reschedule(asyncio.get_running_loop().time() + ANSWER_S)
        data, event = message.data, sent[0]
        if data and b'"error"' not in data and b'"duplicate"' not in data:
            return
        try:
            answer = msgspec.json.decode(data, type=_Acknowledged) if data else _Acknowledged(error={})
        except (ValueError, RecursionError):
            answer = _Acknowledged(error={"description": "an unknown answer"})
        if answer.error is not None:
            self._refused.add(event.seq)
            nobody = f"no stream keeps {self._address.all_events}, or JetStream is disabled"
            self._failure = plain_text(str(answer.error.get("description") or nobody), 200)
            if answer.error.get("err_code") == _TOO_LARGE:
                self.most_bytes = min(self.most_bytes, len(sent[1]) - 1)  # next time a gap replaces it
            if not data:
                self._stream = ""  # the stream was removed: make sure of another
        elif answer.duplicate and self._duplicate is None:
            self._duplicate = event, answer.seq

    async def _compare(self, client: NatsClient) -> None:
        """Compare a duplicate with the event in the stream, which another run of the same name may have published."""
        if self._duplicate is None:
            return
        event, number = self._duplicate
        found = await client.following(self._stream, self._address.events(self._run.run_id), number)
        with contextlib.suppress(WireError):
            stored = None if found is None or found[0] != number else decode_line(found[1])[0]
            if stored is not None and stored.time != event.time:
                raise self.is_taken()

    async def _serve(self, message: Msg) -> None:
        """Answer a request: a command, or the question whether someone answers."""
        if message.reply:
            with contextlib.suppress(Error):
                await message.respond(b"{}" if not message.data else msgspec.json.encode(self._command(message.data)))

    def _command(self, data: bytes) -> dict[str, object]:
        command_id, status = None, 409
        try:
            command = decode_command(data)
            command_id = command.id
            if not self._sink.commands:
                reason, status = "the sink takes no commands; it needs NATS(commands=True)", 403
            elif self._run.run_dir is None:
                reason, status = "the run has no folder, through which commands reach it", 403
            else:
                commands_of(self._run.run_dir).send(command)
                return {"type": "sent", "id": command_id}
        except (WireError, RunFolderError, OSError) as error:
            reason = str(error)
        return {"type": "refused", "id": command_id, "reason": reason, "status": status}
