"""The server of a run, as a client sees it: the requests that it answers, over HTTP.

The server is not trusted. Every answer has a maximum size and a deadline, has no content encoding and is decoded
strictly. Redirects are not followed, cookies are not kept, and the server's texts are escaped in messages.

A failure that a later attempt may not meet raises `Unreachable`, an answer that no server of runs sends
`ProtocolViolated`, and any other answer that is not a success `ConnectError`.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TypeVar
from urllib.parse import quote

import anyio
import httpx
import msgspec

from events.log import logger
from events.masking import masked, masked_url
from events.text import plain_text
from trainer.errors import ConnectError, ConnectionLost, ProtocolViolated
from trainer.remote.address import ServerOrigin
from trainer.remote.result import RunSnapshot
from trainer.remote.source import RunSource

_CONNECT_S = 5.0
_SILENCE_S = 15.0
"""A server sends something every second or so. After this time without a byte, the client reconnects."""
_ANSWER_S = 60.0
"""Maximum seconds per request, from the connection to the last byte of the answer; of a journal, to its first byte."""
_ANSWER_BYTES = 64 * 2**20
"""Maximum bytes per answer. A snapshot with the curves of many metrics has some megabytes."""
_LIST_BYTES = 16 * 2**20
"""Maximum bytes of the list of runs..."""
_SUMMARY_BYTES = 8 * 2**20
"""...and of those parts of a snapshot that are decoded: decoding takes twenty times as much memory."""
_NAME_CHARS = 1_000
"""Maximum characters per name of a run that the server chooses."""
_REFUSAL_BYTES = 64 * 2**10
"""Bytes of an answer that is not a success which are read; the rest is ignored."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 3.0
_LATER = frozenset({408, 425, 429})

T = TypeVar("T")

FAILURES = (httpx.RequestError, OSError, UnicodeError)
"""Failures of a connection. OSError: TLS records that are not valid. UnicodeError: a host name that is too long."""
_REFUSED = (ValueError, TypeError, OverflowError, RecursionError)
"""Errors of decoding. Those of msgspec are ValueErrors."""


class Unreachable(Exception):
    """There was no answer, or one that may differ at the next attempt."""


class _Listed(msgspec.Struct):
    run_id: str
    status: str = "unknown"


class _List(msgspec.Struct):
    runs: list[_Listed]


class _Parts(msgspec.Struct):
    """An undecoded snapshot."""

    cursor: msgspec.Raw
    run: msgspec.Raw
    checkpoints: msgspec.Raw = msgspec.Raw(b"[]")


class _RefusedAnswer(msgspec.Struct):
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


