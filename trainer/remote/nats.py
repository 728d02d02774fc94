"""A run as NATS JetStream knows it: `sinks.nats` publishes its events. Needs the extra ``stagecast[nats]``.

`NatsServer` answers the questions that `trainer.remote.http.RunServer` answers, so that `trainer.remote.connect` does
the rest. The client has a thread of its own, because nats-py needs asyncio; each wait for it uses one, too.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
import anyio.to_thread
import msgspec

from events.errors import SinkMisconfigured, WireError
from events.journal.lines import decode_line
from events.messages import Event, RunEnded, RunStarted
from events.run.state import RunState
from events.text import plain_text
from events.wire import encode_json_lines
from sinks.continued import WINDOW
from sinks.nats.address import NatsAddress
from sinks.nats.liveness import Liveness
from sinks.nats.order import InOrder
from trainer.errors import ConnectError, ProtocolViolated
from trainer.remote.http import Unreachable
from trainer.remote.result import RunSnapshot

try:
    from nats.errors import Error as NatsError

    from sinks.nats.client import CONNECT_S, Messages, NatsClient
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "NATS needs the package nats-py: pip install 'stagecast[nats]'", name=missing.name
    ) from missing

_COMMAND_S = 10.0
_NEAR = 256
"""Messages of the stream that are read rather than searched."""
_QUIET_S = 1.0
_END_S = 0.2
"""Seconds without a message after which a run that has ended is over, if no one serves it."""

T = TypeVar("T")


class _Reply(msgspec.Struct):
    """The sink's answer to a command."""

    type: str = ""
    reason: str = ""
    status: int | None = None


def address_of(url: str, run_id: str | None, token: str | None) -> NatsAddress:
    """Split the address that `connect` is given. Raises `ConnectError`."""
    try:
        address = NatsAddress.of(url)
    except ValueError as error:
        raise ConnectError(str(error)) from None
    if token is not None and not (isinstance(token, str) and token.isprintable()):
        raise ConnectError("the token is not a printable text; give that of the NATS server")
    if token is not None:
        address = address._replace(token=token, user="", password="")
    return address._replace(run_id=run_id) if run_id else address


