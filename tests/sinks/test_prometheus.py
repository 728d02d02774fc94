from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from support.curves import Logs
from support.threads import WAIT_S, wait_until

from events.errors import SinkMisconfigured
from events.messages import (
    CheckpointFailed,
    CheckpointSaved,
    CheckpointUploaded,
    CommandTaken,
    LedgerReported,
    MetricsLogged,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    RunEnded,
    RunResumed,
    StallLedger,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
)
from events.sink import Delivery, RunInfo
from sinks import Memory, Prometheus
from sinks.connections import REQUEST_S
from sinks.trackers import prometheus as prometheus_module
from trainer import CallbackInterface, Trainer, TrainerArguments, inline

STRANGE = [
    'quo"te',
    "back\\slash",
    "new\nline",
    "tab\t",
    "return\r",
    "line\u2028",
    "größe/π 日本 🙂",
    "",
    " ",
    "{a=b},#",
]


class Page:
    """What a scrape of a page gave, by the name of a sample and its labels but ``run_id``."""

    def __init__(self, url: str, openmetrics: bool = False, timeout_s: float = WAIT_S) -> None:
        accept = "application/openmetrics-text; version=1.0.0" if openmetrics else "text/plain"
        with urlopen(Request(url, headers={"Accept": accept}), timeout=timeout_s) as answer:
            self.text = answer.read().decode()
        self.kinds: dict[str, str] = {}
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.run_ids = set()
        for family in (parse_openmetrics if openmetrics else parse_text)(self.text):
            self.kinds[family.name] = family.type
            for sample in family.samples:
                labels = dict(sample.labels)
                self.run_ids.add(labels.pop("run_id"))
                self.samples[sample.name, frozenset(labels.items())] = sample.value

    def __call__(self, sample: str, /, **labels: str) -> float | None:
        return self.samples.get((f"stagecast_{sample}", frozenset(labels.items())))

    def family(self, name: str, label: str) -> dict[str, float]:
        """All samples of a name, by one of their labels."""
        return {dict(labels)[label]: value for (known, labels), value in self.samples.items() if known[10:] == name}

    def metric(self, name: str) -> float | None:
        return self("metric", name=name)


@pytest.fixture
def serve() -> Iterator[Any]:
    """Opens sinks on free ports, and closes them when the test is over."""
    opened: list[Any] = []

    def open_one(run_id: str = "demo", run_dir: Path | None = None, **options: Any) -> Any:
        sink = Prometheus(**({"port": 0, "linger_s": 0} | options))
        opened.append(sink.open(RunInfo(run_id, run_dir=None if run_dir is None else str(run_dir))))
        return opened[-1]

    yield open_one
    for writer in opened:
        if writer._thread.is_alive():
            writer.close()


def train(sink: Any, memory: Memory, act: Any = None, **options: Any) -> None:
    own = {"journal": False, "checkpoints": False} | options
    arguments = TrainerArguments(epochs=2, train_batch_size=4, device="cpu")
    Trainer(Logs(20, act=act), arguments, sinks=[memory, sink], **own).train()


# ------------------------------------------------------------------------------------------------ addresses


