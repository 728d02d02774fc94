"""Metrics and traces of a run, sent to an OpenTelemetry collector by OTLP over HTTP.

The requests are built and sent here rather than by the SDK's exporters, which answer a failure with a line in a log:
the supervisor could neither deliver again nor tell anybody. Nor do its providers serve: their spans have random
identifiers, so that a batch that is delivered again would be there twice, and their metrics the time of collection.
No global provider is read or set.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import unquote, urlsplit

from events.errors import SinkMisconfigured
from events.log import logger
from events.messages import Event
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.otlp_messages import Encoder
from sinks.otlp_spans import SPAN_TYPES, Span, Spans
from sinks.totals import TOTALS_TYPES, Totals

if TYPE_CHECKING:
    from requests import PreparedRequest

Signal = Literal["traces", "metrics"]

_ENV = "OTEL_EXPORTER_OTLP"
_MODULES = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.proto", "requests")
_ANSWER_BYTES = 65_536
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?")
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


class OpenTelemetry(Strict, frozen=True):
    """Sends a run's metrics and spans to a collector.

    **Metrics.** ``stagecast.metric`` is one gauge, with the metric's name as the attribute ``name``: names are free
    text, those of instruments are not, and so no name is changed and no two become one. Of each batch the newest
    values are sent, at the time of its newest event. Beside it are sums (``stagecast.steps``, ``stagecast.rows``,
    ``stagecast.checkpoints``, ``stagecast.ledger_seconds``, ...) and a histogram of step times. Those of each
    attempt begin at zero, with a start time of their own.

    **Spans.** ``run`` holds ``train_epoch``, ``test``, ``checkpoint`` and ``checkpoint_upload``; an epoch holds its
    ``validation``. They begin and end when the events say, have ``stagecast.run_id``, ``stagecast.attempt``,
    ``stagecast.global_step`` and the numbers of their last event as attributes, and tell failures, stalls and losses
    that are no number as span events. All attempts at a run are one trace, made from its ``run_id``; each links to the
    one before. A span is sent when it has ended: of a process that is killed, the run's own is missing, until a replay
    tells the attempt after it.

    The environment is read as the SDK's exporters do, but for the timeout: ``OTEL_EXPORTER_OTLP_ENDPOINT``,
    ``_HEADERS``, ``_COMPRESSION``, ``_CERTIFICATE``, ``_CLIENT_CERTIFICATE`` and ``_CLIENT_KEY``, each also for
    ``TRACES`` or ``METRICS`` alone; ``OTEL_RESOURCE_ATTRIBUTES`` and ``OTEL_SERVICE_NAME``. Secrets belong there, in
    the headers: they are shown nowhere.
    """

    endpoint: str | None = None
    """Where the collector is: ``http://HOST:4318``, without ``/v1/traces``. None: the environment says, or this
    machine."""
    service_name: str | None = None
    """The resource's ``service.name``. None: the environment says, or ``stagecast``."""
    timeout_s: float = 4.0
    """How long the collector may take to accept a connection, and again to answer. A batch is one or two requests."""
    max_names: int = 1_000
    """Most distinct names of metrics. Others are left out, with a warning."""

    # Nothing is lost that the disk can keep, or sums would be wrong and spans without an end. A collector is restarted,
    # or away for a while: it is tried for a day before the sink is given up. Once a second is often enough.
    delivery: ClassVar[Delivery] = Delivery(
        types=TOTALS_TYPES | SPAN_TYPES, overflow="spill", latency_s=1.0, retries=2_880, timeout_s=30.0
    )

    def check(self) -> None:
        """See that the packages are installed, and that the settings here and in the environment make sense.

        Raises:
            SinkMisconfigured: They do not. Says which, and never the value of a header.
        """
        for module in _MODULES:
            require(module, "opentelemetry", "the sink OpenTelemetry")
        if not (isinstance(self.timeout_s, int | float) and 0 < self.timeout_s < math.inf):
            raise SinkMisconfigured(f"OpenTelemetry(timeout_s={self.timeout_s!r:.80}): give seconds greater than zero")
        if not (isinstance(self.max_names, int) and self.max_names >= 1):
            raise SinkMisconfigured(f"OpenTelemetry(max_names={self.max_names!r:.80}): it must send at least one name")
        _settings(self.endpoint, "traces")
        _settings(self.endpoint, "metrics")

    def open(self, run: RunInfo) -> OpenTelemetryWriter:
        """Read the environment. Connects to nobody: a collector that is down is found by the first write.

        Raises:
            SinkMisconfigured: As `check`.
        """
        self.check()
        from opentelemetry.sdk.resources import OTELResourceDetector

        resource = {"service.name": "stagecast", "service.instance.id": run.run_id}
        resource |= {str(key): str(value) for key, value in OTELResourceDetector().detect().attributes.items()}
        resource |= {"service.name": self.service_name} if self.service_name else {}
        resource |= {"stagecast.run_id": run.run_id}
        return OpenTelemetryWriter(
            Channel("traces", _settings(self.endpoint, "traces"), self.timeout_s),
            Channel("metrics", _settings(self.endpoint, "metrics"), self.timeout_s),
            Totals(self.max_names, "OpenTelemetry"),
            Spans(run.run_id),
            Encoder(run.run_id, resource),
        )


