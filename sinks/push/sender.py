"""The sink's side of a central page: sends events and files, and learns how far the server has them.

Needs httpx. The server is not trusted: answers are bounded, redirects are not followed, cookies are not kept.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import NamedTuple

import httpx
import msgspec

from events.errors import SinkMisconfigured, WireError
from events.journal.lines import decode_line
from events.log import in_this_run, logger
from events.masking import masked, masked_url
from events.messages import Event
from events.safe_files import UnsafeFile, read_below
from events.sink import RunInfo
from events.text import plain_text
from sinks.continued import Message, Moved
from sinks.live.token import is_loopback

MOST_LINE_BYTES = 2 * 2**20
"""Maximum bytes per line of an event."""
MOST_FILE_BYTES = 64 * 2**20
"""Maximum bytes per image or text."""
ALIVE_S = 10.0
"""Seconds without a request after which the sender reports that it is there."""
_BODY_BYTES = 2**18
"""Bytes after which a request ends, so that a slow network brings it across in time."""
_ANSWER_BYTES = 2 * MOST_LINE_BYTES + 2**16
"""Maximum bytes per answer: the newest line is a text in it, each of whose characters may be escaped."""
_ANSWER_S = 30.0
_CONNECT_S = 5.0
_END_S = 2.0
_RATED_PAUSES = 10
"""Pauses per request that the server may ask for, each of at most `_PAUSE_S`."""
_PAUSE_S = 5.0
_FATAL = frozenset({400, 401, 403, 411, 422})
_NOT_THERE = frozenset({301, 302, 303, 307, 308, 404, 405})
"""Statuses of an address that takes no runs, which a proxy may also send for a while."""


class _Answer(msgspec.Struct):
    cursor: int = 0
    newest: str | None = None
    error: str = ""


class _Received(NamedTuple):
    status: int
    reason: str
    headers: httpx.Headers
    body: bytes


class Sender:
    """A `sinks.continued.Store` at a server. Belongs to the sink's thread, its liveness excepted.

    Args:
        url: Of the page, with a slash at its end.

    Raises:
        SinkMisconfigured: The server refuses the token, or takes no runs.
        ConnectionError: It is away.
    """

    fix = "log less per event"

    def __init__(self, url: str, project: str, token: str, run: RunInfo) -> None:
        self.newest: Event | None = None
        self.most_bytes = MOST_LINE_BYTES
        self._url, self._project, self._run = url, project, run
        self._name = secrets.token_hex(8)  # a later sender of the run takes its place
        self._is_connected = self._was_connected = False
        self._sent_at = time.monotonic()
        self._closed = threading.Event()
        try:
            address = httpx.URL(url)
            server = f"{address.scheme}://{address.netloc.decode()}"
            is_local = is_loopback(address.host)
            self._client = httpx.Client(
                headers={"authorization": f"Bearer {token}", "accept-encoding": "identity"},
                timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
                follow_redirects=False,  # the token must not reach another server
                cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
                mounts={server: None} if is_local else None,  # no proxy
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            why = plain_text(masked(str(error)))
            raise SinkMisconfigured(
                f"Push: the address, or the environment's proxy settings, cannot be used: {why}"
            ) from None
        try:
            self._connect()
        except BaseException:  # propagates unchanged, without the connections
            self._client.close()
            raise
        if address.scheme == "http" and not is_local:  # once: while the server is away, the sink is opened repeatedly
            logger.warning(
                f"Push sends its token to {address.host} without encryption, so others on the network can read it;"
                " use https"
            )
        threading.Thread(target=in_this_run(self._stay_alive), name="stagecast-push", daemon=True).start()

    def publish(self, messages: Sequence[Message]) -> None:
        """Send events, after the files that they name. See `sinks.continued.Store.publish`."""
        if not self._is_connected:
            self._continue("the connection was lost")
        for part in _parts(messages):
            for event, _ in part:
                self._send_file(event)
            body = b"".join([line + b"\n" for _, line in part])
            answer = self._send("POST", "events", {}, body)
            if answer.status == 413:
                if len(part) == 1:
                    self.most_bytes = min(self.most_bytes, len(part[0][1]) - 1)  # next time a gap replaces it
                raise ConnectionError(f"{self._shown}, or a proxy before it, refuses {len(body):,} bytes")
            self._check(answer)
            self.newest = part[-1][0]

    def is_taken(self) -> SinkMisconfigured:
        """The error for a run whose name is that of another run of the project."""
        return SinkMisconfigured(
            f"project {self._project} at {self._url} has another run with the run_id {self._run.run_id!r:.80}; give"
            " this run another run_id, or Push another project"
        )

    def close(self) -> None:
        """Tell the server that nothing follows, and disconnect; waits for it for at most `_END_S`."""
        self._closed.set()
        if self._is_connected:
            with contextlib.suppress(ConnectionError, SinkMisconfigured):
                self._ask("POST", "events", {"sender": self._name, "end": "1"}, b"", timeout_s=_END_S)
        self._client.close()

    # ------------------------------------------------------------------------------------------ requests

    @property
    def _shown(self) -> str:
        return f"the page at {self._url}"

    def _continue(self, reason: str) -> None:
        """Connect again. Raises `Moved` if the newest event there is another one than before."""
        before = self.newest
        self._connect()
        if _identity(self.newest) != _identity(before):
            raise Moved(f"{self._shown} has another newest event than this sender: {reason}")

    def _send(self, method: str, what: str, query: dict[str, str], body: bytes) -> _Received:
        """Send a part of the run; once more if the server has forgotten this sender, or another took its place."""
        query = {"sender": self._name, **query}
        answer = self._ask(method, what, query, body)
        if answer.status == 409:
            self._continue(_said(answer))
            answer = self._ask(method, what, query, body)
        if answer.status == 409:
            raise Moved(f"{self._shown} does not continue the run here: {_said(answer)}")
        return answer

    def _connect(self) -> None:
        """Take the place of an earlier sender, and learn the newest event that is durable there."""
        self._is_connected = False
        answer = self._ask("GET", "events", {"sender": self._name})
        self._check(answer)
        try:
            newest = msgspec.json.decode(answer.body, type=_Answer).newest
            self.newest = None if newest is None else decode_line(newest.encode())[0]
        except (ValueError, RecursionError, WireError) as error:
            raise SinkMisconfigured(
                f"Push: what answers at {self._url} takes no runs: {plain_text(str(error))}"
            ) from None
        self._is_connected = self._was_connected = True

    def _ask(
        self, method: str, what: str, query: dict[str, str], body: bytes | None = None, timeout_s: float = _ANSWER_S
    ) -> _Received:
        """Send a request; pauses when the server asks for it. Raises `ConnectionError` without an answer."""
        address, query = f"{self._url}api/push/{self._project}/{what}", {"run": self._run.run_id, **query}
        timeout = httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s))
        pauses = 0
        while True:
            self._sent_at = time.monotonic()
            try:
                with self._client.stream(method, address, params=query, content=body, timeout=timeout) as answer:
                    reply = _Received(answer.status_code, answer.reason_phrase, answer.headers, _read(answer))
            except (httpx.RequestError, httpx.InvalidURL, OSError, UnicodeError, RuntimeError) as error:
                self._is_connected = False
                raise self._away(f"{type(error).__name__}: {plain_text(masked(str(error)))}") from None
            pauses += 1
            if reply.status != 429 or pauses > _RATED_PAUSES or self._closed.is_set():
                return reply
            asked = reply.headers.get("retry-after", "1")
            self._closed.wait(min(_PAUSE_S, float(asked) if asked.isascii() and asked.isdigit() else 1.0))

    def _check(self, answer: _Received) -> None:
        """Raise unless an answer is a success."""
        status = answer.status
        if status == 200:
            return
        self._is_connected = False
        said = _said(answer)
        if status in (401, 403):
            raise SinkMisconfigured(
                f"Push: {self._shown} refuses the token for project {self._project} ({said}); give the project's token"
            )
        if status in _NOT_THERE and not self._was_connected:
            there = plain_text(masked_url(answer.headers.get("location", "")), 200)
            fix = f"give its new address: {there}" if there else "serve it with stagecast watch --push-tokens FILE"
            raise SinkMisconfigured(f"Push: {self._shown} takes no runs ({said}); {fix}")
        if status in _FATAL:
            raise SinkMisconfigured(f"Push: {self._shown} refuses run {self._run.run_id!r:.80}: {said}")
        raise self._away(said)

    def _away(self, reason: str) -> ConnectionError:
        return ConnectionError(
            f"{self._shown} does not take events: {reason}; the journal keeps them, and stagecast replay RUN --to push"
            f" url={self._url} project={self._project} sends them later"
        )

    def _send_file(self, event: Event) -> None:
        """Send the image or text of an event; one that cannot be sent is skipped, with a warning."""
        path = getattr(event, "path", None)
        if not isinstance(path, str) or not path.startswith("media/"):
            return
        name = plain_text(path, 200)
        try:
            if self._run.run_dir is None:
                raise FileNotFoundError("this run has no folder")
            data = read_below(self._run.run_dir, path, MOST_FILE_BYTES)
        except (FileNotFoundError, UnsafeFile, ValueError) as error:
            logger.warning(f"Push does not send {name}: {error}")
            return
        answer = self._send("PUT", "media", {"path": path}, data)
        if answer.status in (400, 413):
            logger.warning(f"Push does not send {name}: the server, or a proxy before it, answers {_said(answer)}")
        else:
            self._check(answer)

    def _stay_alive(self) -> None:
        while not self._closed.wait(max(0.1, self._sent_at + ALIVE_S - time.monotonic())):
            if time.monotonic() - self._sent_at >= ALIVE_S:
                with contextlib.suppress(ConnectionError):  # the sink's next events report it
                    self._ask("POST", "events", {"sender": self._name}, b"")


def _read(answer: httpx.Response) -> bytes:
    """Read the body of an answer, cut after `_ANSWER_BYTES`."""
    body = bytearray()
    for chunk in answer.iter_raw():
        body += chunk
        if len(body) > _ANSWER_BYTES:
            break
    return bytes(body[:_ANSWER_BYTES])


def _said(answer: _Received) -> str:
    """Return the status, and the reason in the body."""
    said = ""
    with contextlib.suppress(ValueError, RecursionError):
        said = msgspec.json.decode(answer.body, type=_Answer).error
    return f"{answer.status} {plain_text(said or answer.reason, 300)}"


def _identity(event: Event | None) -> tuple[int, int, float]:
    return (0, 0, 0.0) if event is None else (event.attempt, event.seq, event.time)


def _parts(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Split messages into requests."""
    part: list[Message] = []
    size = 0
    for message in messages:
        if part and size + len(message[1]) > _BODY_BYTES:
            yield part
            part, size = [], 0
        part.append(message)
        size += len(message[1]) + 1
    if part:
        yield part
