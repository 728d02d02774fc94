"""Sinks in a process of their own: the events that they receive when they, the process, or the run fails."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import anyio
import msgspec
import pytest
from support.scripts import Start
from support.threads import WAIT_S, wait_until, wait_until_failed
from support.training import Memory, Net, Outcome, hooked, make_trainer, read_journal, train

from events.errors import SinkHostFailed
from events.messages import Event, ObserverFailed, ObserverHealth, ObserverRecovered, ObserversReported, ValStepEnded
from events.protocol import ObserverReport
from events.safe_files import open_lock_below
from events.sink import Delivery, RunInfo
from sinks.host import child as host_child
from sinks.host import process as host_process
from trainer.errors import ArgumentsError

HOSTED = Path(__file__).parent / "hosted"


class Line(msgspec.Struct, frozen=True):
    """A line that a `Witness` has written."""

    pid: int
    attempt: int
    seq: int
    kind: str


class Bench:
    """Runs with sinks of `hosted_sinks` in a sink host, and what these have written."""

    def __init__(self, folder: Path, sinks: Any) -> None:
        self.sinks = sinks
        self.folder, self.run_dir = folder, folder / "run"

    def witness(self, name: str = "out", behaviour: str = "") -> Any:
        return self.sinks.Witness(str(self.folder / name), behaviour)

    def options(self, *sinks: Any, **options: Any) -> dict[str, Any]:
        given = {"run_dir": self.run_dir, "run_id": "run", "journal": True, "sinks_in": "process"}
        return given | {"sinks": sinks or (self.witness(),)} | options

    def train(self, *sinks: Any, module: Net | None = None, **options: Any) -> Outcome:
        return train(module or Net(), **self.options(*sinks, **options))

    def lines(self, name: str = "out") -> list[Line]:
        path, found = self.folder / name, []
        for line in path.read_text().splitlines() if path.exists() else ():
            pid, *rest = line.split()
            if rest != ["closed"] and len(rest) == 4:
                found.append(Line(int(pid), int(rest[0]), int(rest[1]), rest[2]))
        return found

    def seqs(self, name: str = "out") -> list[int]:
        return [line.seq for line in self.lines(name)]

    def closed(self, name: str = "out") -> bool:
        path = self.folder / name
        return path.exists() and path.read_text().endswith(" closed\n")

    @property
    def journal(self) -> list[Event]:
        return read_journal(self.run_dir)

    @property
    def kept(self) -> list[int]:
        return [event.seq for event in self.journal]

    @property
    def for_sinks(self) -> set[int]:
        """The events for every sink. Those about sinks at the end of the run are in the journal only."""
        about_sinks = ObserverFailed | ObserverRecovered | ObserversReported
        return {event.seq for event in self.journal if not isinstance(event, about_sinks)}


def report_of(outcome: Outcome, name: str = "witness") -> ObserverReport:
    return next(one for one in outcome.result.observers if one.observer == name)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.syspath_prepend(str(HOSTED))
    monkeypatch.delitem(sys.modules, "hosted_sinks", raising=False)
    import hosted_sinks  # type: ignore[import-not-found]

    return Bench(tmp_path, hosted_sinks)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def waiting_at_the_end(condition: Any) -> Any:
    """A module whose `on_end_train` waits."""
    return hooked("on_end_train", lambda *args: wait_until(condition, "nothing has arrived"), kind=Net)()


# ------------------------------------------------------------------------------------------------ bad input


class Plain:
    """No struct."""

    delivery: ClassVar[Delivery] = Delivery(runs_in="process")

    def open(self, run: Any) -> Any:
        raise NotImplementedError


def test_a_sink_that_cannot_be_sent_to_the_host_is_refused_when_the_trainer_is_built(bench: Bench) -> None:
    """The error names each with its reason; nothing is started or written."""

    class Local(msgspec.Struct, frozen=True):
        def open(self, run: Any) -> Any:
            raise NotImplementedError

    unkept = (bench.witness(), Delivery(types=frozenset({ValStepEnded}), runs_in="process"))
    with pytest.raises(ArgumentsError) as caught:
        make_trainer(Net(), **bench.options(Plain(), Local(), unkept, bench.witness("out-\udc80")))
    reasons = ("not a msgspec.Struct", "could not import it", "does not keep ValStepEnded", "surrogates not allowed")
    assert [reason for reason in reasons if reason not in str(caught.value)] == []
    with pytest.raises(ArgumentsError, match=r"Witness\) runs in the sink host, .* keep the journal"):
        make_trainer(Net(), sinks=[bench.witness()], sinks_in="process")
    with pytest.raises(ArgumentsError, match="'thread' or 'process'"):
        make_trainer(Net(), sinks_in="elsewhere")
    assert not (bench.folder / "out").exists()


def test_a_fatal_sink_that_cannot_be_opened_ends_the_run(bench: Bench) -> None:
    """As in the run's own process; the error has the text of its exception."""
    box: list[Any] = []
    entered = threading.Event()

    def act(global_step: int) -> None:
        assert entered.wait(WAIT_S)
        wait_until_failed(box[0])

    async def main() -> None:
        async with make_trainer(Net(act=act), **bench.options(bench.sinks.Unopenable())).run() as run:
            box.append(run)
            entered.set()

    with pytest.raises(SinkHostFailed, match="no such server"):
        anyio.run(main)


