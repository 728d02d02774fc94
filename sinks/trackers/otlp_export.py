"""Send spans and metrics with the official OTLP exporters. Needs the extra ``stagecast[opentelemetry]``.

The exporters log how an attempt came out and return no more than success or failure; they also retry, and so would hold
a sink's thread. The session that they are given here makes each request once and remembers the outcome: pauses and
retries belong to the sink's supervisor.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Literal

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event as SpanEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from events.log import logger
from sinks.trackers.otlp_spans import TraceSpan, trace_id
from sinks.trackers.totals import STEP_BOUNDS_S, Family, Samples, Steps, Totals, label_text

Signal = Literal["traces", "metrics"]

_TEXT_CHARS = 8_192
_ANSWER_BYTES = 65_536
_SCOPE = InstrumentationScope("stagecast")
_TEMPORARY = (408, 429, 500, 502, 503, 504)
_OF_THIS_BATCH = (400, 413)
"""Answers that refuse the data, not the sender."""
_local = threading.local()


class SignalRefused(Exception):
    """The collector accepts no requests of this kind, now or later."""


class Exporter:
    """One kind of request to a collector, in order, each made once.

    Args:
        url: Where requests go, if the sink was given an address; else the environment says.
        shown: The address for messages, without what might be secret in it.
        timeout_s: How long one request may take; None: as the environment says, or 10 s.
    """

    def __init__(self, signal: Signal, url: str | None, shown: str, timeout_s: float | None) -> None:
        self._signal = signal
        self._shown = shown
        self._session = _Session()
        exporter = OTLPSpanExporter if signal == "traces" else OTLPMetricExporter
        self._exporter = exporter(endpoint=url, timeout=timeout_s, session=self._session)
        self._waiting: list[Any] = []
        self._warned = False

    def put(self, batch: object, *, replaces: bool = False) -> None:
        """Queue data: a list of `ReadableSpan`, or `MetricsData`.

        Args:
            replaces: It is newer than what was queued last, which need not be sent any more.
        """
        if replaces and self._waiting:
            self._waiting.pop()
        self._waiting.append(batch)

    def send(self) -> None:
        """Send all queued data. Waits for the network.

        Raises:
            ConnectionError: The collector could not be reached, or cannot take it now; it stays queued. No text here
                holds a header, or what the collector wrote.
            SignalRefused: It accepts no data of this kind.
        """
        while self._waiting:
            self._session.failure, self._session.status = None, None
            _local.exporting = True
            try:
                result = self._exporter.export(self._waiting[0])
            except _Failed:
                result = None  # older exporters propagate it
            finally:
                _local.exporting = False
            if result not in (SpanExportResult.SUCCESS, MetricExportResult.SUCCESS):
                self._fail(self._session.status, self._session.failure or "it could not be encoded")
            elif self._session.answer:
                self._warn_of_rejected(self._session.answer)
            self._waiting.pop(0)

    def _fail(self, status: int | None, reason: str) -> None:
        """Raise, unless only the current batch was refused."""
        text = f"the collector at {self._shown} has not accepted {self._signal}: {reason}"
        if status in _OF_THIS_BATCH or (status is None and self._session.failure is None):
            self._warn(f"{text}; that batch is dropped")
        elif status is None or status in _TEMPORARY:
            raise ConnectionError(text)
        else:
            raise SignalRefused(text)

    def _warn_of_rejected(self, answer: bytes) -> None:
        """Warn about refused parts of an accepted request, which the protocol forbids to send again."""
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes without types
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        kind = ExportTraceServiceResponse if self._signal == "traces" else ExportMetricsServiceResponse
        try:
            partial = kind.FromString(answer).partial_success
        except DecodeError:  # some answer with JSON, or a word
            return
        count = getattr(partial, "rejected_spans" if self._signal == "traces" else "rejected_data_points")
        if count:
            why = f"{partial.error_message:.200}"
            self._warn(f"the collector at {self._shown} refuses some {self._signal} ({count} now): {why}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(text)

    def close(self) -> None:
        """Close the open connections."""
        self._exporter.shutdown()


# ---------------------------------------------------------------------------------------------------- requests


class _Failed(Exception):
    """A request failed. Not an exception that the exporters retry."""


class _Session(requests.Session):
    """Makes each request once, without following redirects, and records its failure."""

    def __init__(self) -> None:
        super().__init__()
        self.status: int | None = None
        self.failure: str | None = None
        self.answer = b""

    def request(self, method: str, url: str, *args: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        self.status, self.failure, self.answer = None, None, b""
        if any(name.lower() == "authorization" for name in options.get("headers") or self.headers):
            # Otherwise the client would replace it by credentials of ~/.netrc or of the address.
            options["auth"] = _unchanged
        try:
            with super().request(method, url, *args, **options | {"stream": True, "allow_redirects": False}) as answer:
                self.status = answer.status_code
                self.answer = next(answer.iter_content(_ANSWER_BYTES), b"")
        except OSError as error:  # the errors of `requests` are, too
            self.failure = _reason(error)
        else:
            if 200 <= answer.status_code < 300:
                return answer
            self.failure = f"the answer was {_phrase(answer.status_code)}"
        # Outside of the handler, so that the client's error, which contains the address, is not chained.
        raise _Failed(self.failure)


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _reason(error: BaseException) -> str:
    """The reason of a failed request: the system's error, without the client's text, which contains the address."""
    while True:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if "timeout" in type(error).__name__.lower():
            return "no answer in time"
        cause = error.__cause__ or error.__context__
        if cause is None:
            return type(error).__name__
        error = cause


class _Quiet(logging.Filter):
    """Drops the exporters' log records about our requests: the sink and its supervisor report failures."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_local, "exporting", False)


