"""Sinks in a process of their own: the events that they receive when they, the process, or the run fails."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import anyio
import msgspec
import pytest

from events.errors import SinkHostFailed
from events.messages import ObserverFailed, ObserverHealth, ObserverRecovered, ObserversReported, ValStepEnded
from events.safe_files import open_lock_below
from events.sink import Delivery, RunInfo
from sinks.host import child as host_child
from sinks.host import process as host_process
from trainer.errors import ArgumentsError

HOSTED = Path(__file__).parent / "hosted"


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of misbehaving sinks, which a sink host finds, too."""
    monkeypatch.syspath_prepend(str(HOSTED))
    monkeypatch.delitem(sys.modules, "hosted_sinks", raising=False)
    import hosted_sinks  # type: ignore[import-not-found]

    return hosted_sinks


class Line(msgspec.Struct, frozen=True):
    """A line that a `Witness` has written."""

    pid: int
    attempt: int
    seq: int
    kind: str


def lines(path: Path) -> list[Line]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        pid, *rest = line.split()
        if rest != ["closed"] and len(rest) == 4:
            found.append(Line(int(pid), int(rest[0]), int(rest[1]), rest[2]))
    return found


def kept_for_sinks(kit: Any, tmp_path: Path) -> set[int]:
    """The events for every sink. Those about sinks at the end of the run are in the journal only."""
    events = kit.read_journal(tmp_path / "run")
    return {
        event.seq for event in events if not isinstance(event, ObserverFailed | ObserverRecovered | ObserversReported)
    }


def closed(path: Path) -> bool:
    return path.exists() and path.read_text().endswith(" closed\n")


