"""The messages of OTLP. Imported without the client; it is needed once a message is built or read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sinks.otlp_spans import Span, trace_id
from sinks.totals import STEP_BOUNDS_S, Family, Samples, Steps, Totals, label_text

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

_TEXT_CHARS = 8_192


class Encoder:
    """Builds the requests of one run.

    Args:
        run_id: The run; makes the trace.
        resource: Who sends, as attributes.
    """

    def __init__(self, run_id: str, resource: Mapping[str, str]) -> None:
        self._trace_id = trace_id(run_id)
        self._resource_attributes = resource

    def traces(self, spans: Iterable[Span]) -> bytes:
        """A request that brings spans."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
        from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans

        scoped = ScopeSpans(scope=self._scope(), spans=[_span(span, self._trace_id) for span in spans])
        request = ExportTraceServiceRequest(
            resource_spans=[ResourceSpans(resource=self._resource(), scope_spans=[scoped])]
        )
        data: bytes = request.SerializeToString()
        return data

    def metrics(self, totals: Totals) -> bytes:
        """A request that brings all numbers, at the time of the newest event."""
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
        from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics, ScopeMetrics

        families, steps = totals.read()
        times = _nanos(totals.started), _nanos(totals.time)
        metrics = [_metric(family, samples, *times) for family, samples in families]
        scoped = ScopeMetrics(scope=self._scope(), metrics=[*metrics, _histogram(steps, *times)])
        request = ExportMetricsServiceRequest(
            resource_metrics=[ResourceMetrics(resource=self._resource(), scope_metrics=[scoped])]
        )
        data: bytes = request.SerializeToString()
        return data

    def _resource(self) -> Resource:
        from opentelemetry.proto.resource.v1.resource_pb2 import Resource

        return Resource(attributes=_attributes(self._resource_attributes))

    def _scope(self) -> InstrumentationScope:
        from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope

        return InstrumentationScope(name="stagecast")


def rejected(signal: str, answer: bytes) -> tuple[int, str]:
    """How many parts of a request the collector has refused, and why; 0 if the answer does not say."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes without types
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        if signal == "traces":
            spans = ExportTraceServiceResponse.FromString(answer).partial_success
            return spans.rejected_spans, spans.error_message
        points = ExportMetricsServiceResponse.FromString(answer).partial_success
        return points.rejected_data_points, points.error_message
    except DecodeError:  # some answer with JSON, or a word
        return 0, ""


def _span(span: Span, trace: bytes) -> SpanMessage:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message
    from opentelemetry.proto.trace.v1.trace_pb2 import Status

    codes = {"unset": Status.STATUS_CODE_UNSET, "ok": Status.STATUS_CODE_OK, "error": Status.STATUS_CODE_ERROR}
    notes = [
        Message.Event(time_unix_nano=_nanos(note.time), name=note.name, attributes=_attributes(note.attributes))
        for note in span.notes
    ]
    return Message(
        trace_id=trace,
        span_id=span.span_id,
        parent_span_id=span.parent or b"",
        name=span.name,
        kind=Message.SPAN_KIND_INTERNAL,
        start_time_unix_nano=_nanos(span.start),
        end_time_unix_nano=_nanos(span.end),
        attributes=_attributes(span.attributes),
        events=notes,
        dropped_events_count=span.notes_left_out,
        links=[] if span.link is None else [Message.Link(trace_id=trace, span_id=span.link)],
        status=Status(code=codes[span.status], message=_text(span.message) if span.status == "error" else ""),
    )


def _metric(family: Family, samples: Samples, started: int, now: int) -> Metric:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE as CUMULATIVE
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint, Sum

    counter = family.kind == "counter"
    points = [
        NumberDataPoint(
            attributes=_attributes(dict(zip(family.labels, labels, strict=True))),
            start_time_unix_nano=started if counter else 0,
            time_unix_nano=now,
            as_double=value,
        )
        for labels, value in samples.items()
    ]
    unit = "s" if family.name.endswith("_seconds") else ""
    metric = Metric(name=f"stagecast.{family.name}", description=family.help, unit=unit)
    if counter:
        metric.sum.CopyFrom(Sum(data_points=points, aggregation_temporality=CUMULATIVE, is_monotonic=True))
    else:
        metric.gauge.CopyFrom(Gauge(data_points=points))
    return metric


def _histogram(steps: Steps, started: int, now: int) -> Metric:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE as CUMULATIVE
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Histogram, HistogramDataPoint, Metric

    point = HistogramDataPoint(
        start_time_unix_nano=started,
        time_unix_nano=now,
        count=steps.total,
        sum=steps.sum_s,
        bucket_counts=steps.buckets,
        explicit_bounds=STEP_BOUNDS_S,
    )
    histogram = Histogram(data_points=[point], aggregation_temporality=CUMULATIVE)
    description = "Time from step to step, the wait for data included."
    return Metric(name="stagecast.step_seconds", description=description, unit="s", histogram=histogram)


def _attributes(attributes: Mapping[str, Any]) -> list[KeyValue]:
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue

    return [KeyValue(key=label_text(key), value=_value(value)) for key, value in attributes.items()]


def _value(value: object) -> AnyValue:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue

    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int() if -(2**63) <= value < 2**63:
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case list() | tuple():
            items: Sequence[object] = value
            return AnyValue(array_value=ArrayValue(values=[_value(item) for item in items]))
        case _:
            return AnyValue(string_value=_text(str(value)))


def _text(text: str) -> str:
    return text[:_TEXT_CHARS].encode(errors="backslashreplace").decode()


def _nanos(unix_s: float) -> int:
    return max(0, round(unix_s * 1e9))