for _exporter in (OTLPSpanExporter, OTLPMetricExporter):
    logging.getLogger(_exporter.__module__).addFilter(_Quiet())


# -------------------------------------------------------------------------------------------------------- data


def resource_of(run_id: str, service_name: str | None) -> Resource:
    """The resource: the run, and the environment's attributes of the service."""
    attributes: dict[str, object] = {"service.name": "stagecast", "service.instance.id": run_id}
    attributes |= OTELResourceDetector().detect().attributes
    attributes |= {"service.name": service_name} if service_name else {}
    return Resource({key: _text(str(value)) for key, value in (attributes | {"stagecast.run_id": run_id}).items()})


def spans_of(spans: Iterable[TraceSpan], run_id: str, resource: Resource) -> list[ReadableSpan]:
    """Convert spans for the exporter."""
    trace = int.from_bytes(trace_id(run_id), "big")
    return [_span(span, trace, resource) for span in spans]


def _span(span: TraceSpan, trace: int, resource: Resource) -> ReadableSpan:
    def context(span_id: bytes) -> SpanContext:
        return SpanContext(trace, int.from_bytes(span_id, "big"), False, TraceFlags(TraceFlags.SAMPLED))

    notes = [SpanEvent(note.name, _attributes(note.attributes), _nanos(note.time)) for note in span.notes]
    events = BoundedList.from_seq(max(1, len(notes)), notes)
    events.dropped = span.notes_left_out
    return ReadableSpan(
        span.name,
        context=context(span.span_id),
        parent=None if span.parent is None else context(span.parent),
        resource=resource,
        attributes=_attributes(span.attributes),
        events=events,
        links=[] if span.link is None else [Link(context(span.link))],
        status=Status(StatusCode[span.status.upper()], _text(span.message) if span.status == "error" else None),
        start_time=_nanos(span.start),
        end_time=_nanos(span.end),
        instrumentation_scope=_SCOPE,
    )


def metrics_of(totals: Totals, resource: Resource) -> MetricsData:
    """Convert all metrics, with the time of the newest event."""
    families, steps = totals.read()
    times = _nanos(totals.started), _nanos(totals.time)
    metrics = [*(_metric(family, samples, *times) for family, samples in families), _histogram(steps, *times)]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(_SCOPE, metrics, "")], "")])


def _metric(family: Family, samples: Samples, started: int, now: int) -> Metric:
    counter = family.kind == "counter"
    points = [
        NumberDataPoint(
            attributes=_attributes(dict(zip(family.labels, labels, strict=True))),
            start_time_unix_nano=started if counter else 0,
            time_unix_nano=now,
            value=float(value),
        )
        for labels, value in samples.items()
    ]
    unit = "s" if family.name.endswith("_seconds") else ""
    data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True) if counter else Gauge(points)
    return Metric(f"stagecast.{family.name}", family.help, unit, data)


def _histogram(steps: Steps, started: int, now: int) -> Metric:
    point = HistogramDataPoint(
        attributes={},
        start_time_unix_nano=started,
        time_unix_nano=now,
        count=steps.total,
        sum=steps.sum_s,
        bucket_counts=steps.buckets,
        explicit_bounds=STEP_BOUNDS_S,
        min=None,  # type: ignore[arg-type]  # optional in the protocol, and not known here
        max=None,  # type: ignore[arg-type]
    )
    data = Histogram([point], AggregationTemporality.CUMULATIVE)
    return Metric("stagecast.step_seconds", "Time from step to step, the wait for data included.", "s", data)


def _attributes(attributes: Mapping[str, object]) -> dict[str, AttributeValue]:
    return {label_text(key): _value(value) for key, value in attributes.items()}


def _value(value: object) -> AttributeValue:
    match value:
        case bool() | float():
            return value
        case int() if -(2**63) <= value < 2**63:
            return value
        case list() | tuple():
            return [_text(str(item)) for item in value]
        case _:
            return _text(str(value))


def _text(text: str) -> str:
    return text[:_TEXT_CHARS].encode(errors="backslashreplace").decode()


def _nanos(unix_s: float) -> int:
    return round(min(max(0.0, unix_s), 2.0**33) * 1e9)  # untrusted times may be any number, or NaN
