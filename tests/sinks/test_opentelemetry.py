from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from support import otlp_receiver as otlp
from support.curves import Logs
from support.otlp_receiver import plain
from support.threads import wait_until

from events.errors import SinkMisconfigured
from events.messages import (
    CheckpointFailed,
    CheckpointSaved,
    CheckpointStaged,
    CheckpointUploaded,
    LedgerReported,
    MetricsLogged,
    NonFiniteLoss,
    ObserverFailed,
    ObserverRecovered,
    RunEnded,
    RunResumed,
    StallLedger,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
)
from events.sink import RunInfo
from sinks import Memory, OpenTelemetry
from sinks.replay import replay
from sinks.testing import check_sink
from trainer import CallbackInterface, Checkpoints, Trainer, TrainerArguments, inline

SECRET = "s3cr3t-t0k3n"
OK, ERROR, UNSET = 1, 2, 0


@pytest.fixture(autouse=True)
def _an_environment_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver() -> Iterator[Any]:
    one = otlp.Receiver()
    yield one
    one.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """Opens sinks, and closes them when the test is over."""
    opened: list[Any] = []

    def open_one(endpoint: str | None, *, run_id: str = "demo", attempt: int = 1, **options: Any) -> Any:
        opened.append(OpenTelemetry(endpoint=endpoint, **options).open(RunInfo(run_id, attempt=attempt)))
        return opened[-1]

    yield open_one
    for writer in opened:
        writer.close()


def an_epoch(story: Any) -> list[Any]:
    """A run with one epoch of two steps and a validation, from its start to its end."""
    events = [story.started(), story(TrainEpochStarted, steps=2), *story.steps(2)]
    story.stage = "val"
    events.append(story(ValEpochStarted))
    story.time += 3
    events.append(story(ValEpochEnded, loss=0.25, steps=1, duration_s=3.0))
    story.stage = "train"
    events.append(story(TrainEpochEnded, loss=0.5, steps=2, duration_s=4.0))
    story.stage = None
    story.time += 1
    events.append(story(RunEnded, status="finished"))
    return events


# ------------------------------------------------------------------------------------- collectors that fail


def test_what_a_collector_missed_while_it_was_down_arrives_when_it_is_up(connect: Any, story: Any) -> None:
    """The write raises, which the supervisor counts and repeats; nothing is lost or doubled by that."""
    port = otlp.free_port()
    writer = connect(f"http://127.0.0.1:{port}")
    batch = an_epoch(story)
    for _ in range(3):
        with pytest.raises(
            ConnectionError, match=rf"127\.0\.0\.1:{port}/v1/traces has not accepted traces: Connection re"
        ):
            writer.write(batch)
    receiver = otlp.Receiver(port)
    writer.write(batch)
    story = receiver.story
    receiver.close()
    assert sorted(span.name for span in story.spans) == ["run", "train_epoch", "validation"]
    assert story.number("steps") == 2


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_temporary_refusal_is_a_failure_at_once(receiver: Any, connect: Any, story: Any, status: int) -> None:
    """The pauses are the supervisor's: the client makes one attempt. Metrics are sent all the same."""
    receiver.statuses = {otlp.TRACES: status}
    receiver.answer_headers = {"Retry-After": "3600"}
    receiver.answers = {otlp.TRACES: SECRET.encode()}
    writer = connect(receiver.url)
    with pytest.raises(ConnectionError, match=rf"has not accepted traces: the answer was {status} \w+") as raised:
        writer.write(an_epoch(story))
    assert SECRET not in str(raised.value)
    assert [path for path, _, _ in receiver.received] == [otlp.TRACES, otlp.METRICS]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 501, 307])