def test_a_port_in_use_disables_the_sink_and_the_run_continues() -> None:
    """The page is lost, not the training; the message says which port and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        memory = Memory()
        # Only the journal has what is published while a run ends.
        sink = (Prometheus(port=port), Delivery(runs_in="thread"))
        train(sink, memory, lambda global_step: wait_until(lambda: memory.of(ObserverFailed)))
    assert memory.of(RunEnded)[0].status == "finished"
    failures = memory.of(ObserverFailed)
    assert {(one.observer, one.during) for one in failures} == {("prometheus", "open")}
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in failures[0].error
    assert "port=0" in failures[0].error


def test_a_port_is_taken_once_it_is_free(serve: Any) -> None:
    """A restarted job finds its predecessor still closing; after close, no thread is left."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match="free the port"):
            serve(port=port)
    for _ in range(2):
        writer = serve(port=port)
        assert Page(writer.url)("steps_total") == 0
        writer.close()
        assert "stagecast-prometheus-http" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"host": "http://localhost"}, "host='http://localhost'"),
        ({"host": "localhost:9464"}, "set the port with port="),
        ({"host": ""}, "not a host name"),
        ({"host": "a b"}, "not a host name"),
        ({"host": "fe80::zz"}, "not a host name"),
        ({"port": 65_536}, "port=65536"),
        ({"port": -1}, "0 for a free one"),
        ({"max_names": 0}, "max_names must be >= 1"),
    ],
)
def test_an_invalid_address_is_refused_before_the_run(options: dict[str, Any], says: str) -> None:
    """The trainer's constructor checks it, so that it does not fail after an hour."""
    with pytest.raises(SinkMisconfigured) as raised:
        Prometheus(**options).check()
    assert says in str(raised.value)


def test_addresses_are_accepted() -> None:
    """Whether they are this machine's is known when the sink is opened."""
    for host in ("localhost", "127.0.0.1", "0.0.0.0", "::1", "node-7.cluster.example", "my_host"):
        Prometheus(host=host).check()


def test_an_unknown_host_name_is_retried(serve: Any) -> None:
    """A name service may be down for a moment."""
    with pytest.raises(OSError, match=r"cannot listen on no-such-host\.invalid"):
        serve(host="no-such-host.invalid")


def test_the_folder_tells_the_address_in_the_format_of_discovery(serve: Any, tmp_path: Path) -> None:
    """With port 0 it is the only way to find the page; it is removed with the page."""
    writer = serve(run_dir=tmp_path / "run")
    (file,) = tmp_path.glob("prometheus-*.json")  # as Prometheus may be told: a wildcard in the last part alone
    groups = json.loads(file.read_text())
    assert f"http://{groups[0]['targets'][0]}/metrics" == writer.url
    assert "run_id" not in groups[0]["labels"]  # Prometheus would rename the page's own
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_only_the_file(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The page is served, and the log says where."""
    writer = serve(run_dir=tmp_path / "missing" / "run")
    assert Page(writer.url)("steps_total") == 0
    assert f"its address, {writer.url}" in caplog.text
    writer.close()


def test_the_final_state_of_a_run_that_is_scraped_is_scraped(serve: Any, story: Any) -> None:
    """The page stays until then; one that was never scraped is not waited for."""
    serve(linger_s=WAIT_S).close()
    writer = serve(linger_s=WAIT_S)
    writer.write([story.started()])
    assert Page(writer.url)("run_state", state="running") == 1
    writer.write([story(RunEnded, status="finished")])
    closing = threading.Thread(target=writer.close)
    closing.start()
    assert writer._server.closing.wait(WAIT_S)
    assert closing.is_alive()
    assert Page(writer.url)("run_state", state="finished") == 1
    closing.join(WAIT_S)
    assert not closing.is_alive()


def test_a_client_that_hangs_keeps_neither_others_nor_the_end_waiting(serve: Any, story: Any) -> None:
    """A foreign connection must not delay a run's end."""
    writer = serve()
    host, port = writer.url.removeprefix("http://").removesuffix("/metrics").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET /metr")
        writer.write([story.started(), *story.steps(1)])
        # Sooner than a hanging client is given up.
        assert Page(writer.url, timeout_s=REQUEST_S / 2)("steps_total") == 1
        writer.close()


def test_clients_that_send_nothing_take_neither_descriptors_nor_threads(serve: Any, story: Any) -> None:
    """Each replaces another one, and a scrape is still answered."""
    writer = serve()
    writer.write([story.started(), *story.steps(1)])
    port = writer._server.server_port
    with contextlib.ExitStack() as clients:
        for sent in [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nx: "] * 20:
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S))
            with contextlib.suppress(OSError):
                client.sendall(sent)
        assert Page(writer.url, timeout_s=REQUEST_S / 2)("steps_total") == 1
        assert len(writer._server._deadlines) <= prometheus_module._MOST_CONNECTIONS + 2


