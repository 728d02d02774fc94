"""Events in a real NATS server: each once and in order, whatever happens to the server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.nats_server import NatsServer, StartNats, credentials
from support.threads import wait_until
from support.training import Net, make_trainer, read_journal

from events.errors import SinkMisconfigured
from events.journal.lines import decode_line, encode_lines
from events.journal.writer import Journal
from events.messages import Event, JournalGap, MetricsLogged, ObserverFailed, ObserverRecovered, RunStarted
from events.protocol import Pause
from events.run.folder import RunFolder
from events.run.inbox import Inbox
from events.sink import RunInfo
from events.wire import encode_command, encode_json
from sinks import NATS
from sinks.continued import WINDOW
from sinks.nats import publisher as nats_publisher
from sinks.nats.address import NatsAddress, is_nats_address
from sinks.nats.client import NatsClient
from sinks.nats.order import InOrder
from sinks.testing import Story, check_sink, opened

pytest.importorskip("nats")
pytestmark = pytest.mark.usefixtures("no_nats_client_is_left")


def events_of(server: NatsServer, run_id: str) -> list[Event]:
    return [decode_line(line)[0] for line in server.stored(run_id)]


def admin(server: NatsServer, work: Callable[[Any], Any]) -> Any:
    """Run a coroutine with nats-py's JetStream manager."""
    client = NatsClient.connected(NatsAddress.of(server.url))
    try:
        return client.call(work(client.core.jsm()), 10)
    finally:
        client.close()


# ------------------------------------------------------------------------------------------------ the format


def test_the_sink_keeps_the_rules_of_sinks(nats_server: NatsServer, tmp_path: Path) -> None:
    """See `sinks.testing.check_sink`."""
    check_sink(NATS(nats_server.url), written=lambda: nats_server.stored("demo"), run_dir=tmp_path)


def test_messages_are_lines_of_the_journal_under_subjects_of_the_run(nats_server: NatsServer) -> None:
    """Any program can read them; the header is the identity by which the server drops repeated ones."""
    name = "lr 1e-3.v2 *>/größe"
    story = Story(name)
    events: list[Event] = [story.started(), *story.steps(2)]
    story.seq += 5  # of events that the journal does not keep
    events += story.steps(1)
    with opened(NATS(nats_server.url), run_id=name) as write:
        write(events)
    assert nats_server.stored(name) == encode_lines(events, 0).splitlines()

    async def first(manager: Any) -> Any:
        return await manager.get_msg(
            "stagecast", subject="stagecast.lr%201e-3%2Ev2%20%2A%3E%2Fgr%C3%B6%C3%9Fe.RunStarted"
        )

    message = admin(nats_server, first)
    assert message.headers == {"Nats-Msg-Id": "lr%201e-3%2Ev2%20%2A%3E%2Fgr%C3%B6%C3%9Fe/1/1"}
    assert NatsAddress.of(nats_server.url).run_of(message.subject) == name


def test_the_stream_has_the_limits_of_the_sink_that_creates_it(nats_server: NatsServer) -> None:
    """An existing stream keeps its own, and several runs share it."""
    url = f"{nats_server.url}?prefix=team.limits"
    for run_id, age in (("one", 3_600.0), ("two", 7_200.0)):
        with opened(NATS(url, max_age_s=age, max_bytes=2**20), run_id=run_id) as write:
            write([Story(run_id).started()])

    async def configured(manager: Any) -> Any:
        return (await manager.stream_info("team_limits")).config

    config = admin(nats_server, configured)
    assert (config.subjects, config.max_age, config.max_bytes) == (["team.limits.*.*"], 3_600.0, 2**20)
    assert (str(config.discard), str(config.storage), config.duplicate_window) == ("old", "file", 120.0)
    assert [len(nats_server.stored(run_id, url)) for run_id in ("one", "two")] == [1, 1]


def test_an_event_that_is_too_large_is_replaced_by_a_gap_with_a_warning(
    start_nats: StartNats, caplog: pytest.LogCaptureFixture
) -> None:
    """For the server, or for the stream alone; the events around it are sent."""
    server = start_nats("max_payload: 8192")
    story = Story()
    large = story(MetricsLogged, metrics={f"metric {index}": 1.0 for index in range(1_000)})
    with opened(NATS(server.url)) as write:
        write([large, *story.steps(1)])
    gap, step = events_of(server, "demo")
    assert isinstance(gap, JournalGap)
    assert (gap.seq, gap.first_seq, gap.last_seq, gap.lost, step.seq) == (1, 1, 1, 1, 2)
    assert "MetricsLogged: its line has" in gap.reason
    assert "raise its max_payload" in gap.reason
    assert [
        record.message for record in caplog.records if "NATS does not publish event 1, MetricsLogged" in record.message
    ]