def until(happens: Callable[[], Any], what: str) -> Any:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 30.0
    while not (value := happens()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return value


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def run_dir_of(kit: Any, tmp_path: Path, module: Any, *sinks: Any, **options: Any) -> Any:
    given = {"run_dir": tmp_path / "run", "run_id": "run", "journal": True, "sinks_in": "process"} | options
    return kit.train(module, sinks=sinks, **given)


# ------------------------------------------------------------------------------------------------ bad input


class Plain:
    """No struct."""

    delivery: ClassVar[Delivery] = Delivery(runs_in="process")

    def open(self, run: Any) -> Any:
        raise NotImplementedError


def test_a_sink_that_cannot_be_sent_to_the_host_is_refused_when_the_trainer_is_built(
    kit: Any, sinks: Any, tmp_path: Path
) -> None:
    """The error names each with its reason; nothing is started or written."""

    class Local(msgspec.Struct, frozen=True):
        def open(self, run: Any) -> Any:
            raise NotImplementedError

    witness = sinks.Witness(str(tmp_path / "out"))
    bad = [Plain(), Local(), (witness, Delivery(types=frozenset({ValStepEnded}), runs_in="process"))]
    bad.append(sinks.Witness("out-\udc80"))
    with pytest.raises(ArgumentsError) as caught:
        kit.make_trainer(kit.Net(), sinks=bad, journal=True, sinks_in="process")
    for reason in (
        "not a msgspec.Struct",
        "could not import it",
        "does not keep ValStepEnded",
        "surrogates not allowed",
    ):
        assert reason in str(caught.value)
    with pytest.raises(ArgumentsError, match=r"Witness\) runs in the sink host, .* keep the journal"):
        kit.make_trainer(kit.Net(), sinks=[witness], sinks_in="process")
    with pytest.raises(ArgumentsError, match="'thread' or 'process'"):
        kit.make_trainer(kit.Net(), sinks_in="elsewhere")
    assert not (tmp_path / "out").exists()


def test_a_fatal_sink_that_cannot_be_opened_ends_the_run(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """As in the run's own process; the error has the text of its exception."""

    class Waits(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            assert entered.wait(kit.WAIT_S)
            kit.wait_until_failed(box[0])
            return super().train_step(global_step, batch, device)

    box: list[Any] = []
    entered = threading.Event()

    async def main() -> None:
        ready = kit.make_trainer(
            Waits(), sinks=[sinks.Unopenable()], journal=True, sinks_in="process", run_dir=tmp_path / "run"
        )
        async with ready.run() as run:
            box.append(run)
            entered.set()

    with pytest.raises(SinkHostFailed, match="no such server"):
        anyio.run(main)


def test_a_sink_whose_import_exits_is_disabled_and_named(
    kit: Any, sinks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are not affected."""
    (tmp_path / "quitter_sinks.py").write_text(
        "import sys, msgspec\n"
        "if sys.argv[0].endswith('host/child.py'):\n"
        "    sys.exit(7)\n"
        "class Quitter(msgspec.Struct, frozen=True):\n"
        "    def open(self, run): raise NotImplementedError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import quitter_sinks  # type: ignore[import-not-found]

    out = tmp_path / "out"
    outcome = run_dir_of(kit, tmp_path, kit.Net(), quitter_sinks.Quitter(), sinks.Witness(str(out)))
    states = {one.observer: (one.state, one.error) for one in outcome.result.observers}
    assert states["witness"] == ("closed", None)
    assert states["quitter"][0] == "disabled"
    assert "cannot be built in the sink host: SystemExit(7)" in states["quitter"][1]
    assert {line.seq for line in lines(out)} >= kept_for_sinks(kit, tmp_path)


# ---------------------------------------------------------------------------------------------- what arrives


def test_every_event_of_the_journal_arrives_once_and_in_order(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """From the first to the last, although the sink and its processes print."""
    out = tmp_path / "out"
    outcome = run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(out), "noisy"), epochs=3)
    kept = [event.seq for event in kit.read_journal(tmp_path / "run")]
    assert [line.seq for line in lines(out)] == kept
    assert {line.pid for line in lines(out)} - {os.getpid()} != set()
    assert closed(out)
    report = next(one for one in outcome.result.observers if one.observer == "witness")
    assert (report.state, report.published, report.delivered, report.left) == ("closed", len(kept), len(kept), 0)
    log = (tmp_path / "run/sinks/host.log").read_text()
    assert {"what a sink prints", "and on stderr", "and what its processes print"} <= {*log.splitlines()}
    assert not is_alive(lines(out)[0].pid)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_host_that_is_killed_is_started_again_and_continues(
    kit: Any, sinks: Any, tmp_path: Path, backend: str
) -> None:
    """No event is lost; only the batch of its death may be delivered twice."""
    out = tmp_path / "out"
    killed: list[int] = []

    class Kills(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 3:
                until(lambda: len(lines(out)) >= 3, "nothing has arrived")
                killed.append(box[0]._connection._session.observers.host.pid)
                os.kill(killed[0], signal.SIGKILL)
            return super().train_step(global_step, batch, device)

    box: list[Any] = []

    async def main() -> None:
        ready = kit.make_trainer(
            Kills(),
            sinks=[sinks.Witness(str(out))],
            journal=True,
            sinks_in="process",
            run_dir=tmp_path / "run",
            epochs=3,
        )
        async with ready.run() as run:
            box.append(run)
        results.append(await run.result())

    results: list[Any] = []
    anyio.run(main, backend=backend)
    assert {line.seq for line in lines(out)} >= kept_for_sinks(kit, tmp_path)
    assert len({line.pid for line in lines(out)}) == 2
    assert len(lines(out)) - len({line.seq for line in lines(out)}) <= 8
    (report,) = results[0].observers[-2:-1]
    assert (report.observer, report.state, report.published) == ("witness", "closed", report.delivered)
    assert report.delivered == len({line.seq for line in lines(out)})  # of both hosts
    failures = [event for event in kit.read_journal(tmp_path / "run") if isinstance(event, ObserverFailed)]
    assert [(event.observer, event.during, event.action) for event in failures] == [("witness", "host", "retrying")]
    assert "was killed by SIGKILL" in failures[0].error


def test_a_sink_that_takes_its_host_with_it_misses_nothing(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """Nor does its neighbour; the end of the run waits for the restarted host."""
    out, other = tmp_path / "out", tmp_path / "other"
    run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(out), "dies"), sinks.Witness(str(other)), epochs=4)
    for path in (out, other):
        assert {line.seq for line in lines(path)} >= kept_for_sinks(kit, tmp_path)
        assert closed(path)
    assert "about to die\n" in (tmp_path / "run/sinks/host.log").read_text()


def test_a_sink_whose_server_is_down_is_reported_and_recovers(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """The run publishes both events."""
    out = tmp_path / "out"

    class Waits(kit.Net):
        def on_end_train(self, global_step: int) -> None:
            until(lambda: len(lines(out)) > 5, "it has not recovered")

    run_dir_of(kit, tmp_path, Waits(), sinks.Witness(str(out), "fails"))
    assert {line.seq for line in lines(out)} >= kept_for_sinks(kit, tmp_path)
    told = kit.read_journal(tmp_path / "run")
    assert [event.error for event in told if isinstance(event, ObserverFailed)] == ["OSError: the server is down"]
    assert sum(isinstance(event, ObserverRecovered) for event in told) == 1


def test_a_host_that_always_dies_is_disabled(
    kit: Any, sinks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run finishes; the report names the exit code and where the rest of the events is."""
    monkeypatch.setattr(host_process, "_MOST_DEATHS", 2)
    outcome = run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(tmp_path / "out"), "mortal"))
    assert outcome.result.status == "finished"
    report = next(one for one in outcome.result.observers if one.observer == "witness")
    assert report.state == "stuck"
    assert "exit code 3" in str(report.error)
    assert "are in the journal and not counted" in str(report.error)


def test_a_sink_that_hangs_holds_the_end_no_longer_than_the_drain(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """Its neighbour receives every event; its missing events are counted, and the host ends."""
    hangs, fine = tmp_path / "hangs", tmp_path / "fine"
    pids: list[int] = []

    class Asks(kit.Net):
        def on_end_train(self, global_step: int) -> None:
            until(lambda: lines(fine), "nothing has arrived")
            pids.append(lines(fine)[0].pid)

    sinks_ = [sinks.Witness(str(hangs), "hangs"), sinks.Witness(str(fine))]
    outcome = run_dir_of(kit, tmp_path, Asks(), *sinks_, drain_timeout_s=0.5)
    reports = {one.observer: one for one in outcome.result.observers}
    kept = len(kit.read_journal(tmp_path / "run"))
    assert (reports["witness"].state, reports["witness-2"].state) == ("stuck", "closed")
    assert reports["witness"].delivered == 0
    assert 0 < reports["witness"].left <= kept
    assert len(lines(fine)) >= reports["witness"].left
    until(lambda: not is_alive(pids[0]), "the host is still there")


def test_a_host_that_cannot_run_is_killed_after_the_drain(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """A sink of it holds the interpreter: the host neither receives the end of the run nor keeps its own deadline."""
    pid = tmp_path / "out.pid"

    class Waits(kit.Net):
        def on_end_train(self, global_step: int) -> None:
            until(pid.exists, "nothing has arrived")

    sink = sinks.Witness(str(tmp_path / "out"), "holds")
    outcome = run_dir_of(kit, tmp_path, Waits(), sink, drain_timeout_s=0.2)
    report = next(one for one in outcome.result.observers if one.observer == "witness")
    assert (report.state, report.error) == (
        "stuck",
        "the sink host was still busy at the end of the drain; the events that are left are in the journal and not"
        " counted",
    )
    until(lambda: not is_alive(int(pid.read_text())), "the host is still there")


# ------------------------------------------------------------------------------------- when the run dies or continues

DYING = """
import os, signal, sys, time
sys.path[:0] = [{hosted!r}, {tests!r}]
import torch
from torch.utils.data import DataLoader
import hosted_sinks
from conftest import Net
from trainer import Trainer, TrainerArguments

class Data(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return torch.zeros(4), torch.zeros(1)

class Dies(Net):
    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(Data(), batch_size=batch_size, num_workers={workers})
    def train_step(self, global_step, batch, device):
        if global_step == 5:
            if os.fork() == 0:  # it holds everything that a forked child inherits, and outlives us
                time.sleep(600)
            print("dying", flush=True)
            time.sleep(600)
        return super().train_step(global_step, batch, device)

arguments = TrainerArguments(train_batch_size=4, device="cpu", epochs=3)
sink = hosted_sinks.Witness({out!r})
Trainer(Dies(), arguments, sinks=[sink], sinks_in="process", run_dir="run", run_id="run", checkpoints=False).train()
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_host_of_a_killed_run_delivers_the_whole_journal(
    kit: Any, sinks: Any, script: Any, tmp_path: Path, workers: int
) -> None:
    """It closes its sinks and ends, although a forked process holds the channel; the next attempt continues there."""
    out = tmp_path / "out"
    text = DYING.format(hosted=str(HOSTED), tests=str(Path(__file__).parent), out=str(out), workers=workers)
    dying = script(text)
    dying.wait_for("dying")
    until(lambda: any(line.kind == "TrainStepEnded" for line in lines(out)), "nothing has arrived")
    host = lines(out)[0].pid
    orphans = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == dying.process.pid]
    dying.signal(signal.SIGKILL)
    try:
        until(lambda: closed(out) and not is_alive(host), "the host is still there")
        kept = [event.seq for event in kit.read_journal(tmp_path / "run")]
        assert [line.seq for line in lines(out)] == kept
    finally:
        for pid in orphans:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(out)))
    everything = kit.read_journal(tmp_path / "run")
    assert [line.seq for line in lines(out)] == [event.seq for event in everything]
    assert {line.attempt for line in lines(out)} == {1, 2}


def parent_of(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_a_sink_that_left_the_host_for_a_while_receives_nothing_twice(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """Its place in the journal is removed while it runs in the run's own process."""
    out = tmp_path / "out"
    for place in ("process", "thread", "process"):
        run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(out)), sinks_in=place)
    hosted = [line.seq for line in lines(out) if line.attempt != 2]
    assert len(hosted) == len(set(hosted))
    assert [line.seq for line in lines(out)] == sorted({line.seq for line in lines(out)})


def test_a_place_in_a_journal_that_was_deleted_hides_nothing(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """The next attempt counts from 1 again, below the place of the sink."""
    out = tmp_path / "out"
    run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(out)))
    shutil.rmtree(tmp_path / "run/journal")
    out.unlink()
    run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(out)))
    assert [line.seq for line in lines(out)] == [event.seq for event in kit.read_journal(tmp_path / "run")]