def test_a_request_that_trickles_is_not_waited_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is that of the whole request, not of each byte."""
    monkeypatch.setattr(prometheus_module, "REQUEST_S", 0.5)
    port = serve()._server.server_port
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
        client.settimeout(0.05)
        closed = False
        while not closed and time.monotonic() < began + WAIT_S:
            try:
                client.sendall(b"G")
                closed = client.recv(1) == b""
            except TimeoutError:
                pass
            except OSError:
                closed = True
    assert closed


def test_without_descriptors_it_pauses_and_answers_later(run_python: Any) -> None:
    """An accept that fails with EMFILE is not repeated at once, and clients leave a reserve."""
    script = (
        "import os, resource, socket, time\nfrom urllib.request import urlopen\n"
        "from events.sink import RunInfo\nfrom sinks import Prometheus\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))\n"
        "writer = Prometheus(port=0, linger_s=0).open(RunInfo('demo'))\n"
        "port = writer._server.server_port\n"
        "urlopen(writer.url).read()\n"
        "clients = [socket.socket() for _ in range(8)]\nheld = []\n"
        "try:\n    while True: held.append(open('/dev/null'))\nexcept OSError: pass\n"
        "for one in clients: one.connect(('127.0.0.1', port))\n"
        "before = time.process_time()\ntime.sleep(1.5)\n"
        "print(time.process_time() - before < 0.7)\n"
        "held.clear()\nprint(b'stagecast_steps_total' in urlopen(writer.url).read())\nwriter.close()\n"
    )
    result = run_python(script)
    assert result.stdout.split() == ["True", "True"]
    assert result.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9464", 200),
        ("127.0.0.1", 200),
        ("10.1.2.3:9464", 200),
        ("[fd00::1]:9464", 200),
        ("trainer.internal", 200),
        ("evil.example", 421),
        ("[localhost]x.evil.example", 421),
        ("127.0.0.1.evil.example:9464", 421),
    ],
)
def test_only_names_of_this_machine_are_answered(serve: Any, host: str, status: int) -> None:
    """A web page whose name was made to lead here (DNS rebinding) does not read the numbers."""
    writer = serve(hosts=("trainer.internal",))
    with socket.create_connection(("127.0.0.1", writer._server.server_port), timeout=WAIT_S) as client:
        client.sendall(f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert int(client.makefile("rb").readline().split()[1]) == status


# -------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("openmetrics", [False, True])
def test_strange_names_arrive_as_they_are(serve: Any, story: Any, openmetrics: bool) -> None:
    """Names are strangers' text: none may break the page or become another's."""
    writer = serve(run_id='a "run"\\\n')
    writer.write([story(MetricsLogged, metrics={name: float(i) for i, name in enumerate(STRANGE)})])
    page = Page(writer.url, openmetrics)
    assert [page.metric(name) for name in STRANGE] == list(range(len(STRANGE)))
    assert page.run_ids == {'a "run"\\\n'}


def test_names_that_are_no_utf8_or_endless_do_not_break_the_page(serve: Any, story: Any) -> None:
    """A page that cannot be encoded would answer 500 for ever; long names are cut, and stay two."""
    writer = serve(run_id="r\udc80")
    writer.write([story(MetricsLogged, metrics={"\udcff": 1.0, "x" * 100_000: 2.0, "x" * 100_001: 3.0})])
    writer.write([story(MetricsLogged, metrics={"?": 4.0, "\udcfe" * 256: 5.0})])
    page = Page(writer.url)
    assert (page.metric("\\udcff"), page.metric("?")) == (1.0, 4.0)
    assert page.run_ids == {"r\\udc80"}
    assert sorted(page.family("metric", "name").values()) == [1, 2, 3, 4, 5]
    assert max(map(len, page.family("metric", "name"))) == 256
    assert len(page.text) < 20_000


def test_repeated_events_count_once(serve: Any, story: Any) -> None:
    """Delivery is at least once. NaN and infinities are shown: a loss of NaN may raise an alert."""
    writer = serve()
    steps = story.steps(3)
    writer.write(steps)
    writer.write([*steps, *story.steps(1)])
    writer.write([story(MetricsLogged, metrics={"a": math.nan, "b": math.inf, "c": -math.inf})])
    page = Page(writer.url)
    assert (page("steps_total"), page("step_seconds_count"), page("global_step")) == (4, 4, 4)
    assert math.isnan(page.metric("a") or 0)
    assert (page.metric("b"), page.metric("c")) == (math.inf, -math.inf)


def test_names_beyond_the_limit_are_skipped_with_one_warning(
    serve: Any, story: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A name with the step in it must not fill Prometheus; the known ones go on."""
    writer = serve(max_names=2)
    for step in range(5):
        writer.write([story(MetricsLogged, metrics={"loss": float(step), f"at/{step}": 1.0})])
    page = Page(writer.url)
    assert page.family("metric", "name").keys() == {"loss", "at/0"}
    assert page.metric("loss") == 4.0
    assert page("metric_values_left_out_total") == 4
    assert caplog.text.count("skips 'at/1'") == 1
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_a_resumed_run_shows_its_place_and_counts_what_this_process_did(serve: Any, story: Any) -> None:
    """Counters of a new process start at zero, which Prometheus handles; the step continues."""
    story.attempt, story.seq, story.global_step, story.epoch = 2, 500, 40, 3
    writer = serve()
    writer.write([story.started(), story(RunResumed, checkpoint="step-40.a1", after_seq=400), *story.steps(2)])
    page = Page(writer.url)
    assert (page("global_step"), page("epoch"), page("steps_total")) == (42, 3, 2)
    assert page.family("run_info", "attempt") == {"2": 1}