def test_a_signal_that_is_refused_for_good_is_named_once_and_sent_no_more(
    receiver: Any, connect: Any, story: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one continues; a redirect is not followed, because it would receive the headers."""
    receiver.statuses = {otlp.TRACES: status}
    receiver.answer_headers = {"Location": f"{receiver.url}/elsewhere"}
    writer = connect(receiver.url)
    writer.write(an_epoch(story))
    story.attempt = 2
    writer.write(an_epoch(story))
    assert [path for path, _, _ in receiver.received] == [otlp.TRACES, otlp.METRICS, otlp.METRICS]
    assert caplog.text.count(f"has not accepted traces: the answer was {status}") == 1
    assert caplog.text.count("no more traces are sent in this run") == 1


def test_a_collector_that_refuses_both_for_good_disables_the_sink(receiver: Any, connect: Any, story: Any) -> None:
    """By the one error that the supervisor does not retry."""
    receiver.statuses = {otlp.TRACES: 404, otlp.METRICS: 404}
    with pytest.raises(SinkMisconfigured, match="has not accepted metrics: the answer was 404"):
        connect(receiver.url).write(an_epoch(story))


@pytest.mark.parametrize("status", [400, 413])
def test_a_batch_that_is_refused_is_dropped_with_a_warning(
    receiver: Any, connect: Any, story: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes later may be taken."""
    receiver.statuses = {otlp.TRACES: status}
    writer = connect(receiver.url)
    writer.write([story.started(), story(TrainEpochStarted), story(TrainEpochEnded, loss=1.0)])
    receiver.statuses = {}
    writer.write([story(RunEnded, status="finished")])
    assert [span.name for span in otlp.Story(receiver.received[-2:]).spans] == ["run"]
    assert caplog.text.count("that batch is dropped") == 1


@pytest.mark.parametrize(
    ("environment", "sent"),
    [
        ({"OTEL_TRACES_EXPORTER": "none"}, [otlp.METRICS]),
        ({"OTEL_METRICS_EXPORTER": "None"}, [otlp.TRACES]),
        ({"OTEL_SDK_DISABLED": "true"}, []),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "false"}, [otlp.TRACES, otlp.METRICS]),
    ],
)
def test_the_environment_turns_signals_off(
    receiver: Any,
    connect: Any,
    story: Any,
    environment: dict[str, str],
    sent: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Disabling both causes a warning, because the sink was requested."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    connect(receiver.url).write(an_epoch(story))
    assert [path for path, _, _ in receiver.received] == sent
    assert ("OpenTelemetry is disabled" in caplog.text) is (not sent)


def test_a_collector_that_hangs_is_left_in_time(receiver: Any, connect: Any, story: Any) -> None:
    """A write must end, or the run's end waits for it."""
    receiver.hanging = True
    writer = connect(receiver.url, timeout_s=0.2)
    with pytest.raises(ConnectionError, match="no answer in time"):
        writer.write(an_epoch(story))


def test_an_unknown_host_name_is_retried(connect: Any, story: Any) -> None:
    """A name service may be down for a moment."""
    with pytest.raises(ConnectionError, match=r"no-such-host\.invalid:4318/v1/metrics has not accepted metrics"):
        connect("http://no-such-host.invalid:4318").write(story.steps(1))


def test_an_answer_that_was_lost_makes_no_second_span(receiver: Any, connect: Any, story: Any) -> None:
    """The collector has the batch, but we do not know: it gets the same spans again, by the same identifiers."""
    writer = connect(receiver.url)
    batch = an_epoch(story)
    receiver.silent = True
    with pytest.raises(ConnectionError, match="has not accepted traces"):
        writer.write(batch)
    receiver.silent = False
    writer.write(batch)
    sent = [body for path, _, body in receiver.received if path == otlp.TRACES]
    assert sent[0] == sent[-1]
    assert len({span.span_id for span in receiver.story.spans}) == 3


def test_a_run_that_is_delivered_again_gives_the_same_spans(receiver: Any, connect: Any, story: Any) -> None:
    """By another process, from the journal: identifiers are made from the events' own."""
    batch = an_epoch(story)
    connect(receiver.url).write(batch)
    first = {span.span_id for span in receiver.story.spans}
    again = connect(receiver.url)
    for event in batch:
        again.write([event])
    assert {span.span_id for span in receiver.story.spans} == first
    connect(receiver.url, attempt=2).write([msgspec.structs.replace(event, attempt=2) for event in batch])
    connect(receiver.url, run_id="x").write([msgspec.structs.replace(event, run_id="x") for event in batch])
    for other in ("x\udcff", "x?"):
        connect(receiver.url, run_id=other).write([msgspec.structs.replace(event, run_id=other) for event in batch])
    assert len({span.span_id for span in receiver.story.spans}) == 5 * len(first)
    assert len({span.trace_id for span in receiver.story.spans}) == 4


def test_spans_that_were_taken_are_not_sent_again_when_metrics_fail(receiver: Any, connect: Any, story: Any) -> None:
    """The two go to different places; what one has is not repeated because of the other."""
    receiver.statuses = {otlp.METRICS: 500}
    writer = connect(receiver.url)
    batch = an_epoch(story)
    with pytest.raises(ConnectionError, match="has not accepted metrics"):
        writer.write(batch)
    receiver.statuses = {}
    writer.write(batch)
    assert [path for path, _, _ in receiver.received] == [otlp.TRACES, otlp.METRICS, otlp.METRICS]
    assert receiver.story.number("steps") == 2


def test_what_a_collector_refuses_in_part_is_said_once(
    receiver: Any, connect: Any, story: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The protocol forbids a retry, so there is a warning."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

    answer = ExportMetricsServiceResponse()
    answer.partial_success.rejected_data_points, answer.partial_success.error_message = 3, "too old"
    receiver.answers = {otlp.METRICS: answer.SerializeToString(), otlp.TRACES: b'{"partialSuccess": {}}'}
    writer = connect(receiver.url)
    writer.write(an_epoch(story))
    writer.write(story.steps(1))
    assert caplog.text.count("refuses some metrics (3 now): too old") == 1


# ------------------------------------------------------------------------------------ settings and secrets


def test_it_keeps_the_rules_of_sinks(receiver: Any) -> None:
    """With events of every type."""
    check_sink(OpenTelemetry(endpoint=receiver.url))


def test_headers_come_from_the_environment_and_are_shown_nowhere(
    receiver: Any,
    connect: Any,
    story: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """A token is sent to the collector, and is in no text that anybody reads."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization=Bearer%20{SECRET}, x-scope = a b,")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "authorization=Basic dTpw==")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://user:{SECRET}@127.0.0.1:{receiver.port}")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    caplog.set_level(logging.DEBUG)
    sink = OpenTelemetry()
    writer = connect(None)
    writer.write(an_epoch(story))
    (_, traces, _), (_, metrics, _) = receiver.received
    assert (traces["authorization"], traces["x-scope"]) == (f"Bearer {SECRET}", "a b")
    assert metrics["authorization"] == "Basic dTpw=="
    receiver.statuses = {otlp.METRICS: 500}
    with pytest.raises(ConnectionError) as raised:
        writer.write(story.steps(1))
    shown = [repr(sink), str(raised.value), repr(raised.value.__context__), caplog.text]
    assert SECRET not in " ".join(shown)
    assert f"http://127.0.0.1:{receiver.port}/v1/metrics" in str(raised.value)
    assert msgspec.json.decode(msgspec.json.encode(sink), type=OpenTelemetry) == sink


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"endpoint": "localhost:4318"}, "not the address of a collector"),
        ({"endpoint": "grpc://localhost:4317"}, "give http://HOST:PORT"),
        ({"endpoint": "http://"}, "not the address"),
        ({"endpoint": "http://host:port"}, "not the address"),
        ({"endpoint": "http://[::1"}, "not the address"),
        ({"endpoint": "http://a b:4318"}, "not the address"),
        ({"endpoint": f"http://u:{SECRET}@host:4318"}, "secrets as headers"),
        ({"endpoint": f"http://host:4318?token={SECRET}"}, "secrets as headers"),
        ({"endpoint": "http://host:4318/v1/traces"}, "remove it"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": math.inf}, "timeout_s"),
        ({"timeout_s": "4"}, "timeout_s"),
        ({"max_names": 0}, "max_names"),
    ],
)
def test_an_invalid_setting_is_refused_before_the_run(options: dict[str, Any], says: str) -> None:
    """The trainer checks it when it is built; a password is not repeated."""
    with pytest.raises(SinkMisconfigured, match=says) as raised:
        OpenTelemetry(**options).check()
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENDPOINT", "collector:4318"),
        ("TRACES_ENDPOINT", "collector:4318"),
        ("PROTOCOL", "grpc"),
        ("COMPRESSION", "zstd"),
        ("TIMEOUT", "soon"),
        ("HEADERS", SECRET),
        ("HEADERS", f"a=1,{SECRET}"),
        ("HEADERS", f"bad name={SECRET}"),
        ("HEADERS", f"a={SECRET}%0d%0ax: y"),
        ("HEADERS", f"a={SECRET}é"),
    ],
)
def test_an_invalid_environment_is_refused_by_the_name_of_the_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a header's value, which the client would put into its error, and the SDK into a log."""
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    with pytest.raises(SinkMisconfigured, match=f"OTEL_EXPORTER_OTLP_{name}") as raised:
        OpenTelemetry().check()
    assert SECRET not in str(raised.value)
    assert raised.value.__context__ is None or not name.startswith("HEADERS")


def test_each_kind_of_request_may_go_elsewhere_and_be_compressed(
    receiver: Any, connect: Any, story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the environment says, which the SDK's exporters follow too."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{receiver.url}/base/")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{receiver.url}/mine?tenant=7")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    connect(None).write(an_epoch(story))
    assert [path for path, _, _ in receiver.received] == ["/base/v1/traces", "/mine?tenant=7"]
    assert receiver.received[0][1]["content-encoding"] == "gzip"


def test_the_resource_says_which_service_and_which_run(
    receiver: Any, connect: Any, story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs must not write one series; what the environment says about the service holds."""
    connect(receiver.url).write(story.steps(1))
    first = plain(receiver.story.resources[-1].attributes)
    assert first == {"service.name": "stagecast", "service.instance.id": "demo", "stagecast.run_id": "demo"}
    monkeypatch.setenv("OTEL_SERVICE_NAME", "lab")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod-7,team=a%20b")
    connect(receiver.url, run_id="läuft\udc80").write(story.steps(1))
    second = plain(receiver.story.resources[-1].attributes)
    expected = {
        "service.name": "lab",
        "service.instance.id": "pod-7",
        "team": "a b",
        "stagecast.run_id": "läuft\\udc80",
    }
    assert second == expected
    connect(receiver.url, service_name="mine").write(story.steps(1))
    assert plain(receiver.story.resources[-1].attributes)["service.name"] == "mine"


# -------------------------------------------------------------------------------------------------- metrics


def test_names_and_numbers_arrive_as_they_are(receiver: Any, connect: Any, story: Any) -> None:
    """Names are attributes, because those of instruments may hold little; NaN and infinities are numbers."""
    names = {"größe/π 日本": 1.0, "": 2.0, "a b\n": math.inf, "nan": math.nan}
    connect(receiver.url).write([story(MetricsLogged, metrics=names | {"\udcff": 5.0, "?": 7.0, "x" * 100_000: 6.0})])
    told = receiver.story
    assert [told.number("metric", name=name) for name in names][:3] == [1.0, 2.0, math.inf]
    assert math.isnan(told.number("metric", name="nan") or 0.0)
    assert (told.number("metric", name="\\udcff"), told.number("metric", name="?")) == (5.0, 7.0)
    assert max(len(plain(p.attributes)["name"]) for p in told.metrics["stagecast.metric"].gauge.data_points) == 256


def test_sums_are_cumulative_and_count_each_event_once(receiver: Any, connect: Any, story: Any) -> None:
    """From the start of the attempt to the newest event, by the events' own times."""
    writer = connect(receiver.url)
    started = story.started()
    batch = [started, *story.steps(3, step_s=0.3)]
    writer.write(batch)
    writer.write([*batch, *story.steps(1, step_s=1e6)])
    told = receiver.story
    steps = told.metrics["stagecast.steps"].sum
    assert steps.is_monotonic
    assert steps.aggregation_temporality == 2
    assert steps.data_points[0].as_double == 4
    assert steps.data_points[0].start_time_unix_nano == int(started.time) * 10**9
    assert steps.data_points[0].time_unix_nano == pytest.approx(story.time * 1e9, abs=1e3)
    point = told.metrics["stagecast.step_seconds"].histogram.data_points[0]
    assert (point.count, sum(point.bucket_counts), point.bucket_counts[-1]) == (4, 4, 1)
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    assert told.number("checkpoints", outcome="saved") == 0


def test_sums_of_attempts_in_one_batch_are_those_of_each_attempt(receiver: Any, connect: Any, story: Any) -> None:
    """Each with its start time, as its own process sent them, including the last of the first one."""
    first = [story.started(), *story.steps(3), story(LedgerReported, ledger=StallLedger(data_s=2.0), scope="run")]
    story.attempt, story.time = 2, story.time + 100
    second = [story.started(), *story.steps(2), story(LedgerReported, ledger=StallLedger(data_s=0.5), scope="interval")]
    writer = connect(receiver.url, attempt=2)
    receiver.statuses = {otlp.METRICS: 500}
    with pytest.raises(ConnectionError, match="has not accepted metrics"):
        writer.write([*first, *second])
    receiver.statuses = {}
    receiver.received.clear()
    writer.write([*first, *second])
    requests = [request for request in receiver.received if request[0] == otlp.METRICS]
    sums = []
    for told in [otlp.Story([request]) for request in requests]:
        (steps,) = told.metrics["stagecast.steps"].sum.data_points
        (times,) = told.metrics["stagecast.step_seconds"].histogram.data_points
        ledger = told.number("ledger_seconds", row="data")
        sums.append((steps.start_time_unix_nano, steps.as_double, times.count, ledger))
    assert sums == [(int(first[0].time) * 10**9, 3, 3, 2.0), (pytest.approx(second[0].time * 1e9), 2, 2, 0.5)]
    infos = otlp.Story(requests[1:]).metrics["stagecast.run_info"].gauge.data_points
    assert [plain(info.attributes)["attempt"] for info in infos] == ["2"]


def test_names_beyond_the_limit_are_skipped_with_a_warning(
    receiver: Any, connect: Any, story: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As in Prometheus."""
    writer = connect(receiver.url, max_names=1)
    writer.write([story(MetricsLogged, metrics={"a": 1.0, "b": 2.0, "c": 3.0})])
    assert receiver.story.number("metric_values_left_out") == 2
    assert caplog.text.count("skips 'b'") == 1


# ---------------------------------------------------------------------------------------------------- spans


def test_spans_have_the_times_of_the_events_and_stand_in_one_another(receiver: Any, connect: Any, story: Any) -> None:
    """Whenever they were delivered."""
    batch = an_epoch(story)
    writer = connect(receiver.url)
    for event in batch:
        writer.write([event])
    told = receiver.story
    (run,), (epoch,), (validation,) = (told.named(name) for name in ("run", "train_epoch", "validation"))
    assert (run.parent_span_id, epoch.parent_span_id, validation.parent_span_id) == (b"", run.span_id, epoch.span_id)
    assert len({span.trace_id for span in told.spans}) == 1
    times = [
        (round(span.start_time_unix_nano / 1e9, 3), round(span.end_time_unix_nano / 1e9, 3)) for span in told.spans
    ]
    assert times == [(1.7e9 + 0.2, 1.7e9 + 3.2), (1.7e9, 1.7e9 + 3.2), (1.7e9, 1.7e9 + 4.2)]
    assert [span.status.code for span in told.spans] == [OK, OK, OK]
    attributes = plain(validation.attributes)
    assert attributes["stagecast.metric.val_loss"] == 0.25
    assert (attributes["stagecast.run_id"], attributes["stagecast.attempt"]) == ("demo", 1)
    assert attributes["stagecast.global_step"] == 2
    assert plain(epoch.attributes)["stagecast.metric.train_epoch_loss"] == 0.5
    assert plain(run.attributes)["stagecast.module"] == "my_package.Net"


def test_a_run_that_fails_ends_all_that_was_under_way(receiver: Any, connect: Any, story: Any) -> None:
    """With the reason, and with what had happened before as span events."""
    writer = connect(receiver.url)
    started = [story.started(), story(TrainEpochStarted), story(ValEpochStarted, key="dev")]
    noted = [
        story(NonFiniteLoss, loss=math.nan, action="stopped"),
        story(ObserverFailed, observer="wandb", error="OSError: no", action="retrying"),
    ]
    story.stage = None
    told_late = [story(ObserverRecovered, observer="wandb", failures=2)]
    writer.write([*started, *noted, *told_late, story(RunEnded, status="failed", reason="ValueError: no\udcff")])
    told = receiver.story
    assert sorted(span.name for span in told.spans) == ["run", "train_epoch", "validation"]
    assert {span.status.code for span in told.spans} == {ERROR}
    assert {span.status.message for span in told.spans} == {"ValueError: no\\udcff"}
    assert [event.name for event in told.named("train_epoch")[0].events] == ["NonFiniteLoss", "ObserverFailed"]
    assert plain(told.named("train_epoch")[0].events[1].attributes)["stagecast.observer"] == "wandb"
    assert [event.name for event in told.named("run")[0].events] == ["ObserverRecovered"]


@pytest.mark.parametrize(("status", "code"), [("finished", OK), ("stopped", OK), ("cancelled", UNSET)])
def test_a_run_that_was_ended_has_not_failed(receiver: Any, connect: Any, story: Any, status: str, code: int) -> None:
    """Cancellation is neither an error nor a success."""
    connect(receiver.url).write([story.started(), story(TrainEpochStarted), story(RunEnded, status=status)])
    told = receiver.story
    assert told.named("run")[0].status.code == code
    assert told.named("train_epoch")[0].status.code == UNSET
    assert plain(told.named("run")[0].attributes)["stagecast.status"] == status


def test_a_span_never_ends_before_it_starts(receiver: Any, connect: Any, story: Any) -> None:
    """Whatever the clock or a duration: stores refuse such spans, and the batch with them."""
    lasted = (math.nan, math.inf, -math.inf, 1e300, -1e300)
    events = [story.started(), story(TrainEpochStarted)]
    events += [story(CheckpointSaved, checkpoint=f"step-{i}.a1", path="/x", durable_s=s) for i, s in enumerate(lasted)]
    story.time -= 3600
    connect(receiver.url).write([*events, story(TrainEpochEnded, duration_s=1.0), story(RunEnded, status="finished")])
    spans = receiver.story.spans
    assert sorted(span.name for span in spans) == [*["checkpoint"] * len(lasted), "run", "train_epoch"]
    assert all(0 <= span.start_time_unix_nano <= span.end_time_unix_nano < 2**63 for span in spans)


def test_checkpoints_are_spans_that_may_outlast_the_run(receiver: Any, connect: Any, story: Any) -> None:
    """The last is written while the run ends; one that fails says why; an upload ends when it is whole."""
    events = [story.started()]
    for step in (1, 2):
        events += [story(CheckpointStaged, checkpoint=f"step-{step}.a1", reasons=["steps"])]
    events += [
        story(CheckpointFailed, checkpoint="step-1.a1", error="OSError: ENOSPC"),
        story(RunEnded, status="finished"),
    ]
    story.time += 5
    events += [story(CheckpointSaved, checkpoint="step-2.a1", path="/x", nbytes=7, durable_s=5.0)]
    events += [story(CheckpointUploaded, checkpoint="step-2.a1", url="s3://b/x", duration_s=2.0)]
    connect(receiver.url).write(events)
    told = receiver.story
    failed, saved = told.named("checkpoint")
    assert (failed.status.code, failed.status.message) == (ERROR, "OSError: ENOSPC")
    assert (saved.status.code, saved.end_time_unix_nano - saved.start_time_unix_nano) == (OK, 5 * 10**9)
    assert plain(saved.attributes)["stagecast.nbytes"] == 7
    upload = told.named("checkpoint_upload")[0]
    assert upload.end_time_unix_nano - upload.start_time_unix_nano == 2 * 10**9
    assert {span.parent_span_id for span in (failed, saved, upload)} == {told.named("run")[0].span_id}


def test_a_resumed_run_continues_the_trace_and_links_to_the_previous_attempt(
    receiver: Any, connect: Any, story: Any
) -> None:
    """In the middle of an epoch, which began in another process: its span begins here, and holds its validation."""
    connect(receiver.url).write(an_epoch(story))
    story.attempt, story.time = 2, story.time + 100
    resumed_at = story.time
    story.stage = "train"
    events = [story.started(), story(RunResumed, checkpoint="step-1.a1"), *story.steps(1, step_s=0.5)]
    story.stage = "val"
    events += [story(ValEpochStarted), story(ValEpochEnded, loss=1.0)]
    story.stage = "train"
    events += [story(TrainEpochEnded, loss=1.0, duration_s=50.0), story(RunEnded, status="finished")]
    connect(receiver.url, attempt=2).write(events)
    told = receiver.story
    first, second = told.named("run")
    assert first.trace_id == second.trace_id
    assert first.span_id != second.span_id
    assert [link.span_id for link in second.links] == [first.span_id]
    epoch, validation = told.named("train_epoch")[1], told.named("validation")[1]
    assert epoch.parent_span_id == second.span_id
    assert epoch.start_time_unix_nano >= int(resumed_at) * 10**9
    assert validation.parent_span_id == epoch.span_id
    assert len({span.span_id for span in told.spans}) == len(told.spans)


def test_attempts_that_come_one_after_the_other_each_have_their_spans(receiver: Any, connect: Any, story: Any) -> None:
    """As from a replay, or in a host that has the rest of the attempt before: the first one was killed."""
    killed = [story.started(), story(TrainEpochStarted), story(CheckpointStaged, checkpoint="step-1.a1", reasons=[])]
    killed += [story(ValEpochStarted), *story.steps(1)]
    killed_at = story.time
    story.attempt, story.time = 2, story.time + 100
    # The epoch of the first attempt is done again, and its checkpoint was never saved.
    again = [story.started(), *story.steps(2), story(TrainEpochEnded, loss=1.0), story(RunEnded, status="finished")]
    connect(receiver.url, attempt=2).write([*killed, *again])
    told = receiver.story
    assert len({span.span_id for span in told.spans}) == len(told.spans)
    first, second = told.named("run")
    assert [link.span_id for link in second.links] == [first.span_id]
    assert (first.status.code, second.status.code) == (UNSET, OK)
    assert first.end_time_unix_nano == pytest.approx(killed_at * 1e9, abs=1e3)
    assert [epoch.parent_span_id for epoch in told.named("train_epoch")] == [first.span_id, second.span_id]
    assert [plain(one.attributes)["stagecast.attempt"] for one in told.named("train_epoch")] == [1, 2]
    (checkpoint,), (validation,) = told.named("checkpoint"), told.named("validation")
    assert (checkpoint.parent_span_id, checkpoint.status.code) == (first.span_id, UNSET)
    assert validation.parent_span_id == told.named("train_epoch")[0].span_id


def test_late_events_of_an_attempt_belong_to_that_attempt(receiver: Any, connect: Any, story: Any) -> None:
    """A host of the next one delivers it; the beginning was told by the host before."""
    rest = [*story.steps(1), story(CheckpointUploaded, checkpoint="step-1.a1", url="s3://b/x")]
    story.attempt = 2
    connect(receiver.url, attempt=2).write([*rest, story.started(), story(RunEnded, status="finished")])
    told = receiver.story
    (upload,), (epoch,), (run,) = (told.named(name) for name in ("checkpoint_upload", "train_epoch", "run"))
    assert upload.parent_span_id == epoch.parent_span_id == run.links[0].span_id
    assert run.links[0].span_id != run.span_id


def test_an_epoch_that_other_attempts_began_begins_with_this_one(receiver: Any, connect: Any, story: Any) -> None:
    """Its duration is that of all attempts; a span before its parent would be drawn nowhere."""
    story.attempt = 2
    started = story.started()
    story.time += 1
    ended = story(TrainEpochEnded, loss=1.0, duration_s=50.0)
    connect(receiver.url, attempt=2).write([started, ended, story(RunEnded, status="finished")])
    epoch, run = receiver.story.spans
    assert epoch.start_time_unix_nano == run.start_time_unix_nano


def test_what_happens_at_every_step_is_noted_so_often_and_then_counted(receiver: Any, connect: Any, story: Any) -> None:
    """A span with a million events is taken by no collector."""
    started = story.started()
    noted = [story(NonFiniteLoss, loss=math.nan, action="warned") for _ in range(200)]
    ended = story(RunEnded, status="finished")
    connect(receiver.url).write([started, *noted, ended])
    run = receiver.story.named("run")[0]
    assert (len(run.events), run.dropped_events_count) == (128, 72)


# ------------------------------------------------------------------------------------------ the real trainer


def train(sink: Any, memory: Memory, *, callbacks: Any = (), checkpoints: Any = False, **options: Any) -> Any:
    """Five steps per epoch, and a validation."""
    own = {name: options.pop(name) for name in ("run_id", "run_dir", "resume") if name in options}
    arguments = TrainerArguments(**({"epochs": 2, "train_batch_size": 4, "device": "cpu"} | options))
    where = {"callbacks": callbacks, "checkpoints": checkpoints, "journal": bool(own), **own}
    return Trainer(Logs(20), arguments, sinks=[memory, sink], **where).train()


def test_a_run_of_two_attempts_reaches_its_collector_and_a_replay_sends_the_same_spans(
    receiver: Any, tmp_path: Path
) -> None:
    """Each once: a trace store keeps one of the two. No global provider is changed."""
    from opentelemetry import metrics, trace

    def spans() -> list[tuple[bytes, ...]]:
        told = receiver.story.spans
        return sorted((one.span_id, one.parent_span_id, *[link.span_id for link in one.links]) for one in told)

    globals_before = trace.get_tracer_provider(), metrics.get_meter_provider()
    memory = Memory()
    own = {"run_id": "läuft", "run_dir": str(tmp_path / "run"), "checkpoints": Checkpoints(every_epochs=1)}
    train(OpenTelemetry(endpoint=receiver.url), memory, **own)
    told = receiver.story
    assert len(told.named("run")) == 1
    assert len(told.named("train_epoch")) == len(told.named("validation")) == 2
    assert len(told.named("checkpoint")) == len(memory.of(CheckpointSaved)) == 2
    assert {span.status.code for span in told.spans} == {OK}
    assert (told.number("steps"), told.number("global_step"), told.number("rows")) == (10, 10, 40)
    assert told.number("metric", name="größe/π") == 1.5
    assert told.number("metric", name="train_loss") == memory.of(TrainStepEnded)[-1].loss
    assert told.number("run_state", state="finished") == 1

    train(OpenTelemetry(endpoint=receiver.url), memory, **own, epochs=3, resume="auto")
    told, live = receiver.story, spans()
    first, second = told.named("run")
    assert second.links[0].span_id == first.span_id
    assert len({span.trace_id for span in told.spans}) == 1
    assert len({span.span_id for span in told.spans}) == len(told.spans)
    assert (told.number("steps"), told.number("global_step")) == (5, 15)
    assert memory.of(ObserverFailed) == []
    assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == globals_before

    receiver.received.clear()
    anyio.run(replay, tmp_path / "run", [OpenTelemetry(endpoint=receiver.url)])
    assert spans() == live


class Waiting(CallbackInterface):
    """Holds the loop at the end of an epoch until something has been published."""

    def __init__(self, memory: Memory, kind: type[Any]) -> None:
        self.memory, self.kind = memory, kind

    @inline
    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        wait_until(lambda: self.memory.of(self.kind), f"there is no {self.kind.__name__}")


def test_a_collector_that_is_never_there_costs_a_run_only_its_drain(tmp_path: Path) -> None:
    """The training does not notice; the failure is an event, and the end waits no longer than it may."""
    memory = Memory()
    sink = OpenTelemetry(endpoint=f"http://127.0.0.1:{otlp.free_port()}")
    waiting = [Waiting(memory, ObserverFailed)]
    result = train(sink, memory, callbacks=waiting, drain_timeout_s=0.5, run_dir=str(tmp_path / "run"))
    assert result.status == "finished"
    failed = memory.of(ObserverFailed)[0]
    assert (failed.observer, failed.during, failed.action) == ("opentelemetry", "write", "retrying")
    assert "Connection refused" in failed.error


class StopAndRestart(CallbackInterface):
    """Stops the collector in the middle of a run, and starts it again once its absence was noticed."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.receivers = [otlp.Receiver()]

    @inline
    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        (first, *_) = self.receivers
        if global_step == 5:
            wait_until(lambda: first.received, "the collector has received nothing")
            first.close()
        elif global_step == 10:
            wait_until(lambda: self.memory.of(ObserverFailed), "no one has noticed that the collector is gone")
            self.receivers.append(otlp.Receiver(first.port))
        else:
            wait_until(lambda: self.memory.of(ObserverRecovered), "no one has noticed that it is back")


def test_what_a_collector_missed_during_a_run_is_delivered_when_it_is_back(tmp_path: Path) -> None:
    """Every span once, every step counted."""
    memory = Memory()
    collector = StopAndRestart(memory)
    often = msgspec.structs.replace(OpenTelemetry.delivery, latency_s=0.05)
    sink = OpenTelemetry(endpoint=collector.receivers[0].url)
    train((sink, often), memory, callbacks=[collector], epochs=3, run_dir=str(tmp_path / "run"))
    told = otlp.Story([request for receiver in collector.receivers for request in receiver.received])
    collector.receivers[-1].close()
    spans = {span.span_id: span for span in told.spans}
    names = sorted(span.name for span in spans.values())
    assert names == ["run", *["train_epoch"] * 3, *["validation"] * 3]
    assert (told.number("steps"), told.number("run_state", state="finished")) == (15, 1)