# ------------------------------------------------------------------------------------------- servers that fail


def test_a_run_is_delivered_once_and_whole_though_the_server_is_killed(start_nats: StartNats, tmp_path: Path) -> None:
    """By the sink host, which reads the journal; the run takes its steps meanwhile, and reports the outage."""
    server = start_nats()
    run_dir = tmp_path / "run"
    seen: list[str] = []

    def journalled(kind: type[Event]) -> Callable[[], bool]:
        return lambda: any(isinstance(event, kind) for event in read_journal(run_dir))

    def act(step: int) -> None:
        if step == 3:
            wait_until(lambda: server.stored("demo"), "nothing has arrived")
            server.kill()
        elif step == 6:
            wait_until(journalled(ObserverFailed), "the outage was not reported")
            seen.append("failed")
        elif step == 9:
            server.start()
            wait_until(journalled(ObserverRecovered), "the recovery was not reported")
            seen.append("recovered")

    options = {"journal": True, "run_id": "demo", "run_dir": run_dir, "epochs": 6, "ledger_interval_s": 0.1}
    result = make_trainer(Net(act=act), sinks=[NATS(server.url)], **options).train()
    assert (result.status, seen, result.problems) == ("finished", ["failed", "recovered"], [])
    kept = read_journal(run_dir)
    stored = events_of(server, "demo")
    assert len(stored) > 20
    assert stored == kept[: len(stored)]
    report = next(one for one in result.observers if one.observer == "nats")
    assert (report.state, report.left, report.dropped) == ("closed", 0, 0)
    failed = next(event for event in kept if isinstance(event, ObserverFailed))
    assert failed.error.startswith("ConnectionError: no NATS server at nats://127.0.0.1") or "closed" in failed.error


@pytest.mark.parametrize("known_s", [120.0, 0.1], ids=["within", "after"])
def test_a_window_that_was_stored_in_part_is_not_stored_twice(
    start_nats: StartNats, monkeypatch: pytest.MonkeyPatch, known_s: float
) -> None:
    """Within the time for which the server knows identities, and after it: then the newest stored event decides."""
    monkeypatch.setattr(nats_publisher, "_DUPLICATE_WINDOW_S", known_s)
    server = start_nats()
    story = Story()
    taken = nats_publisher.Publisher._take
    count = 0

    async def take(self: Any, message: Any) -> None:
        """Lose the answers behind the first hundred, with the connection."""
        nonlocal count
        count += 1
        if count <= 100 or server.starts > 1:
            await taken(self, message)
        elif count == 101:
            server.kill()

    monkeypatch.setattr(nats_publisher.Publisher, "_take", take)
    with opened(NATS(server.url)) as write:
        events = story.steps(2_000)
        with pytest.raises(ConnectionError):
            write(events)
        server.start()
        if known_s < 1.0:
            threading.Event().wait(2 * known_s)  # time is what is tested
        write(events)
    assert [event.seq for event in events_of(server, "demo")] == [event.seq for event in events]