def test_a_sink_whose_import_exits_is_disabled_and_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are not affected."""
    (bench.folder / "quitter_sinks.py").write_text(
        "import sys, msgspec\n"
        "if sys.argv[0].endswith('host/child.py'):\n"
        "    sys.exit(7)\n"
        "class Quitter(msgspec.Struct, frozen=True):\n"
        "    def open(self, run): raise NotImplementedError\n"
    )
    monkeypatch.syspath_prepend(str(bench.folder))
    import quitter_sinks  # type: ignore[import-not-found]

    outcome = bench.train(quitter_sinks.Quitter(), bench.witness())
    assert (report_of(outcome).state, report_of(outcome).error) == ("closed", None)
    quitter = report_of(outcome, "quitter")
    assert quitter.state == "disabled"
    assert "cannot be built in the sink host: SystemExit(7)" in str(quitter.error)
    assert {*bench.seqs()} >= bench.for_sinks


# ---------------------------------------------------------------------------------------------- what arrives


def test_every_event_of_the_journal_arrives_once_and_in_order(bench: Bench) -> None:
    """From the first to the last, although the sink and its processes print."""
    outcome = bench.train(bench.witness(behaviour="noisy"), epochs=3)
    kept = bench.kept
    assert bench.seqs() == kept
    assert {line.pid for line in bench.lines()} - {os.getpid()} != set()
    assert bench.closed()
    report = report_of(outcome)
    assert (report.state, report.published, report.delivered, report.left) == ("closed", len(kept), len(kept), 0)
    log = (bench.run_dir / "sinks/host.log").read_text()
    assert {"what a sink prints", "and on stderr", "and what its processes print"} <= {*log.splitlines()}
    assert not is_alive(bench.lines()[0].pid)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_host_that_is_killed_is_started_again_and_continues(bench: Bench, backend: str) -> None:
    """No event is lost; only the batch of its death may be delivered twice."""
    box: list[Any] = []

    def act(global_step: int) -> None:
        if global_step == 5:
            wait_until(lambda: len(bench.lines()) >= 12, "nothing has arrived")  # more than a batch
            os.kill(box[0]._connection._session.observers.host.pid, signal.SIGKILL)

    async def main() -> Any:
        async with make_trainer(Net(act=act), **bench.options(epochs=3)).run() as run:
            box.append(run)
        return await run.result()

    result = anyio.run(main, backend=backend)
    assert {*bench.seqs()} >= bench.for_sinks
    assert len({line.pid for line in bench.lines()}) == 2
    assert len(bench.lines()) - len({*bench.seqs()}) <= 8
    (report,) = result.observers[-2:-1]
    assert (report.observer, report.state, report.published) == ("witness", "closed", report.delivered)
    assert report.delivered == len({*bench.seqs()})  # of both hosts
    failures = [event for event in bench.journal if isinstance(event, ObserverFailed)]
    assert [(event.observer, event.during, event.action) for event in failures] == [("witness", "host", "retrying")]
    assert "was killed by SIGKILL" in failures[0].error


def test_a_sink_that_takes_its_host_with_it_misses_nothing(bench: Bench) -> None:
    """Nor does its neighbour; the end of the run waits for the restarted host."""
    bench.train(bench.witness(behaviour="dies"), bench.witness("other"), epochs=4)
    for name in ("out", "other"):
        assert {*bench.seqs(name)} >= bench.for_sinks
        assert bench.closed(name)
    assert "about to die\n" in (bench.run_dir / "sinks/host.log").read_text()


def test_a_sink_whose_server_is_down_is_reported_and_recovers(bench: Bench) -> None:
    """The run publishes both events."""
    bench.train(bench.witness(behaviour="fails"), module=waiting_at_the_end(lambda: len(bench.lines()) > 5))
    assert {*bench.seqs()} >= bench.for_sinks
    told = bench.journal
    assert [event.error for event in told if isinstance(event, ObserverFailed)] == ["OSError: the server is down"]
    assert sum(isinstance(event, ObserverRecovered) for event in told) == 1


def test_a_host_that_always_dies_is_disabled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run finishes; the report names the exit code and where the rest of the events is."""
    monkeypatch.setattr(host_process, "_MOST_DEATHS", 2)
    outcome = bench.train(bench.witness(behaviour="mortal"))
    assert (outcome.result.status, report_of(outcome).state) == ("finished", "stuck")
    assert "exit code 3" in str(report_of(outcome).error)
    assert "are in the journal and not counted" in str(report_of(outcome).error)