class OpenTelemetryWriter:
    """An open `OpenTelemetry`. Keeps nothing back: when `write` returns, the collector has taken it all."""

    def __init__(self, traces: Channel, metrics: Channel, totals: Totals, spans: Spans, encoder: Encoder) -> None:
        self._traces = traces
        self._metrics = metrics
        self._totals = totals
        self._spans = spans
        self._encoder = encoder
        self._unsent: list[Span] = []  # spans that have ended, and that the collector has not taken

    def write(self, events: Sequence[Event]) -> None:
        """Send what a batch changes. One that is delivered again changes nothing, and what was not taken is sent again.

        Raises:
            ConnectionError: The collector could not be reached, or has not taken it.
        """
        # A replay's batch may hold several attempts. Each begins the sums anew, so the last of the one before go first.
        for _, of_attempt in itertools.groupby(events, lambda event: event.attempt):
            self._unsent += self._spans.take(self._totals.take(list(of_attempt)))
            if self._unsent:
                self._traces.post(self._encoder.traces(self._unsent))
                self._unsent = []
            self._metrics.post(self._encoder.metrics(self._totals))

    def close(self) -> None:
        """Let the connections go. Nothing waits to be sent, but what the collector has refused until the end."""
        self._traces.close()
        self._metrics.close()


@dataclass(frozen=True)
class Settings:
    """Where one kind of request goes, and how. Shows itself without secrets: a traceback may print its variables."""

    url: str = field(repr=False)
    shown: str
    """The address without what might be secret in it."""
    headers: dict[str, str] = field(repr=False)
    compression: str
    verify: str | bool
    cert: str | tuple[str, str] | None


class Channel:
    """A connection to a collector for one kind of request. Each is made once, and ends within a stated time."""

    def __init__(self, signal: Signal, settings: Settings, timeout_s: float) -> None:
        import requests

        self._signal = signal
        self._settings = settings
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.headers.update(settings.headers | {"content-type": "application/x-protobuf"})
        self._session.verify, self._session.cert = settings.verify, settings.cert
        if "authorization" in settings.headers:
            # Or the client would put what stands in ~/.netrc, or in the address, in its place.
            self._session.auth = _as_it_is
        self._compress = _COMPRESS.get(settings.compression)
        if self._compress is not None:
            self._session.headers["content-encoding"] = settings.compression
        self._warned = False

    def post(self, message: bytes) -> None:
        """Send a request, and see that it is taken.

        Raises:
            ConnectionError: It is not. Neither the text nor the causes hold a header, or what the collector wrote.
        """
        data = message if self._compress is None else self._compress(message)
        try:
            with self._session.post(
                self._settings.url, data=data, timeout=self._timeout_s, allow_redirects=False, stream=True
            ) as answer:
                status = answer.status_code
                body = next(answer.iter_content(_ANSWER_BYTES), b"")
        except OSError as error:  # what the client raises is one, too
            reason = _reason(error)
        else:
            if 200 <= status < 300:
                self._warn_of_rejected(body)
                return
            reason = f"the answer was {_phrase(status)}"
        # Outside of the handler, so that the client's error, with the address in it, is not chained to it.
        raise ConnectionError(f"the collector at {self._settings.shown} has not taken {self._signal}: {reason}")

    def close(self) -> None:
        """Close the connections that are kept open."""
        self._session.close()

    def _warn_of_rejected(self, body: bytes) -> None:
        """It may take a request and refuse parts of it; sending them again is of no use, says the protocol."""
        from sinks.otlp_messages import rejected

        count, why = rejected(self._signal, body)
        if count and not self._warned:
            self._warned = True
            logger.warning(
                f"the collector at {self._settings.shown} refuses some {self._signal} ({count} now): {why:.200}"
            )