def test_a_server_that_hangs_fails_a_write_in_bounded_time(
    start_nats: StartNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes the same events when it wakes up."""
    server = start_nats()
    story = Story()
    with opened(NATS(server.url)) as write:
        monkeypatch.setattr(nats_publisher, "ANSWER_S", 0.3)
        server.hang()
        events = story.steps(10)
        with pytest.raises(ConnectionError, match=r"has not acknowledged 10 events in 0\.3 s"):
            write(events)
        server.wake()
        monkeypatch.setattr(nats_publisher, "ANSWER_S", 10.0)
        write(events)
        server.hang()  # the end of the block disconnects
    server.wake()
    assert [event.seq for event in events_of(server, "demo")] == [*range(1, 11)]


def test_a_stream_that_is_full_or_removed_is_named_and_tried_again(start_nats: StartNats) -> None:
    """A refused event is stored behind later ones; readers put it in its place."""
    server = start_nats()
    story = Story()

    async def create(manager: Any) -> None:
        await manager.add_stream(name="mine", subjects=["stagecast.>"], discard="new", max_bytes=2_000)

    async def enlarge(manager: Any) -> None:
        await manager.update_stream(name="mine", subjects=["stagecast.>"], discard="new", max_bytes=100_000)

    async def remove(manager: Any) -> None:
        await manager.delete_stream("mine")

    admin(server, create)
    with opened(NATS(server.url)) as write:
        write(story.steps(1))
        events: list[Event] = [story(MetricsLogged, metrics={"a" * 2_000: 1.0}), *story.steps(2)]
        with pytest.raises(ConnectionError, match="does not take events: maximum bytes exceeded"):
            write(events)
        admin(server, enlarge)
        write(events)
        assert [event.seq for event in events_of(server, "demo")] == [1, 3, 4, 2]
        order = InOrder("demo")
        assert [event.seq for line in server.stored("demo") for event in order.add(line, 0.0)] == [1, 2, 3, 4]
        admin(server, remove)
        last = story.steps(1)
        with pytest.raises(ConnectionError, match=r"no stream keeps stagecast\.\*\.\*"):
            write(last)
        write(last)
        assert [event.seq for event in events_of(server, "demo")] == [5]


def test_without_jetstream_or_a_server_the_sink_names_what_to_do(start_nats: StartNats) -> None:
    """Both may come later, so the sink is tried again."""
    server = start_nats(jetstream=False)
    with pytest.raises(ConnectionError, match="JetStream does not answer; start nats-server with -js"):
        NATS(server.url).open(RunInfo("demo"))
    server.kill()
    with pytest.raises(ConnectionError, match=r"no NATS server at nats://127\.0\.0\.1:.*: Connection refused"):
        NATS(server.url).open(RunInfo("demo"))


def test_a_stream_that_the_server_refuses_disables_the_sink(start_nats: StartNats, tmp_path: Path) -> None:
    """Its disk may be smaller than the stream's limit."""
    server = start_nats(f"jetstream {{ store_dir: '{tmp_path}/js', max_file_store: 1048576 }}", jetstream=False)
    with pytest.raises(SinkMisconfigured, match=r"refuses to create the stream stagecast: .*max_bytes=.*fits"):
        NATS(server.url).open(RunInfo("demo"))
    with opened(NATS(server.url, max_bytes=2**19)) as write:
        write(Story().steps(1))


def test_a_resumed_run_sends_what_an_earlier_attempt_has_not(nats_server: NatsServer, tmp_path: Path) -> None:
    """Its process may have died before the sink had its last events, which are in the journal."""
    story = Story("resumed")
    events: list[Event] = [story.started(), *story.steps(20), *story.resumed(), *story.steps(3)]
    journal = Journal().open(RunInfo("resumed", run_dir=str(tmp_path)))
    journal.write(events)
    journal.close()
    for attempt, some in ((1, events[:5]), (2, events[21:])):
        with opened(NATS(nats_server.url), run_id="resumed", attempt=attempt, run_dir=tmp_path) as write:
            write(some)
    assert events_of(nats_server, "resumed") == events


# ------------------------------------------------------------------------------------------------ one name, two runs


def test_a_second_run_of_one_name_is_refused(nats_server: NatsServer) -> None:
    """One that comes later is known by its time, one at the same time by its events; the first run is unharmed."""
    story = Story("twice")
    events: list[Event] = [story.started(), *story.steps(5)]
    with opened(NATS(nats_server.url), run_id="twice") as write:
        write(events)
    later = Story("twice")
    later.time += 100.0
    for first in (later.started(), *later.steps(1)):
        with (
            opened(NATS(nats_server.url), run_id="twice") as write,
            pytest.raises(SinkMisconfigured, match="another run_id"),
        ):
            write([first])
    with opened(NATS(nats_server.url), run_id="both") as one, opened(NATS(nats_server.url), run_id="both") as other:
        both, same = Story("both"), Story("both")
        same.time += 0.5
        one([both.started()])
        with pytest.raises(SinkMisconfigured, match="another run with the run_id 'both'"):
            other([same.started()])
    stepped_back = [msgspec.structs.replace(event, time=event.time + 50.0) for event in events[:-1]]  # by the clock
    with opened(NATS(nats_server.url), run_id="twice") as write:
        write([*stepped_back, events[-1]])
    assert events_of(nats_server, "twice") == events


# ---------------------------------------------------------------------------------------------------- access


def test_credentials_and_tls_with_an_own_authority(start_nats: StartNats, tmp_path: Path) -> None:
    """Without either the server refuses, and the sink is disabled, with the reason."""
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    access, creds = credentials(tmp_path)
    server = start_nats(f"{access}\ntls {{ cert_file: '{certificate}', key_file: '{key}' }}")
    url = server.url.replace("nats://", "tls://")
    sink = NATS(f"{url}?creds={creds}&ca={certificate}")
    check_sink(sink, run_dir=tmp_path)
    assert server.stored("demo", sink.url)
    with pytest.raises(SinkMisconfigured, match=r"refuses: .*certificate verify failed.*give a valid token"):
        NATS(f"{url}?creds={creds}").open(RunInfo("demo"))
    with pytest.raises(SinkMisconfigured, match=r"refuses: .*[Aa]uthorization"):
        NATS(f"{url}?ca={certificate}").open(RunInfo("demo"))
    with pytest.raises(SinkMisconfigured, match=r"holds no credentials; give the file that nsc has written"):
        NATS(f"{url}?creds={certificate}&ca={certificate}").open(RunInfo("demo"))
    with pytest.raises(SinkMisconfigured, match="give a certificate in PEM form"):
        NATS(f"{url}?creds={creds}&ca={creds}").open(RunInfo("demo"))


def test_tokens_and_passwords_reach_the_server_and_no_message(start_nats: StartNats) -> None:
    """In an error, a description and a traceback the address has none."""
    server = start_nats("authorization { token: 's3cr/t' }")
    host = server.url.removeprefix("nats://")
    with opened(NATS(f"nats://s3cr%2Ft@{host}")) as write:
        write(Story().steps(1))
    for wrong in (f"nats://guess@{host}", server.url, f"nats://me:guess@{host}"):
        with pytest.raises(SinkMisconfigured, match=r"refuses: .*[Aa]uthorization") as caught:
            NATS(wrong).open(RunInfo("demo"))
        assert "guess" not in str(caught.value) + repr(NATS(wrong)) + repr(list(NATS(wrong).__rich_repr__()))


def test_a_server_without_tls_gets_no_token_that_was_meant_for_one_with_tls() -> None:
    """Whoever answers in its place could say that TLS is not needed, and nats-py would believe it."""
    said = bytearray()

    def answer(listening: socket.socket) -> None:
        for _ in range(2):
            peer, _ = listening.accept()
            with peer:
                peer.sendall(b'INFO {"server_id":"x","version":"2.9.10","max_payload":9,"auth_required":true}\r\n')
                while data := peer.recv(4_096):
                    said.extend(data)
                    if b"PING" in data:
                        peer.sendall(b"PONG\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, args=(listening,), daemon=True).start()
        host = f"s3cret@127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(SinkMisconfigured, match="the server does not offer TLS"):
            NATS(f"tls://{host}").open(RunInfo("demo"))
        assert b"s3cret" not in said
        NatsClient.connected(NatsAddress.of(f"nats://{host}")).close()  # as far as it was meant for that
        assert b"s3cret" in said


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"INFO []\r\n",
        b"INFO " + b"[" * 100_000 + b"\r\n",
        b'INFO {"max_payload":9}\r\nPONG\r\nMSG zz\r\n',
        b"",
    ],
)
def test_something_that_is_not_a_nats_server_is_tried_again(answer: bytes) -> None:
    """Whatever it answers, as it may be starting, or the port another's for a while."""

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listening.accept()
                with peer:
                    peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        with pytest.raises(ConnectionError, match=r"nats://127\.0\.0\.1:\d+: "):
            NATS(f"nats://127.0.0.1:{listening.getsockname()[1]}").open(RunInfo("demo"))
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://host", "is not the address of a NATS server; give one like nats://HOST:4222"),
        ("nats://", "is not the address"),
        ("nats://user:pa/ss@host", r"'nats://\.\.\.@host' is not the address"),
        ("nats://host:99999", "is not the address"),
        ("nats://host?speed=fast", "'speed' is not an option of a NATS address; known are creds, ca, prefix"),
        ("nats://host?prefix=a..b", "prefix='a..b' is not a subject"),
        ("nats://host?creds=/nowhere.creds", "creds='/nowhere.creds' is not a file"),
        ("nats://host/run", "the address names a run, 'run', but the sink publishes its own; remove it"),
        (7, "'7' is not the address"),
    ],
)
def test_a_wrong_address_is_refused_before_the_run(url: Any, problem: str) -> None:
    """The message names it without its secrets."""
    with pytest.raises(SinkMisconfigured, match=problem) as caught:
        NATS(url).check()
    assert "pa/ss" not in str(caught.value)
    assert is_nats_address(url) == (isinstance(url, str) and url.startswith("nats://"))