def test_a_sink_that_hangs_holds_the_end_no_longer_than_the_drain(bench: Bench) -> None:
    """Its neighbour receives every event; its missing events are counted, and the host ends."""
    both = bench.witness("hangs", "hangs"), bench.witness("fine")
    outcome = bench.train(*both, module=waiting_at_the_end(lambda: bench.lines("fine")), drain_timeout_s=0.5)
    hung = report_of(outcome)
    assert (hung.state, hung.delivered, report_of(outcome, "witness-2").state) == ("stuck", 0, "closed")
    assert 0 < hung.left <= len(bench.kept)
    assert len(bench.lines("fine")) >= hung.left
    wait_until(lambda: not is_alive(bench.lines("fine")[0].pid), "the host is still there")


def test_a_host_that_cannot_run_is_killed_after_the_drain(bench: Bench) -> None:
    """A sink of it holds the interpreter: the host neither receives the end of the run nor keeps its own deadline."""
    pid = bench.folder / "out.pid"
    outcome = bench.train(bench.witness(behaviour="holds"), module=waiting_at_the_end(pid.exists), drain_timeout_s=0.2)
    assert (report_of(outcome).state, report_of(outcome).error) == (
        "stuck",
        "the sink host was still busy at the end of the drain; the events that are left are in the journal and not"
        " counted",
    )
    wait_until(lambda: not is_alive(int(pid.read_text())), "the host is still there")


# ------------------------------------------------------------------------------------- when the run dies or continues