class RunServer:
    """Asks the server at an address. Belongs to one event loop. A `trainer.remote.source.RunSource`.

    Args:
        url: Where its page is, with a slash at its end.
        run_id: The run that is asked for; empty until `choose` has found it.
        token: The token that is sent with every request, to this server alone; None for none.
        give_up_s: Maximum seconds that it may be out of reach.
        withheld: Why a token of the environment is not sent; empty if there is none. Part of an error's text.

    Raises:
        ConnectError: The environment names a proxy that cannot be used.
    """

    summarises = True

    def __init__(self, url: str, run_id: str, token: str | None, give_up_s: float, withheld: str = "") -> None:
        address = httpx.URL(url)
        # For a proxy before the server; a token is for the server itself, and takes its place.
        login = (address.username, address.password) if address.userinfo and not token else None
        self.url = str(address.copy_with(userinfo=b""))
        self.origin = ServerOrigin.of(self.url)
        self.run_id = run_id
        self.give_up_s = give_up_s
        self.over = False
        """Whether the run is known to have ended, so that its server may be gone."""
        self._withheld = withheld
        if (token or login) and self.origin.scheme == "http" and not self.origin.is_loopback:
            logger.warning(
                f"the {'token' if token else 'password'} for {self.origin} is sent without encryption, so others on the"
                f" network can read it; use https, or an SSH tunnel to 127.0.0.1"
            )
        try:
            self._client = httpx.AsyncClient(
                auth=login,
                headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {}),
                timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S, pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=4),
                follow_redirects=False,  # a token must not reach another server
                cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),  # none is kept
                # No proxy of the environment sees a request to this machine, with its token.
                mounts={str(self.origin): None} if self.origin.is_loopback else None,
            )
        except (ImportError, *_REFUSED, httpx.InvalidURL) as error:
            why = plain_text(masked(str(error)))
            raise ConnectError(
                f"the environment's proxy settings (HTTP_PROXY, ...) cannot be used: {why}; correct them"
            ) from None

    async def choose(self) -> None:
        """Find the one run that the server has. Raises `ConnectError` if it has several, or none."""
        runs = self._decode(await self._call("GET", "api/runs", most=_LIST_BYTES), _List).runs
        if len(runs) == 1:
            name = runs[0].run_id
            if name in ("", ".", "..") or len(name) > _NAME_CHARS:  # in an address they lead elsewhere
                raise self.violated(f"names a run {plain_text(name, 80)!r}, which is not a name")
            self.run_id = name
            return
        names = ", ".join(f"{plain_text(run.run_id, 80)} ({plain_text(run.status, 20)})" for run in runs[:5])
        names += ", ..." if len(runs) > 5 else ""
        found = f"serves {len(runs)} runs, {names}; choose one, as in" if runs else "serves no run yet; name one, as in"
        example = runs[0].run_id[:200] if runs else "NAME"
        raise ConnectError(f"{self.url} {found} connect('{self.url}#run={quote(example)}')")

    async def snapshot(self) -> RunSnapshot:
        """Ask for the state of the run."""
        parts = self._decode(await self._call("GET", self._of_run("")), _Parts)
        summary = b'{"cursor":%b,"run":%b,"checkpoints":%b}' % (parts.cursor, parts.run, parts.checkpoints)
        if len(summary) > _SUMMARY_BYTES:
            raise self.violated(f"sends more than {_SUMMARY_BYTES:,} bytes as the summary of a run")
        snapshot = self._decode(summary, RunSnapshot)
        if snapshot.run.run_id not in ("", self.run_id):  # it has no name before its first event
            raise self.violated(f"answers with run {plain_text(snapshot.run.run_id, 80)}, not run {self.shown_run}")
        return snapshot

    async def command(self, data: bytes) -> None:
        """Send an encoded command."""
        await self._call("POST", self._of_run("/commands"), data)

    async def journal(self, since: int) -> Answer:
        """Open a stream of the events after a cursor, until the end of the run. The caller closes it."""
        with self._in_time():
            return await self._open("GET", f"{self._of_run('/journal')}?since={since}&follow=1")

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    @property
    def shown_run(self) -> str:
        """The run's name for messages: it may come from the server."""
        return plain_text(self.run_id, 80)

    def violated(self, what: str) -> ProtocolViolated:
        """The error for an answer that no server of runs sends."""
        return ProtocolViolated(f"the server at {self.url} {what}; see that stagecast serves this address")

    def _of_run(self, rest: str) -> str:
        return f"api/runs/{quote(self.run_id, safe='')}{rest}"

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """Raise `Unreachable` if the request in the block fails or takes too long."""
        with anyio.move_on_after(_ANSWER_S) as scope:
            try:
                yield
            except FAILURES as error:
                raise Unreachable(described(error)) from None
        if scope.cancelled_caught:
            raise Unreachable(f"no complete answer came within {_ANSWER_S:g} s")

    async def _call(self, method: str, path: str, content: bytes | None = None, most: int = _ANSWER_BYTES) -> bytes:
        with self._in_time():
            answer = await self._open(method, path, content)
            try:
                body = await answer.read(most)
            finally:
                await answer.aclose()
        if len(body) > most:
            raise self.violated(f"sends more than {most:,} bytes as an answer to {method} {path:.200}")
        return body

    async def _open(self, method: str, path: str, content: bytes | None = None) -> Answer:
        headers = {"content-type": "application/json"} if content is not None else {}
        try:
            request = self._client.build_request(method, self.url + path, content=content, headers=headers)
        except httpx.InvalidURL as error:
            raise ConnectError(f"run {self.shown_run} cannot be in an address ({error}); correct its name") from None
        request.stream = _Body(content or b"")
        answer = Answer(await self._client.send(request, stream=True))
        try:
            await self._check(answer)
        except BaseException:
            await answer.aclose()
            raise
        return answer

    async def _check(self, answer: Answer) -> None:
        """Raise unless an answer is a success whose body is sent as it is."""
        response = answer.response
        status = response.status_code
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if response.is_success:
            if encoding not in ("", "identity"):
                raise self.violated(f"encodes its answer ({plain_text(encoding, 40)}), which was not asked for")
            return
        said = ""
        if encoding in ("", "identity"):
            with contextlib.suppress(*_REFUSED, *FAILURES):  # from a proxy, or cut off
                refusal = msgspec.json.decode(await answer.read(_REFUSAL_BYTES), type=_RefusedAnswer)
                said = plain_text(refusal.reason or refusal.error)
        said = f"{status} {plain_text(response.reason_phrase, 80)}{f' ({said})' if said else ''}"
        if status >= 500 or status in _LATER:
            raise Unreachable(f"the server answers {said}")
        hint = {
            401: f"; give connect its token (token=, or its link with #token=...){self._withheld}",
            404: "; see that the address is that of the page, and that the run's name is right",
        }.get(status, "")
        if response.has_redirect_location:
            there = plain_text(masked_url(response.headers["location"]), 200)
            hint = f"; give connect the address that it redirects to, if you trust it: {there}"
        where = f"run {self.shown_run} at {self.url}" if self.run_id else self.url
        raise ConnectError(f"{where}: the server answers {said}{hint}", status)

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except _REFUSED as error:
            raise ProtocolViolated(
                f"what answers at {self.url} is not a server of runs: {plain_text(str(error))}; give connect the"
                f" address of the page"
            ) from None