# -------------------------------------------------------------------------------------------------- commands


def test_commands_reach_the_run_if_the_sink_takes_them(nats_server: NatsServer, tmp_path: Path) -> None:
    """Every request is answered, with the reason if it was refused."""
    address = NatsAddress.of(nats_server.url)
    taken: list[Any] = []

    class Loop:
        def send(self, command: Any) -> None:
            taken.append(command)

    client = NatsClient.connected(address)

    def ask(data: bytes) -> Any:
        answer = client.call(client.request(address.commands("my.run"), data, 5.0))
        return None if answer is None else msgspec.json.decode(answer)

    pause = encode_command(Pause(id="1"))
    try:
        assert ask(pause) is None
        folder = RunFolder.open(tmp_path / "run", "my.run")
        inbox = Inbox(folder.path, Loop(), 0)
        inbox.start()
        with opened(NATS(nats_server.url), run_id="my.run", run_dir=folder.path):
            assert ask(b"") == {}
            assert ask(pause)["reason"] == "the sink takes no commands; it needs NATS(commands=True)"
        with opened(NATS(nats_server.url, commands=True), run_id="my.run", run_dir=folder.path):
            assert ask(pause) == {"type": "sent", "id": "1"}
            assert taken == [Pause(id="1")]
            assert ask(b"{")["reason"].startswith("not a command")
            inbox.stop()
            folder.close()
            refused = ask(pause)
            assert (refused["type"], refused["status"]) == ("refused", 409)
            assert "no run is under way" in refused["reason"]
    finally:
        client.close()


