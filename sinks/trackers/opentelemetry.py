"""Metrics and traces of a run, sent to an OpenTelemetry collector by OTLP over HTTP.

It uses the official exporters, but not the SDK's providers: their spans have random identifiers, which would duplicate
a repeated batch, and their metrics the time of collection. Global providers are neither read nor set.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import unquote, urlsplit

from events.errors import SinkMisconfigured
from events.log import logger
from events.messages import Event
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.trackers.address import is_http_address
from sinks.trackers.otlp_spans import SPAN_TYPES, Spans
from sinks.trackers.totals import TOTALS_TYPES, Totals

if TYPE_CHECKING:
    from sinks.trackers.otlp_export import Exporter

Signal = Literal["traces", "metrics"]

_ENV = "OTEL_EXPORTER_OTLP"
_MODULES = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?")


class OpenTelemetry(Strict, frozen=True):
    """Sends a run's metrics and spans to a collector.

    **Metrics.** ``stagecast.metric`` is one gauge, with the metric's name as the attribute ``name``: unlike the names
    of instruments it is free text, so names are unchanged and distinct. The newest values of each batch are sent, with
    the time of its newest event. There are sums (``stagecast.steps``, ``stagecast.rows``, ``stagecast.checkpoints``,
    ``stagecast.ledger_seconds``, ...) and a histogram of step times, which start at zero in each attempt, with a start
    time of their own. Histograms, images, sounds, tables and texts that user code logs are skipped.

    **Spans.** ``run`` contains ``train_epoch``, ``test``, ``checkpoint`` and ``checkpoint_upload``; an epoch contains
    its ``validation``. They have the times of their events, the attributes ``stagecast.run_id``,
    ``stagecast.attempt``, ``stagecast.global_step`` and the numbers of their last event, and span events for failures,
    stalls and non-finite losses. All attempts at a run are one trace, derived from its ``run_id``; each links to the
    previous one. A span is sent at its end: the span ``run`` of a killed process is missing, until a replay reaches the
    next attempt.

    Metrics and spans fail independently. If the collector refuses one of them permanently (404, 401, ...), it is
    disabled with a warning; the sink's delivery policy retries temporary failures.

    The environment is read as OpenTelemetry defines it: ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``_HEADERS``, ``_TIMEOUT``,
    ``_COMPRESSION``, ``_CERTIFICATE``, ``_CLIENT_CERTIFICATE`` and ``_CLIENT_KEY``, each also for ``TRACES`` or
    ``METRICS`` alone; ``OTEL_TRACES_EXPORTER=none`` and ``OTEL_METRICS_EXPORTER=none``; ``OTEL_SDK_DISABLED``;
    ``OTEL_RESOURCE_ATTRIBUTES`` and ``OTEL_SERVICE_NAME``. Set secrets there, as headers: they appear in no message,
    log or event.
    """

    endpoint: str | None = None
    """The collector's address: ``http://HOST:4318``, without ``/v1/traces``. None: that of the environment, or this
    machine."""
    service_name: str | None = None
    """The resource's ``service.name``. None: that of the environment, or ``stagecast``."""
    timeout_s: float | None = None
    """Seconds that the collector may take to accept a connection, and again to answer. None: the value of the
    environment, or 10 s."""
    max_names: int = 1_000
    """Maximum distinct metric names. Further names are skipped with a warning."""

    # Lossless, because sums would be wrong and spans would lack an end. Requests are retried for a day, because a
    # collector may be restarted.
    delivery: ClassVar[Delivery] = Delivery(
        types=TOTALS_TYPES | SPAN_TYPES, overflow="catch_up", latency_s=1.0, retries=2_880, timeout_s=30.0
    )

    def check(self) -> None:
        """Check that the packages are installed, and that the settings here and in the environment are valid.

        Raises:
            SinkMisconfigured: They do not. Says which, and never the value of a header.
        """
        for module in _MODULES:
            require(module, "opentelemetry", "the sink OpenTelemetry")
        if self.timeout_s is not None and not (
            isinstance(self.timeout_s, int | float) and 0 < self.timeout_s < math.inf
        ):
            raise SinkMisconfigured(f"OpenTelemetry(timeout_s={self.timeout_s!r:.80}): give seconds greater than zero")
        if not (isinstance(self.max_names, int) and self.max_names >= 1):
            raise SinkMisconfigured(f"OpenTelemetry(max_names={self.max_names!r:.80}): max_names must be >= 1")
        for signal in _signals():
            _check_environment(signal)
            _address(self.endpoint, signal)

    def open(self, run: RunInfo) -> OpenTelemetryWriter:
        """Read the environment. Does not connect: the first write finds a collector that is down.

        Raises:
            SinkMisconfigured: As `check`.
        """
        self.check()
        from sinks.trackers.otlp_export import Exporter

        exporters: dict[Signal, Exporter] = {}
        for signal in _signals():
            exporters[signal] = Exporter(signal, *_address(self.endpoint, signal), self.timeout_s)
        if not exporters:
            logger.warning("OpenTelemetry is disabled by OTEL_SDK_DISABLED, or by both OTEL_..._EXPORTER=none")
        return OpenTelemetryWriter(
            exporters, Totals(self.max_names, "OpenTelemetry"), Spans(run.run_id), run.run_id, self.service_name
        )