DYING = """
import os, sys, time
sys.path.insert(0, {hosted!r})
import torch
from torch.utils.data import DataLoader
import hosted_sinks
from support.training import Net
from trainer import Trainer, TrainerArguments

class Data(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return torch.zeros(4), torch.zeros(1)

def act(global_step):
    if global_step == 5:
        if os.fork() == 0:  # it holds everything that a forked child inherits, and outlives us
            time.sleep(600)
        print("dying", flush=True)
        time.sleep(600)

module = Net(act=act, train_data=lambda net, size: DataLoader(Data(), batch_size=size, num_workers={workers}))
arguments = TrainerArguments(train_batch_size=4, device="cpu", epochs=3)
sink = hosted_sinks.Witness({out!r})
Trainer(module, arguments, sinks=[sink], sinks_in="process", run_dir="run", run_id="run", checkpoints=False).train()
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_host_of_a_killed_run_delivers_the_whole_journal(bench: Bench, script: Start, workers: int) -> None:
    """It closes its sinks and ends, although a forked process holds the channel; the next attempt continues there."""
    dying = script(DYING.format(hosted=str(HOSTED), out=str(bench.folder / "out"), workers=workers))
    dying.wait_for("dying")
    wait_until(lambda: any(line.kind == "TrainStepEnded" for line in bench.lines()), "nothing has arrived")
    host = bench.lines()[0].pid
    orphans = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == dying.process.pid]
    dying.signal(signal.SIGKILL)
    try:
        wait_until(lambda: bench.closed() and not is_alive(host), "the host is still there")
        assert bench.seqs() == bench.kept
    finally:
        for pid in orphans:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    bench.train()
    assert bench.seqs() == bench.kept
    assert {line.attempt for line in bench.lines()} == {1, 2}


def parent_of(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_a_sink_that_left_the_host_for_a_while_receives_nothing_twice(bench: Bench) -> None:
    """Its place in the journal is removed while it runs in the run's own process."""
    for place in ("process", "thread", "process"):
        bench.train(sinks_in=place)
    hosted = [line.seq for line in bench.lines() if line.attempt != 2]
    assert len(hosted) == len(set(hosted))
    assert bench.seqs() == sorted({*bench.seqs()})


def test_a_place_in_a_journal_that_was_deleted_hides_nothing(bench: Bench) -> None:
    """The next attempt counts from 1 again, below the place of the sink."""
    bench.train()
    shutil.rmtree(bench.run_dir / "journal")
    (bench.folder / "out").unlink()
    bench.train()
    assert bench.seqs() == bench.kept


def test_a_module_in_the_working_directory_does_not_replace_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of the path that is not a text is ignored."""
    (bench.folder / "sinks.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(sys, "path", [*sys.path, bench.folder / "odd"])
    bench.train()
    assert bench.seqs() == bench.kept


class Hung:
    """A sink whose first write waits for a long time."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def open(self, run: Any) -> Any:
        return self

    def write(self, events: Any) -> None:
        self.over.wait(30.0)

    def close(self) -> None: ...


def test_the_run_reports_on_the_health_of_its_observers_in_both_processes(bench: Bench) -> None:
    """With the number of events that wait for a hung one, and for how long."""
    told: dict[str, ObserverHealth] = {}
    memory, hung = Memory(), Hung()

    def is_told() -> bool:
        for event in memory.of(ObserversReported):
            told.update({health.observer: health for health in event.observers})
        return "hung" in told and told["hung"].queued > 0 and "witness" in told and told["witness"].delivered > 0

    def act(global_step: int) -> None:
        if global_step == 2:
            wait_until(is_told, "nothing was told")

    here = (hung, Delivery(runs_in="thread", latency_s=0.01))
    bench.train(bench.witness(), memory, here, module=Net(act=act), ledger_interval_s=0.05, drain_timeout_s=0.2)
    hung.over.set()
    assert told["hung"].lag_s is not None
    assert told["hung"].lag_s > 0
    assert (told["witness"].state, told["journal"].state) == ("ok", "ok")
    assert told["journal"].delivered > 0


def test_a_host_that_waits_for_another_too_long_reports_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever holds the lock, the run is told why its sinks get nothing."""
    monkeypatch.setattr(host_child, "_WAIT_S", 0.0)
    monkeypatch.setattr(host_child, "_LOOK_S", 0.0)
    (tmp_path / host_child.PLACES_DIR).mkdir()
    told: list[Any] = []
    config = host_child.HostConfig(RunInfo("run", run_dir=str(tmp_path)), [], 0.05, 1.0)
    held = open_lock_below(tmp_path, "sinks/host.lock")
    fcntl.flock(held, fcntl.LOCK_EX)
    parent: Any = types.SimpleNamespace(send=told.append)
    with pytest.raises(SystemExit, match=r"sinks/host.lock has been held by another process for .*; end that process"):
        host_child._wait_for_others(config, parent)
    waits = "the sink host waits for an earlier one of this run, which holds sinks/host.lock"
    assert [message.text for message in told] == [waits]
    os.close(held)
    host_child._wait_for_others(config, parent)
    assert stat.S_IMODE(os.stat(tmp_path / "sinks/host.lock").st_mode) == 0o600