class Patience:
    """How often, and for how long, a server is tried again. A success restarts both."""

    def __init__(self, server: RunSource) -> None:
        self._server = server
        self.reset()

    def reset(self) -> None:
        """Record a success."""
        self._since: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    async def ask(self, request: Callable[[], Awaitable[T]], limit_s: Callable[[], float]) -> T:
        """Repeat a request until the server answers. Raises what the request raises, and `ConnectionLost`."""
        while True:
            try:
                answer = await request()
            except Unreachable as error:
                await self.wait(error, limit_s())
            else:
                self.reset()
                return answer

    async def wait(self, error: Unreachable, limit_s: float) -> None:
        """Wait before the next attempt. Raises `ConnectionLost` if there have been failures for ``limit_s``."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        left_s = self._since + limit_s - now
        if left_s <= 0:
            raise ConnectionLost(
                f"run {self._server.shown_run} at {self._server.url} has been out of reach for {limit_s:g} s: {error}"
            ) from error
        # Random, so that the clients that a server has lost do not all come back at once.
        await anyio.sleep(min(left_s, random.uniform(0.5, 1.0) * self._pause_s))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


class Answer:
    """A server's answer, whose body is read undecoded."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._chunks = response.aiter_raw()

    async def chunk(self) -> bytes:
        """Wait for the next bytes; none at the end."""
        return await anext(self._chunks, b"")

    async def read(self, most: int) -> bytes:
        """Read the body, cut once it has more than ``most`` bytes."""
        body = bytearray()
        while len(body) <= most and (chunk := await self.chunk()):
            body += chunk
        return bytes(body)

    async def aclose(self) -> None:
        """Close the connection."""
        # Closing a generator leaves the suspended generators within to the garbage collector, of which trio warns. A
        # cancelled read ends them all.
        with anyio.CancelScope(shield=True) as scope, contextlib.suppress(*FAILURES):
            scope.cancel()
            while await self.chunk():
                pass
        with anyio.CancelScope(shield=True), contextlib.suppress(*FAILURES):
            await self.response.aclose()


def described(error: Exception) -> str:
    """A failure of a connection in one line, without secrets and control characters."""
    text = plain_text(masked(str(error)))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
