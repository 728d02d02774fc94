"""A connection to a NATS server, for callers that are not on asyncio. Needs the extra ``stagecast[nats]``.

nats-py needs an asyncio loop, which must keep running to answer the server's pings. `NatsClient` has one on a thread of
its own. It never reconnects by itself: after a loss, calls raise `ConnectionError`, and the caller, who knows what is
missing, makes another client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error, NoRespondersError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from events.errors import SinkMisconfigured
from events.log import in_this_run
from events.masking import masked
from events.text import plain_text
from sinks.nats.address import NatsAddress

CONNECT_S = 5.0
ANSWER_S = 10.0
"""Maximum seconds for an answer of the server."""
_PING_S = 10
_MOST_PINGS = 2
_CREDS_BYTES = 2**16
_FAILURES = (Error, OSError, TimeoutError, ValueError, TypeError, LookupError, AttributeError)
"""What nats-py raises for a failed request, and for the answers of something that is not a NATS server."""
_GATHER_S = 0.1
"""Maximum seconds for which a message waits for others that are read with it."""
_CONSUMER_S = 300.0
"""Seconds without a request after which the server removes a consumer."""

T = TypeVar("T")


class NatsClient:
    """One connection, from `connect` to `close`. Methods without ``async`` may be called from any other thread.

    The ``async`` ones belong to its event loop: hand them to `call` or `submit`.
    """

    def __init__(self, address: NatsAddress) -> None:
        self.address = address
        self.when_lost: Callable[[], object] = lambda: None
        """Called in the event loop when the connection has ended."""
        self.problem = ""
        """The newest problem that the server has reported without being asked."""
        self._nats = _Client()
        self._begun: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=in_this_run(self._run), name="stagecast-nats", daemon=True)
        self._thread.start()
        self._loop = self._begun.result()

    @classmethod
    def connected(cls, address: NatsAddress) -> NatsClient:
        """Return a client that is connected. Raises as `connect`."""
        client = cls(address)
        try:
            client.call(client.connect(), CONNECT_S + 1)
        except BaseException:
            client.close()
            raise
        return client

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._live())

    async def _live(self) -> None:
        self._ended = asyncio.Event()
        # Such as the failure of a call that was cancelled meanwhile. The end of the connection is reported anyway.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        self._begun.set_result(asyncio.get_running_loop())
        await self._ended.wait()  # then `asyncio.run` cancels all that nats-py has left

    async def connect(self) -> None:
        """Connect. Close the client if this raises.

        Raises:
            ConnectionError: Nothing answers there.
            SinkMisconfigured: The server refuses the credentials or the certificate, or a file cannot be used.
        """
        address = self.address
        options: dict[str, Any] = {}
        if address.ca or address.server.startswith("tls://"):
            self._nats.required = options["tls"] = _tls(address)
        options |= {"user": address.user, "password": address.password} if address.password else {}
        options |= {"token": address.token} if address.token else {}
        if address.creds:
            _check_credentials(address.creds)
            options["user_credentials"] = address.creds
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._nats.connect(
                    address.server,
                    name="stagecast",
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=int(CONNECT_S),
                    ping_interval=_PING_S,
                    max_outstanding_pings=_MOST_PINGS,
                    error_cb=self._note,
                    closed_cb=self._lose,
                    **options,
                )
        except _FAILURES as error:
            reason = self.problem or _reason(error)
            if "authorization" in reason.lower() or "certificate" in reason.lower():
                hint = "give a valid token, creds or ca in the address"
                raise SinkMisconfigured(f"the NATS server at {address.server} refuses: {reason}; {hint}") from None
            raise ConnectionError(f"no NATS server at {address.server}: {reason}") from None

    async def _note(self, error: Exception) -> None:
        """Keep an error that nats-py would print."""
        self.problem = _reason(error)

    async def _lose(self) -> None:
        self.when_lost()

    # ----------------------------------------------------------------------------------------- from other threads

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the event loop."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise ConnectionError("the connection was closed") from None

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine in the event loop, and wait for it. Raises what it raises, and `ConnectionError`."""
        future = self.submit(work)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise ConnectionError(f"the NATS server at {self.address.server} does not answer") from None
        except CancelledError:
            raise ConnectionError("the connection was closed") from None

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self._nats.is_closed or not self._thread.is_alive()

    def close(self) -> None:
        """Disconnect, and end the thread. May be called twice."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):  # of a connection that is broken, or never was one
                self.submit(self._nats.close()).result(1.0)
            with contextlib.suppress(RuntimeError):  # the event loop has ended already
                self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(2.0)

    # ----------------------------------------------------------------------------------------- in the event loop

    @property
    def max_payload(self) -> int:
        """Maximum bytes per message, headers included."""
        return self._nats.max_payload

    @property
    def core(self) -> Client:
        """The client of nats-py."""
        return self._nats

    def inbox(self) -> str:
        """A subject that nobody else uses."""
        return self._nats.new_inbox()

    async def asked(self, request: Awaitable[T]) -> T:
        """Await a request to the server; each failure but an `APIError` becomes a `ConnectionError`."""
        server = self.address.server
        try:
            return await request
        except (NoRespondersError, ServiceUnavailableError):
            reason = "JetStream does not answer; start nats-server with -js, or enable it for this account"
            raise ConnectionError(f"the NATS server at {server}: {reason}") from None
        except APIError:
            raise
        except _FAILURES as error:
            raise ConnectionError(f"the NATS server at {server}: {self.problem or _reason(error)}") from None

    async def stream(self) -> str | None:
        """The name of the stream that keeps the events; None if there is none."""
        try:
            return await self.asked(self._nats.jsm().find_stream_name_by_subject(self.address.all_events))
        except NotFoundError:
            return None

    async def last(self, stream: str, subject: str) -> tuple[int, bytes] | None:
        """The newest message of a subject, which may have wildcards: its number in the stream, and its data."""
        try:
            found = await self.asked(self._nats.jsm().get_msg(stream, subject=subject))
        except NotFoundError:
            return None
        return found.seq or 0, found.data or b""

    async def following(self, stream: str, subject: str, number: int) -> tuple[int, bytes] | None:
        """The first message of a subject whose number in the stream is at least this."""
        try:
            found = await self.asked(self._nats.jsm().get_msg(stream, seq=number, subject=subject, next=True))
        except NotFoundError:
            return None
        return found.seq or 0, found.data or b""

    async def subjects(self, stream: str) -> list[str]:
        """The subjects of all events in the stream, of which there are some for each run."""
        info = await self.asked(self._nats.jsm().stream_info(stream, subjects_filter=self.address.all_events))
        return list(info.state.subjects or ())

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes | None:
        """Send a request; None if nobody serves the subject. Raises `ConnectionError` if no answer comes."""
        try:
            answer = await self._nats.request(subject, data, timeout=timeout_s)
        except NoRespondersError:
            return None
        except _FAILURES as error:
            server = self.address.server
            raise ConnectionError(f"the NATS server at {server}: {self.problem or _reason(error)}") from None
        return answer.data


class Messages:
    """The messages of a stream from a number on, in order. Belongs to the event loop of its client."""

    def __init__(self, client: NatsClient, stream: str, subject: str, number: int) -> None:
        self._client = client
        self._stream = stream
        self._subject = subject
        self.next = number
        """Number of the next message in the stream."""
        self._subscription: Any = None

    async def read(self, timeout_s: float, most: int = 1_000) -> list[Msg]:
        """Wait for the next messages; none after ``timeout_s``.

        Raises:
            ConnectionError: The connection has ended, or the stream was removed.
        """
        if self._client.is_lost:
            raise ConnectionError(f"the NATS server at {self._client.address.server} has closed the connection")
        found: list[Msg] = []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            if self._subscription is None:
                self._subscription = await self._subscribe()
            while not found and (left_s := deadline - loop.time()) > 0:
                with contextlib.suppress(TimeoutError):
                    # Once it has one message it waits for others as long as it may.
                    found = await self._subscription.fetch(most, timeout=min(left_s, _GATHER_S))
        except _FAILURES as error:
            await self.close()
            raise ConnectionError(f"the NATS server at {self._client.address.server}: {_reason(error)}") from None
        except BaseException:  # cancelled: messages of a request under way would arrive at the next
            await self.close()
            raise
        if found and found[0].metadata.sequence.stream < self.next:  # of an earlier request, which was cancelled
            found = [message for message in found if message.metadata.sequence.stream >= self.next]
        if found:
            self.next = found[-1].metadata.sequence.stream + 1
        return found

    async def close(self) -> None:
        """Stop reading. The server removes its consumer some minutes later."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(Error):
                await subscription.unsubscribe()

    async def _subscribe(self) -> Any:
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=max(1, self.next),
            ack_policy=AckPolicy.NONE,
            inactive_threshold=_CONSUMER_S,
            mem_storage=True,
        )
        return await self._client.core.jetstream().pull_subscribe(self._subject, stream=self._stream, config=config)