def test_a_module_in_the_working_directory_does_not_replace_ours(
    kit: Any, sinks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of the path that is not a text is ignored."""
    (tmp_path / "sinks.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path / "odd"])
    out = tmp_path / "out"
    run_dir_of(kit, tmp_path, kit.Net(), sinks.Witness(str(out)))
    assert [line.seq for line in lines(out)] == [event.seq for event in kit.read_journal(tmp_path / "run")]


def test_the_run_reports_on_the_health_of_its_observers_in_both_processes(kit: Any, sinks: Any, tmp_path: Path) -> None:
    """With the number of events that wait for a hung one, and for how long."""
    told: dict[str, ObserverHealth] = {}

    class Waits(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 2:
                until(self.is_told, "nothing was told")
            return super().train_step(global_step, batch, device)

        def is_told(self) -> bool:
            for event in memory.of(ObserversReported):
                told.update({health.observer: health for health in event.observers})
            return "hung" in told and told["hung"].queued > 0 and "witness" in told and told["witness"].delivered > 0

    class Hung:
        def __init__(self) -> None:
            self.over = threading.Event()

        def open(self, run: Any) -> Any:
            return self

        def write(self, events: Any) -> None:
            self.over.wait(30.0)

        def close(self) -> None:
            pass

    memory, hung = kit.Memory(), Hung()
    here = (hung, Delivery(runs_in="thread", latency_s=0.01))
    options = {"ledger_interval_s": 0.05, "drain_timeout_s": 0.2}
    run_dir_of(kit, tmp_path, Waits(), sinks.Witness(str(tmp_path / "out")), memory, here, **options)
    hung.over.set()
    assert told["hung"].lag_s is not None
    assert told["hung"].lag_s > 0
    assert (told["witness"].state, told["journal"].state) == ("ok", "ok")
    assert told["journal"].delivered > 0


def test_a_host_that_waits_for_another_too_long_reports_and_ends(tmp_path: Path, monkeypatch: Any) -> None:
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
    assert [message.text for message in told] == [
        "the sink host waits for an earlier one of this run, which holds sinks/host.lock"
    ]
    os.close(held)
    host_child._wait_for_others(config, parent)
    assert stat.S_IMODE(os.stat(tmp_path / "sinks/host.lock").st_mode) == 0o600
