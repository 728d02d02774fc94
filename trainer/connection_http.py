"""The server of a run, as a client has it: what can be asked of it, and its journal followed by cursor over HTTP.

What failed and may be different the next time is `Unreachable`; every other answer that is no success is a
`ConnectError`.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator
from typing import TypeVar
from urllib.parse import quote

import anyio
import msgspec

from events.errors import WireError
from events.messages import Event, RunEnded, RunStarted
from events.wire import decode_json
from trainer.connected_result import UNDER_WAY, Snapshot
from trainer.connection_errors import ConnectError, ConnectionLost

try:
    import httpx
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "connect needs the package httpx: pip install 'stagecast[live]'", name=missing.name
    ) from missing

_CONNECT_S = 5.0
_SILENCE_S = 15.0
"""A server says something every second or so. After this time without a byte, the connection is made anew."""
_AFTER_END_S = 2.0
"""How long a server is looked for once the run is known to have ended: the sink `Live` goes away with its run."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 3.0
_LATER = frozenset({408, 425, 429})

T = TypeVar("T")


class Unreachable(Exception):
    """There was no answer, or one that may be another the next time."""


class _Listed(msgspec.Struct):
    run_id: str
    status: str = "unknown"


class _List(msgspec.Struct):
    runs: list[_Listed]


class _No(msgspec.Struct):
    error: str = ""
    reason: str = ""


class _Body(httpx.AsyncByteStream):
    """Of a request. httpx's own is a generator: trio warns of it when the connection breaks there."""

    def __init__(self, data: bytes) -> None:
        self._parts = [data] if data else []

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        if not self._parts:
            raise StopAsyncIteration
        return self._parts.pop()


def check_address(url: str) -> None:
    """Raises `ValueError` or `TypeError` for what no request can be sent to."""
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from None