class NatsServer:
    """The `trainer.remote.source.RunSource` of a NATS server. Belongs to one event loop."""

    summarises = False

    def __init__(self, address: NatsAddress, give_up_s: float) -> None:
        self.url = address.server
        self.run_id = address.run_id
        self.give_up_s = give_up_s
        self.over = False
        self.address = address
        self.is_lost = False
        """Whether the run has published nothing for so long that its process must have died."""
        self.seen = 0
        """The highest ``seq`` that was read."""
        self._client: NatsClient | None = None
        self._connecting = anyio.Lock()
        self._threads = anyio.CapacityLimiter(math.inf)

    @property
    def shown_run(self) -> str:
        return plain_text(self.run_id, 80)

    def violated(self, what: str) -> ProtocolViolated:
        return ProtocolViolated(f"the stream at {self.url} {what}; see that only runs publish to {self.address.prefix}")

    async def choose(self) -> None:
        client, stream = await self._stream()
        info = await self.wait(client, client.subjects(stream))
        runs = sorted({run for subject in info if (run := self.address.run_of(subject)) is not None})
        if len(runs) == 1:
            self.run_id = runs[0]
            return
        names = ", ".join(plain_text(run, 80) for run in runs[:5]) + (", ..." if len(runs) > 5 else "")
        found = f"has {len(runs)} runs, {names}; choose one, as in" if runs else "has no run yet; name one, as in"
        raise ConnectError(f"{self.url} {found} connect('{self.url}/{quote(runs[0] if runs else 'RUN', safe='')}')")

    async def snapshot(self) -> RunSnapshot:
        client, stream = await self._stream()
        newest = await self._last(client, stream, "*")
        if newest is None:
            raise ConnectError(f"{self.url} has no events of run {self.shown_run}; see that its name is right", 404)
        started, ended = await self._frame(client, stream)
        state = RunState()
        state.add([one for one in (started, ended) if one is not None and one.attempt == newest.attempt] or [newest])
        run = state.run
        run.run_id, run.attempt = self.run_id, newest.attempt
        if ended is None:
            liveness = Liveness(time.time() - newest.time)
            self.is_lost = self.is_lost or liveness.is_lost(await self.is_served(client))
            run.status = "lost" if self.is_lost else "running"
        return RunSnapshot(max(newest.seq, self.seen), run)

    async def command(self, data: bytes) -> None:
        client, _ = await self._stream()
        answer = await self.wait(client, client.request(self.address.commands(self.run_id), data, _COMMAND_S))
        if answer is None:
            raise Unreachable(f"no sink NATS serves run {self.shown_run}")
        try:
            reply = msgspec.json.decode(answer, type=_Reply)
        except (ValueError, RecursionError) as error:
            raise self.violated(f"answers a command with something else ({plain_text(str(error))})") from None
        if reply.type != "sent":
            why = plain_text(reply.reason)
            raise ConnectError(f"run {self.shown_run} at {self.url} refuses: {why}", reply.status)

    async def journal(self, since: int) -> NatsJournal:
        client, stream = await self._stream()
        start = await self.wait(client, self._start_of(client, stream, since - WINDOW))
        _, ended = await self._frame(client, stream)
        self.is_lost = False
        messages = Messages(client, stream, self.address.events(self.run_id), start)
        has_ended = ended is not None and ended.seq <= since
        return NatsJournal(self, client, messages, InOrder(self.run_id, since), has_ended=has_ended)

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(client.close, limiter=self._threads)

    # -------------------------------------------------------------------------------------------------- the client

    async def wait(self, client: NatsClient, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the client's event loop. Raises `Unreachable` if the server does not answer."""
        try:
            future = client.submit(work)
            return await self._result(future)
        except ConnectionError as error:
            raise Unreachable(str(error)) from None
        except CancelledError:  # of the other loop's task
            raise Unreachable("the connection was closed") from None
        except NatsError as error:
            raise ConnectError(f"the NATS server at {self.url} refuses: {plain_text(str(error))}") from None

    async def is_served(self, client: NatsClient) -> bool | None:
        """Whether a sink serves the run; None if that is not known."""
        try:
            answer = await self.wait(client, client.request(self.address.commands(self.run_id), b"", 2.0))
        except Unreachable:
            return None
        return answer is not None

    async def _result(self, future: Future[T]) -> T:
        try:
            return await anyio.to_thread.run_sync(future.result, abandon_on_cancel=True, limiter=self._threads)
        except BaseException:
            future.cancel()  # the thread returns at once
            raise

    async def _stream(self) -> tuple[NatsClient, str]:
        """Connect if necessary; return the client, and the name of the stream."""
        async with self._connecting:
            if self._client is None or self._client.is_lost:
                await self.aclose()
                self._client = client = NatsClient(self.address)
                try:
                    with anyio.fail_after(CONNECT_S + 1):
                        await self.wait(client, client.connect())
                except SinkMisconfigured as error:
                    await self.aclose()
                    raise ConnectError(str(error), 401) from None
                except BaseException as error:
                    await self.aclose()
                    if isinstance(error, TimeoutError):
                        raise Unreachable(f"the NATS server at {self.url} does not answer") from None
                    raise
            client = self._client
        stream = await self.wait(client, client.stream())
        if stream is None:
            subjects = self.address.all_events
            raise ConnectError(
                f"{self.url} has no stream of {subjects}; see that a run with the sink NATS publishes there"
            )
        return client, stream

    async def _frame(self, client: NatsClient, stream: str) -> tuple[Event | None, Event | None]:
        """The start of the newest attempt, and its end, if it has ended."""
        started = await self._last(client, stream, RunStarted.__name__)
        ended = await self._last(client, stream, RunEnded.__name__)
        return started, None if started is not None and ended is not None and ended.seq < started.seq else ended

    async def _last(self, client: NatsClient, stream: str, kind: str) -> Event | None:
        found = await self.wait(client, client.last(stream, self.address.events(self.run_id, kind)))
        with contextlib.suppress(WireError):
            return decode_line(found[1])[0] if found is not None else None
        return None

    async def _start_of(self, client: NatsClient, stream: str, seq: int) -> int:
        """Find a message of the stream that is not far before the event behind a ``seq``, by bisection."""
        subject = self.address.events(self.run_id)
        newest = await client.last(stream, subject) if seq > 0 else None
        low, high = 1, newest[0] if newest is not None else 1
        while high - low > _NEAR:
            middle = (low + high) // 2
            found = await client.following(stream, subject, middle)
            try:
                is_before = found is not None and decode_line(found[1])[0].seq <= seq
            except WireError:  # a stranger's message
                is_before = False
            low, high = (middle, high) if is_before else (low, middle)
        return low


class NatsJournal:
    """The events of a run behind a cursor, as the body of `RunServer.journal` has them. One task at a time."""

    def __init__(
        self, server: NatsServer, client: NatsClient, messages: Messages, order: InOrder, *, has_ended: bool
    ) -> None:
        self._server = server
        self._client = client
        self._messages = messages
        self._order = order
        self._liveness = Liveness()
        self._has_ended = has_ended

    async def chunk(self) -> bytes:
        """Wait for the next events; an empty line is a sign of life, and nothing the end of the run."""
        timeout_s = _END_S if self._has_ended else _QUIET_S
        batch = await self._server.wait(self._client, self._messages.read(timeout_s))
        now = time.monotonic()
        events = [event for message in batch for event in self._order.add(message.data, now)] or self._order.wait(now)
        if events:
            self._liveness.heard(time.time() - events[-1].time)
            self._server.seen = max(self._server.seen, events[-1].seq)
            for event in events:
                if isinstance(event, (RunStarted, RunEnded)):
                    self._has_ended = isinstance(event, RunEnded)
            return encode_json_lines(events)
        if batch or not (self._has_ended or self._liveness.is_quiet):
            return b"\n"
        served = await self._server.is_served(self._client)
        if self._has_ended:
            is_over = served is False or self._liveness.is_quiet
        else:
            is_over = self._server.is_lost = self._liveness.is_lost(served)
        return b"" if is_over else b"\n"

    async def aclose(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._client.submit(self._messages.close())