def test_an_attempt_that_comes_behind_another_begins_to_count_anew(serve: Any, story: Any) -> None:
    """A replay's page, or a host's that has the rest of the attempt before, is that of a process that was restarted."""
    first = [story.started(), *story.steps(5), story(MetricsLogged, metrics={"a": 1.0})]
    first += [story(LedgerReported, ledger=StallLedger(data_s=4.0), scope="run")]
    story.attempt = 2
    writer = serve(max_names=3)
    writer.write([*first, story.started(), *story.steps(2), story(MetricsLogged, metrics={"b": 1.0})])
    page = Page(writer.url)
    assert (page("global_step"), page("steps_total"), page("step_seconds_count")) == (7, 2, 2)
    assert page.family("ledger_seconds_total", "row")["data"] == 0
    assert page.family("run_info", "attempt") == {"2": 1}
    assert page.family("metric", "name").keys() == {"train_loss", "step_s", "b"}


def test_late_news_of_an_earlier_step_does_not_move_the_run_back(serve: Any, story: Any) -> None:
    """A checkpoint is announced with its own step, long passed by then."""
    writer = serve()
    steps = story.steps(9)
    story.global_step = 5
    writer.write([*steps, story(CheckpointSaved, checkpoint="step-5.a1", path="/x")])
    page = Page(writer.url)
    assert page("global_step") == 9
    assert page("checkpoint_saved_timestamp_seconds") == story.time


def test_failures_are_counted_though_only_the_first_and_last_are_published(serve: Any, story: Any) -> None:
    """Three failures and a recovery, nine until it is disabled, one more in closing."""
    writer = serve()
    fail = {"observer": "Nice", "error": "OSError: no"}
    writer.write([story(ObserverFailed, **fail, action="retrying", failures=1)])
    assert Page(writer.url)("observer_up", observer="Nice") == 0
    writer.write([story(ObserverRecovered, observer="Nice", failures=3)])
    assert Page(writer.url)("observer_up", observer="Nice") == 1
    for action, failures in (("retrying", 1), ("disabled", 9), ("disabled", 1)):
        writer.write([story(ObserverFailed, **fail, action=action, failures=failures)])
    page = Page(writer.url)
    assert (page("observer_failures_total", observer="Nice"), page("observer_up", observer="Nice")) == (13, 0)