class OpenTelemetryWriter:
    """An open `OpenTelemetry`. When `write` returns, the collector has accepted everything."""

    def __init__(
        self,
        exporters: dict[Signal, Exporter],
        totals: Totals,
        spans: Spans,
        run_id: str,
        service_name: str | None,
    ) -> None:
        from sinks.trackers.otlp_export import resource_of

        self._exporters = exporters
        self._totals = totals
        self._spans = spans
        self._run_id = run_id
        self._resource = resource_of(run_id, service_name)
        self._started = 0.0  # start of the attempt whose sums were queued last

    def write(self, events: Sequence[Event]) -> None:
        """Send the changes of a batch. A repeated batch has no changes; refused data is sent again.

        Raises:
            ConnectionError: The collector could not be reached, or has not taken all of it.
            SinkMisconfigured: It refuses everything for good.
        """
        from sinks.trackers.otlp_export import SignalRefused, metrics_of, spans_of

        # A replay's batch may hold several attempts. Each restarts the sums, so the previous ones are sent first.
        for _, of_attempt in itertools.groupby(events, lambda event: event.attempt):
            ended = self._spans.take(self._totals.take(list(of_attempt)))
            if ended and (traces := self._exporters.get("traces")):
                traces.put(spans_of(ended, self._run_id, self._resource))
            if metrics := self._exporters.get("metrics"):
                metrics.put(metrics_of(self._totals, self._resource), replaces=self._totals.started == self._started)
            self._started = self._totals.started
        failures: list[str] = []
        for signal, exporter in list(self._exporters.items()):
            try:
                exporter.send()
            except ConnectionError as error:
                failures.append(str(error))
            except SignalRefused as error:
                self._exporters.pop(signal).close()
                if not self._exporters:
                    raise SinkMisconfigured(str(error)) from None
                logger.warning(f"{error}; no more {signal} are sent in this run")
        if failures:
            raise ConnectionError("; ".join(failures))

    def close(self) -> None:
        """Close the connections. Only data that the collector refused is unsent."""
        for exporter in self._exporters.values():
            exporter.close()


def _signals() -> list[Signal]:
    """The kinds of requests that the environment does not disable."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    kinds: tuple[Signal, ...] = ("traces", "metrics")
    return [kind for kind in kinds if os.environ.get(f"OTEL_{kind.upper()}_EXPORTER", "").strip().lower() != "none"]


def _check_environment(signal: Signal) -> None:
    """Refuse settings that the exporters would only log, including secrets."""
    compression = _setting(signal, "COMPRESSION").lower()
    if compression not in ("", "none", "gzip", "deflate"):
        raise SinkMisconfigured(f"{_ENV}_COMPRESSION={compression[:80]}: give gzip, deflate or none")
    timeout = _setting(signal, "TIMEOUT")
    try:
        seconds = float(timeout or 10)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SinkMisconfigured(f"{_ENV}_TIMEOUT={timeout[:80]}: give seconds greater than zero")
    for number, entry in enumerate(_setting(signal, "HEADERS").split(","), 1):
        name, equals, value = (part.strip() for part in entry.partition("="))
        value = unquote(value).strip()
        if not entry.strip():
            continue
        if not equals or not _HEADER_NAME.fullmatch(unquote(name)):
            raise SinkMisconfigured(f"{_ENV}_HEADERS: entry {number} is not of the form name=value")
        if value and not _HEADER_VALUE.fullmatch(value):
            raise SinkMisconfigured(f"{_ENV}_HEADERS: the value of {name} has characters that no header may have")


def _address(endpoint: str | None, signal: Signal) -> tuple[str, str]:
    """The address of requests: the full one, and one without secrets for messages."""
    if endpoint is not None:
        source, url = "OpenTelemetry(endpoint=...)", f"{endpoint.rstrip('/')}/v1/{signal}"
        if {"@", "?", "#"} & set(endpoint):
            raise SinkMisconfigured(
                f"{source} holds a user, a password or a query, but is stored with the run; give only the address, and"
                f" set secrets as headers in {_ENV}_HEADERS"
            )
        if endpoint.rstrip("/").endswith(("/v1/traces", "/v1/metrics")):
            raise SinkMisconfigured(f"{source} ends in /v1/..., which is added for each kind of request; remove it")
    else:
        protocol = _setting(signal, "PROTOCOL")
        if protocol not in ("", "http/protobuf"):
            raise SinkMisconfigured(
                f"{_ENV}_PROTOCOL={protocol[:80]}, but this sink uses http/protobuf; set its address with endpoint="
            )
        source = f"{_ENV}_{signal.upper()}_ENDPOINT"
        url = os.environ.get(source, "")
        if not url:
            source = f"{_ENV}_ENDPOINT"
            url = f"{(os.environ.get(source) or 'http://localhost:4318').rstrip('/')}/v1/{signal}"
    # An @ after the host may end a password with a slash.
    if is_http_address(url) and "@" not in (parts := urlsplit(url)).path:
        return url, f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    raise SinkMisconfigured(f"{source} is not the address of a collector; give http://HOST:PORT or https://HOST:PORT")


def _setting(signal: Signal, name: str) -> str:
    return (os.environ.get(f"{_ENV}_{signal.upper()}_{name}") or os.environ.get(f"{_ENV}_{name}") or "").strip()