class RunServer:
    """Asks the server at an address. Belongs to one event loop.

    Args:
        url: Where its page is, with a slash at its end.
        run_id: The run that is asked for; empty until `choose` has found it.
        token: What it wants to be shown, if anything.
        give_up_s: How long it may be out of reach.
    """

    def __init__(self, url: str, run_id: str, token: str | None, give_up_s: float) -> None:
        address = httpx.URL(url)
        # For whoever stands before the server; a token is for the server itself, and takes its place.
        login = (address.username, address.password) if address.userinfo and not token else None
        self.url = str(address.copy_with(userinfo=b""))
        self.run_id = run_id
        self.give_up_s = give_up_s
        self.over = False
        """Whether the run is known to have ended, so that its server may be gone."""
        self._client = httpx.AsyncClient(
            auth=login,
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {}),
            timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=4),
        )

    async def choose(self) -> None:
        """Find the one run that the server has. Raises `ConnectError` if it has several, or none."""
        runs = self._decode(await self._call("GET", "api/runs"), _List).runs
        if len(runs) == 1:
            self.run_id = runs[0].run_id
            return
        names = ", ".join(f"{run.run_id} ({run.status})" for run in runs[:5]) + (", ..." if len(runs) > 5 else "")
        found = f"serves {len(runs)} runs, {names}: say which one, as in" if runs else "serves no run yet:"
        example = runs[0].run_id if runs else "NAME"
        raise ConnectError(f"{self.url} {found} connect('{self.url}#run={quote(example)}')")

    async def snapshot(self) -> Snapshot:
        """The run as it stands."""
        return self._decode(await self._call("GET", self._of_run("")), Snapshot)

    async def command(self, data: bytes) -> None:
        """Give the server an encoded command."""
        await self._call("POST", self._of_run("/commands"), data)

    async def journal(self, since: int) -> httpx.Response:
        """Begin to receive the events behind a place, until the run is over. To be closed."""
        address = f"{self.url}{self._of_run('/journal')}?since={since}&follow=1"
        try:
            response = await self._client.send(self._request("GET", address), stream=True)
        except httpx.RequestError as error:
            raise Unreachable(_described(error)) from error
        try:
            if not response.is_success:
                with contextlib.suppress(httpx.RequestError):
                    await response.aread()
                self._check(response)
        except BaseException:
            await response.aclose()
            raise
        return response

    async def aclose(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    def _of_run(self, rest: str) -> str:
        return f"api/runs/{quote(self.run_id, safe='')}{rest}"

    async def _call(self, method: str, path: str, content: bytes | None = None) -> bytes:
        try:
            response = await self._client.send(self._request(method, self.url + path, content))
        except httpx.RequestError as error:
            raise Unreachable(_described(error)) from error
        self._check(response)
        return response.content

    def _request(self, method: str, address: str, content: bytes | None = None) -> httpx.Request:
        headers = {"content-type": "application/json"} if content is not None else {}
        request = self._client.build_request(method, address, content=content, headers=headers)
        request.stream = _Body(content or b"")
        return request

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if response.is_success:
            return
        try:
            answer = msgspec.json.decode(response.content, type=_No)
            said = answer.reason or answer.error
        except (msgspec.DecodeError, httpx.StreamError, UnicodeError):  # from a proxy, or cut off
            said = ""
        said = f"{status} {response.reason_phrase}{f' ({said})' if said else ''}"
        if status >= 500 or status in _LATER:
            raise Unreachable(f"the server answers {said}")
        hint = {
            401: "; give connect its token (token=, or the environment variable STAGECAST_TOKEN)",
            404: "; see that the address is that of the page, and that the run's name is right",
        }.get(status, "")
        where = f"run {self.run_id} at {self.url}" if self.run_id else self.url
        raise ConnectError(f"{where}: the server answers {said}{hint}", status)

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise ConnectError(f"what answers at {self.url} is no server of runs: {error}") from error


class Patience:
    """How long a server is tried again, and how soon; anew after each success."""

    def __init__(self, server: RunServer) -> None:
        self._server = server
        self.reset()

    def reset(self) -> None:
        """It has answered."""
        self._since: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    async def wait(self, error: Unreachable, limit_s: float) -> None:
        """Wait before the next attempt. Raises `ConnectionLost` if there have been failures for ``limit_s``."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        left_s = self._since + limit_s - now
        if left_s <= 0:
            raise ConnectionLost(
                f"run {self._server.run_id} at {self._server.url} has been out of reach for {limit_s:g} s: {error}"
            ) from error
        # Drawn by lot: those that a server has lost do not all come back at once.
        await anyio.sleep(min(left_s, random.uniform(0.5, 1.0) * self._pause_s))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


class JournalFollower:
    """Reads the run's events from a place on, over as many connections as it takes. One consumer.

    Args:
        server: Of the run.
        since: Events with a greater ``seq`` are returned. None: `begin_at` says it later.
    """

    def __init__(self, server: RunServer, since: int | None) -> None:
        self.ended = False
        """Whether the run's last event was returned, or the follower was closed."""
        self._server = server
        self._cursor = since or 0
        self._begun = anyio.Event()
        if since is not None:
            self._begun.set()
        self._problem: Exception | None = None
        self._patience = Patience(server)
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._line = b""  # the beginning of one
        self._saw_end = False

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned."""
        return self._cursor

    def begin_at(self, cursor: int | Exception) -> None:
        """Say where it begins, or why that cannot be known."""
        if isinstance(cursor, Exception):
            self._problem = cursor
        else:
            self._cursor = cursor
        self._begun.set()

    async def read(self) -> list[Event]:
        """Wait for the next events, at least one. A call that is cancelled loses nothing.

        Raises:
            anyio.EndOfStream: There are no more.
            ConnectError: The server does not give them.
        """
        await self._begun.wait()
        if self._problem is not None:
            raise self._problem
        while not self.ended:
            try:
                if events := await self._read_on():
                    return events
            except Unreachable as error:
                await self._lose(error)
        raise anyio.EndOfStream

    async def aclose(self) -> None:
        """Return no more."""
        self.ended = True
        await self.disconnect()

    async def _read_on(self) -> list[Event]:
        """What comes next, or nothing; over a new connection, if there is none."""
        try:
            if self._chunks is None:
                self._response = await self._server.journal(self._cursor)
                self._chunks = self._response.aiter_raw()
            assert self._chunks is not None
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            await self.disconnect()
            await self._see_whether_over()
            return []
        except httpx.RequestError as error:
            await self.disconnect()
            raise Unreachable(_described(error)) from error
        except BaseException:  # a cancellation has broken the connection: the next call makes another
            await self.disconnect()
            raise
        self._patience.reset()
        return self._take(chunk)

    def _take(self, chunk: bytes) -> list[Event]:
        *lines, self._line = (self._line + chunk).split(b"\n")
        events = []
        for line in lines:
            if not line:
                continue  # a sign of life
            try:
                event = decode_json(line)
            except WireError as error:
                raise ConnectError(f"what comes from {self._server.url} is no journal: {error}") from error
            if event.seq > self._cursor:
                self._cursor = event.seq
                events.append(event)
                if isinstance(event, (RunEnded, RunStarted)):
                    self._saw_end = isinstance(event, RunEnded)
        return events

    async def _see_whether_over(self) -> None:
        """The server has ended its answer: because the run is over, or somebody between has cut it off."""
        if not self._saw_end:
            snapshot = await self._server.snapshot()
            if snapshot.run.status in UNDER_WAY or snapshot.cursor > self._cursor:
                raise Unreachable("the journal's events came to an end before the run's")
        self._end()

    async def _lose(self, error: Unreachable) -> None:
        """Wait before the next attempt, or find that there need be none."""
        known_to_be_over = self._saw_end or self._server.over
        try:
            await self._patience.wait(error, _AFTER_END_S if known_to_be_over else self._server.give_up_s)
        except ConnectionLost:
            if not self._saw_end:
                raise
            self._end()

    def _end(self) -> None:
        self.ended = self._server.over = True

    async def disconnect(self) -> None:
        """Let go of the connection; reading on makes another."""
        response, chunks = self._response, self._chunks
        self._response = self._chunks = None
        self._line = b""
        if chunks is not None:
            # A generator around others that are suspended leaves these to the garbage collector when it is closed, of
            # which trio warns. A cancelled read ends them all.
            with anyio.CancelScope(shield=True) as scope, contextlib.suppress(StopAsyncIteration, httpx.RequestError):
                scope.cancel()
                while True:
                    await anext(chunks)
        if response is not None:
            with anyio.CancelScope(shield=True):
                await response.aclose()


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