def _settings(endpoint: str | None, signal: Signal) -> Settings:
    url, shown = _address(endpoint, signal)
    compression = _setting(signal, "COMPRESSION").lower() or "none"
    if compression not in ("none", *_COMPRESS):
        raise SinkMisconfigured(f"{_ENV}_COMPRESSION={compression[:80]}: give gzip, deflate or none")
    verify = _setting(signal, "CERTIFICATE") or True
    certificate, key = _setting(signal, "CLIENT_CERTIFICATE"), _setting(signal, "CLIENT_KEY")
    cert = (certificate, key) if certificate and key else certificate or None
    return Settings(url, shown, _headers(signal), compression, verify, cert)


def _address(endpoint: str | None, signal: Signal) -> tuple[str, str]:
    """Where requests go: to be used, and to be shown, without what might be secret in it."""
    if endpoint is not None:
        source, url = "OpenTelemetry(endpoint=...)", f"{endpoint.rstrip('/')}/v1/{signal}"
        if {"@", "?", "#"} & set(endpoint):
            raise SinkMisconfigured(
                f"{source} holds a user, a password or a query, and may be written down with the run: give the address"
                f" alone, and secrets as headers in {_ENV}_HEADERS"
            )
        if endpoint.rstrip("/").endswith(("/v1/traces", "/v1/metrics")):
            raise SinkMisconfigured(f"{source} ends in /v1/..., which is added for each kind of request: leave it out")
    else:
        protocol = _setting(signal, "PROTOCOL")
        if protocol not in ("", "http/protobuf"):
            raise SinkMisconfigured(
                f"{_ENV}_PROTOCOL={protocol[:80]}, but this sink speaks http/protobuf: give its address as endpoint="
            )
        source = f"{_ENV}_{signal.upper()}_ENDPOINT"
        url = os.environ.get(source, "")
        if not url:
            source = f"{_ENV}_ENDPOINT"
            url = f"{(os.environ.get(source) or 'http://localhost:4318').rstrip('/')}/v1/{signal}"
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url):
            return url, f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        pass  # the port is no number, or the host no IPv6 address
    raise SinkMisconfigured(f"{source} is no address of a collector: give http://HOST:PORT or https://HOST:PORT")


def _setting(signal: Signal, name: str) -> str:
    return (os.environ.get(f"{_ENV}_{signal.upper()}_{name}") or os.environ.get(f"{_ENV}_{name}") or "").strip()


def _headers(signal: Signal) -> dict[str, str]:
    """``name=value,name=value``, percent-encoded or not. Errors name the header, never its value."""
    headers: dict[str, str] = {}
    for number, entry in enumerate(_setting(signal, "HEADERS").split(","), 1):
        name, equals, value = (part.strip() for part in entry.partition("="))
        name, value = unquote(name).lower(), unquote(value).strip()
        if not entry.strip():
            continue
        if not equals or not _HEADER_NAME.fullmatch(name):
            raise SinkMisconfigured(f"{_ENV}_HEADERS: entry {number} is not of the form name=value")
        if value and not _HEADER_VALUE.fullmatch(value):
            raise SinkMisconfigured(f"{_ENV}_HEADERS: the value of {name} has characters that no header may have")
        headers[name] = value
    return headers


def _as_it_is(request: PreparedRequest) -> PreparedRequest:
    return request


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _reason(error: BaseException) -> str:
    """Why a request failed: what the system said, without what the client adds, which is the address and more."""
    while True:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if "timeout" in type(error).__name__.lower():
            return "no answer in time"
        cause = error.__cause__ or error.__context__
        if cause is None:
            return type(error).__name__
        error = cause