# -------------------------------------------------------------------------------------------- order, without a server


def lines_of(events: Sequence[Event], previous: int = 0) -> list[bytes]:
    return encode_lines(events, previous).splitlines()


def test_readers_restore_the_order_and_drop_repeats() -> None:
    """Also of events between which the journal keeps none."""
    story = Story()
    events: list[Event] = [story.started(), *story.steps(3)]
    story.seq += 10
    events += story.steps(3)
    lines = lines_of(events)
    order = InOrder("demo")
    shuffled = [lines[0], lines[0], lines[3], lines[2], lines[4], lines[1], lines[1], lines[6], lines[5]]
    assert [event for line in shuffled for event in order.add(line, 0.0)] == events
    assert order.cursor == events[-1].seq


def test_an_event_that_never_comes_becomes_a_gap() -> None:
    """At the start of what the stream has at once; later after half a minute, or a window of later events."""
    story = Story()
    events = story.steps(WINDOW + 20)
    lines = lines_of(events)
    order = InOrder("demo")
    gap, *rest = order.add(lines[4], 0.0)
    assert isinstance(gap, JournalGap)
    assert (gap.seq, gap.first_seq, gap.last_seq, gap.lost, rest) == (4, 1, 4, 4, [events[4]])
    assert order.add(lines[6], 1.0) == order.wait(30.0) == []
    assert [event.seq for event in order.wait(31.0)] == [6, 7]
    found = [event for line in lines[8:] for event in order.add(line, 32.0)]
    assert [event.seq for event in found] == [8, *range(9, len(events) + 1)]
    assert [type(event) is JournalGap for event in found[:2]] == [True, False]
    following = InOrder("demo", 5)  # has seen what stands before the cursor, so that a hole behind it is one
    assert following.add(lines[4], 0.0) == following.add(lines[6], 0.0) == []


def test_messages_that_are_not_of_the_run_are_skipped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Someone else's, and damaged ones; events of a later version pass."""
    story = Story()
    good = lines_of(story.steps(2))
    newer = good[0].split(b',"crc32"')[0].replace(b"TrainStepEnded", b"TrainStepFolded") + b"}"
    order = InOrder("demo")
    strange = [b"", b"hello", good[0][:-10] + b'00000000"}', encode_json(Story("other").started())]
    assert [event for line in strange for event in order.add(line, 0.0)] == []
    assert [event.seq for line in (newer, good[1]) for event in order.add(line, 0.0)] == [1, 2]
    assert (
        len([one for one in caplog.records if "a message of run 'demo' in the stream is skipped" in one.message]) == 1
    )


def test_a_call_to_a_closed_client_fails_at_once(nats_server: NatsServer) -> None:
    """On whichever thread; closing twice is harmless."""
    client = NatsClient.connected(NatsAddress.of(nats_server.url))
    waiting = client.submit(asyncio.sleep(60))
    closing = threading.Thread(target=client.close)
    closing.start()
    closing.join()
    client.close()
    assert waiting.cancelled()
    with pytest.raises(ConnectionError, match="was closed"):
        client.call(asyncio.sleep(0))
    assert client.is_lost
    assert RunStarted.journalled