def test_what_was_dropped_is_counted_by_observer(serve: Any, story: Any) -> None:
    """Each report tells what came since the one before."""
    writer = serve()
    writer.write([story(ObserverDropped, observer="bus", dropped=2), story(ObserverDropped, observer="A", conflated=7)])
    writer.write([story(ObserverDropped, observer="bus", dropped=3)])
    page = Page(writer.url)
    assert page("observer_dropped_total", observer="bus") == 5
    assert page("observer_conflated_total", observer="A") == 7


def test_checkpoints_are_counted_by_their_outcome(serve: Any, story: Any) -> None:
    """A failed upload is not a lost checkpoint; all outcomes exist from the start, for rates and alerts."""
    writer = serve()
    writer.write(
        [
            story(CheckpointSaved, checkpoint="step-1.a1", path="/x"),
            story(CheckpointUploaded, checkpoint="step-1.a1", url="s3://x"),
            story(CheckpointFailed, checkpoint="step-2.a1", error="ENOSPC"),
            story(CheckpointFailed, checkpoint="step-1.a1", error="403", during="upload"),
        ]
    )
    page = Page(writer.url)
    told = {outcome: page("checkpoints_total", outcome=outcome) for outcome in ("saved", "failed", "upload_failed")}
    assert told == {"saved": 1, "failed": 1, "upload_failed": 1}
    assert page("checkpoints_total", outcome="skipped") == 0


def test_the_ledger_adds_up_and_ends_with_the_whole(serve: Any, story: Any) -> None:
    """Intervals are added; the report of the whole run includes what came after the last of them."""
    writer = serve()
    interval = StallLedger(wall_s=3.0, compute_s=2.0, data_s=1.0)
    writer.write([story(LedgerReported, scope="interval", ledger=interval) for _ in range(2)])
    assert Page(writer.url)("ledger_seconds_total", row="compute") == 4.0
    whole = StallLedger(wall_s=7.0, compute_s=5.0, data_s=2.0, device_idle_s=0.5)
    writer.write([story(LedgerReported, scope="run", ledger=whole)])
    page = Page(writer.url)
    rows = {
        dict(labels)["row"]: v for (name, labels), v in page.samples.items() if name.endswith("ledger_seconds_total")
    }
    assert rows["compute"] == 5.0
    assert sum(rows.values()) == 7.0
    assert page("device_idle_seconds_total") == 0.5
    assert page.metric("ledger/compute_s") is None


def test_one_state_is_one_and_the_others_zero(serve: Any, story: Any) -> None:
    """So that a query for a state never finds nothing."""
    writer = serve()
    seen = []
    for event in (
        story.started(),
        story(CommandTaken, command="pause", command_id="1"),
        story(CommandTaken, command="resume", command_id="2"),
        story(RunEnded, status="failed", reason="ValueError: no"),
    ):
        writer.write([event])
        page = Page(writer.url)
        states = page.family("run_state", "state")
        assert sorted(states.values()) == [0, 0, 0, 0, 0, 1]
        seen.append(max(states, key=lambda state: states[state]))
    assert seen == ["running", "paused", "running", "failed"]