class _Context(ssl.SSLContext):
    """Knows whether it was used."""

    is_used = False

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        self.is_used = True
        return super().wrap_bio(*args, **kwargs)


class _Client(Client):
    """Sends no credentials in the clear: nats-py asks the server whether to use TLS, and anyone may answer."""

    required: _Context | None = None

    def _connect_command(self) -> bytes:
        if self.required is not None and not self.required.is_used:
            raise Error("certificate missing: the server does not offer TLS")
        return super()._connect_command()


def _tls(address: NatsAddress) -> _Context:
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)  # which checks the certificate and its name
    try:
        if address.ca:
            context.load_verify_locations(address.ca)
        else:
            context.load_default_certs()
        return context
    except (OSError, ValueError) as error:
        reason = plain_text(str(error))
        raise SinkMisconfigured(f"ca={address.ca} cannot be used: {reason}; give a certificate in PEM form") from None


def _check_credentials(path: str) -> None:
    """Refuse a file that has no credentials: nats-py would read it forever."""
    try:
        with open(path, "rb") as file:
            text = file.read(_CREDS_BYTES)
    except OSError as error:
        raise SinkMisconfigured(f"creds={path} cannot be read: {error.strerror}; give a readable file") from None
    if b"BEGIN NATS USER JWT" not in text or b"BEGIN USER NKEY SEED" not in text:
        raise SinkMisconfigured(f"creds={path} holds no credentials; give the file that nsc has written")


def _reason(error: BaseException) -> str:
    """A failure in one line, without secrets."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    text = plain_text(masked(str(error)).removeprefix("nats: ").strip("'"), 300)
    return text or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