def test_families_have_the_types_that_queries_need(serve: Any, story: Any) -> None:
    """A rate over a gauge is a mistake that Prometheus cannot see."""
    writer = serve()
    story.global_step = 0
    writer.write(
        [
            story(TrainEpochStarted),
            *story.steps(1, step_s=0.001),
            *story.steps(1, step_s=0.002),
            *story.steps(1, step_s=1e6),
            story(TrainStepEnded, loss=1.0, rows=8, step_s=0.3),
            story(ValEpochEnded, key="dev", loss=0.5),
        ]
    )
    page = Page(writer.url, openmetrics=True)
    kinds = {name: page.kinds[f"stagecast_{name}"] for name in ("metric", "epoch", "steps", "rows", "step_seconds")}
    assert list(kinds.values()) == ["gauge", "gauge", "counter", "counter", "histogram"]
    assert page("rows_total") == 8
    assert page.metric("val_loss/dev") == 0.5
    buckets = {le: page("step_seconds_bucket", le=le) for le in ("0.001", "0.0025", "0.25", "0.5", "300.0", "+Inf")}
    assert buckets == {"0.001": 1, "0.0025": 2, "0.25": 2, "0.5": 3, "300.0": 3, "+Inf": 4}


def test_a_scrape_may_ask_for_some_families(serve: Any, story: Any) -> None:
    """As Prometheus does with ``params: name[]``."""
    writer = serve()
    writer.write(story.steps(2))
    page = Page(f"{writer.url}?name[]=stagecast_steps_total")
    assert list(page.samples.values()) == [2]


def test_two_runs_in_one_program_have_two_pages_and_leave_the_programs_own_alone(serve: Any, story: Any) -> None:
    """A service that trains has a registry, and a page, of its own."""
    before = {family.name for family in REGISTRY.collect()}
    one, two = serve(run_id="one"), serve(run_id="two")
    one.write(story.steps(3))
    assert (Page(one.url)("steps_total"), Page(two.url)("steps_total")) == (3, 0)
    assert (Page(one.url).run_ids, Page(two.url).run_ids) == ({"one"}, {"two"})
    assert {family.name for family in REGISTRY.collect()} == before


def test_a_program_of_several_processes_does_not_get_our_numbers(run_python: Any, tmp_path: Path) -> None:
    """Under gunicorn the client's own counters would write files, and show up on the service's page."""
    folder = tmp_path / "shared"
    folder.mkdir()
    script = (
        "from events.messages import TrainStepEnded\nfrom events.sink import RunInfo\nfrom sinks import Prometheus\n"
        "from urllib.request import urlopen\n"
        "writer = Prometheus(port=0).open(RunInfo('demo'))\n"
        "writer.write([TrainStepEnded('demo', 1, 1, 0.0, 0, 1, 0, 'train')])\n"
        "print('stagecast_steps_total{run_id=\"demo\"} 1.0' in urlopen(writer.url).read().decode())\nwriter.close()\n"
    )
    result = run_python(script, PROMETHEUS_MULTIPROC_DIR=str(folder))
    assert (result.stdout.strip(), result.stderr) == ("True", "")
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------- a run, scraped


class Scrape(CallbackInterface):
    """At the end of each epoch: holds the loop until the page shows its step."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir.parent / f"prometheus-{run_dir.name}.json"
        self.pages: list[Page] = []

    @inline
    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        wait_until(lambda: self.scrape()("steps_total") == global_step, "the page does not show the step")

    def scrape(self) -> Page:
        wait_until(self.file.exists, "the address is not announced")
        self.pages.append(Page(f"http://{json.loads(self.file.read_text())[0]['targets'][0]}/metrics"))
        return self.pages[-1]


def test_a_run_can_be_scraped_while_it_trains(tmp_path: Path) -> None:
    """The real trainer: every step is counted, what was logged is there, and nothing is left behind."""
    scrape = Scrape(tmp_path / "run")
    memory, own = Memory(), {"run_id": "läuft", "run_dir": tmp_path / "run", "journal": True}
    train(Prometheus(port=0, linger_s=0), memory, callbacks=[scrape], **own)
    last = scrape.pages[-1]
    assert last.run_ids == {"läuft"}
    assert (last("global_step"), last("epoch"), last("step_seconds_count")) == (10, 1, 10)
    assert last("run_state", state="running") == 1
    assert last.metric("größe/π") == 1.5
    assert last.metric("train_loss") == memory.of(TrainStepEnded)[-1].loss
    assert memory.of(ObserverFailed) == []
    assert not scrape.file.exists()
