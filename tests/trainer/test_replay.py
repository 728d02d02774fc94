"""``stagecast replay`` sends the events of a run to sinks, after or during the run."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from support.scripts import ROOT
from support.threads import WAIT_S
from support.training import Net, make_trainer, train

from events.errors import RunFolderError
from events.journal.history import read_history
from events.journal.lines import decode_line, encode_lines
from events.journal.tail import journal_tail
from events.messages import Event, ObserverFailed, ObserverRecovered, TrainStepEnded
from events.run.folder import is_held
from events.sink import Delivery
from sinks import Memory
from sinks.replay import replay


@pytest.fixture
def history() -> list[Event]:
    """The events of a finished run in ``run``."""
    train(Net(), run_dir="run", journal=True)
    return list(read_history("run/journal"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer.cli.main", "replay", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


class Flaky(msgspec.Struct, frozen=True, dict=True):
    """Its server is down for a number of writes."""

    failures: int
    delivery: Delivery = Delivery(retries=3, backoff_s=0.001, batch=4)

    def open(self, run: Any) -> Any:
        self.__dict__.update(got=[], left=self.failures)
        return self

    def write(self, events: list[Event]) -> None:
        if self.__dict__["left"] > 0:
            self.__dict__["left"] -= 1
            raise OSError("down")
        self.__dict__["got"] += events

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing", "--to", "memory"], ""),
        (["run", "--to", "pigeon"], ""),
        (["run", "--to", "memory", "capacity"], "NAME=VALUE"),
        (["run", "--to", "memory", "size=3"], "size: is not known; known are capacity"),
        (["run", "--to", "memory", "capacity=many"], "capacity = 'many': Expected `int`"),
    ],
)
def test_a_failed_replay_is_reported_in_one_sentence(arguments: list[str], says: str) -> None:
    result = command(*arguments)
    assert result.returncode == (1 if arguments[0] == "nothing" else 2)
    assert result.stderr.startswith("stagecast replay: error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir() == []


def test_every_sink_receives_the_history_without_superseded_steps() -> None:
    for epochs in (2, 3):
        assert train(Net(), run_dir="run", run_id="run", journal=True, epochs=epochs).result.status == "finished"
    sinks: list[Any] = [Memory(), Flaky(0), Memory()]
    reports = anyio.run(replay, "run", sinks)
    history = list(read_history("run/journal"))
    assert sinks[0].events == sinks[2].events == history
    assert {event.attempt for event in sinks[0].of(TrainStepEnded)} == {2}
    expected = [("memory", "closed", 0), ("flaky", "closed", 0), ("memory-2", "closed", 0)]  # names as in a run
    assert [(report.observer, report.state, report.left) for report in reports] == expected
    later = Memory()
    anyio.run(functools.partial(replay, "run", [later], since=history[10].seq), backend="trio")
    assert later.events == history[11:]


def test_a_server_that_recovers_receives_everything_once(history: list[Event]) -> None:
    """A sink that does not recover is disabled, with a count of the missed events."""
    health: list[Event] = []
    back, away = Flaky(2), Flaky(100)
    reports = anyio.run(functools.partial(replay, "run", [back, away], on_health=health.append))
    assert back.__dict__["got"] == history
    expected = [("closed", len(history), 0), ("disabled", 0, len(history))]
    assert [(report.state, report.delivered, report.left) for report in reports] == expected
    assert sum(isinstance(event, ObserverRecovered) for event in health) == 1
    assert [event.action for event in health if isinstance(event, ObserverFailed)].count("disabled") == 1


def test_a_run_under_way_is_followed_to_its_end(tmp_path: Path) -> None:
    """From its first event, also for a late replay."""
    seen = Memory()
    # Without the pause, a busy machine would have thousands of steps to catch up with.
    net = Net(act=lambda step: threading.Event().wait(0.002))

    async def main() -> None:
        ready = make_trainer(net, journal=True, run_dir=tmp_path / "run", run_id="run", epochs=10**6)
        with anyio.fail_after(WAIT_S):
            async with ready.run() as run, anyio.create_task_group() as tasks:
                async for _ in run.events(since=0, types=[TrainStepEnded]):
                    break
                tasks.start_soon(replay, tmp_path / "run", [seen])
                async for event in run.events(since=0, types=[TrainStepEnded]):
                    if event.global_step > 50 and seen.events:
                        break
                run.stop()
                await run.result()

    anyio.run(main)
    assert seen.events == list(read_history(tmp_path / "run/journal"))


def test_a_run_that_has_a_folder_but_no_event_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, asked = Memory(), threading.Event()
    monkeypatch.setattr("sinks.replay.is_held", lambda folder: (asked.set(), is_held(folder))[1])

    def late(net: Net, size: int) -> Any:
        assert asked.wait(WAIT_S)
        return net.batches(size)

    async def main() -> None:
        ready = make_trainer(Net(train_data=late), journal=True, run_dir=tmp_path / "run", run_id="run")
        with anyio.fail_after(WAIT_S):
            async with ready.run(), anyio.create_task_group() as tasks:
                assert journal_tail(tmp_path / "run/journal").seq == 0
                tasks.start_soon(replay, tmp_path / "run", [seen])

    anyio.run(main)
    assert seen.events == list(read_history(tmp_path / "run/journal"))


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="has no journal in"):
        anyio.run(replay, tmp_path, [Memory()])


@pytest.mark.usefixtures("history")
def test_damaged_lines_of_the_journal_are_reported_with_exit_code_1(tmp_path: Path) -> None:
    """And a gap is delivered; a line that a crash has torn was never an event."""
    (segment,) = (tmp_path / "run/journal").glob("*.jsonl")
    whole = segment.read_bytes().split(b"\n")
    out = f"path={tmp_path / 'out.jsonl'}"

    segment.write_bytes(b"\n".join([*whole[:2], b"#" * 20, b"#", *whole[4:]]))
    result = command("run", "--to", "jsonl", out, "--to", "memory")
    assert result.returncode == 1
    assert result.stdout.startswith(f"jsonl: {len(whole) - 2} events delivered\n")
    places = [line.partition(":")[0] for line in result.stderr.splitlines()]
    assert places == [f"{segment}, line {number}" for number in (3, 4)]
    assert result.stderr.count("2 events are lost") == 1

    seq = len(whole)
    event, _ = decode_line(whole[-2])
    last = encode_lines([msgspec.structs.replace(event, seq=seq)], seq - 1).rstrip()
    segment.write_bytes(b"\n".join(whole) + last[:20])
    (segment.parent / f"{seq:020d}.jsonl").write_bytes(last + b"\n")
    result = command("run", "--to", "memory")
    assert (result.returncode, result.stdout) == (0, f"memory: {seq} events delivered\n")
    assert f"line {seq}: torn when" in result.stderr

    segment.write_bytes(b"#\n" * 20)
    (segment.parent / f"{seq:020d}.jsonl").unlink()
    result = command("run", "--to", "memory")
    assert (result.returncode, "is damaged: no line of it is an event" in result.stderr) == (1, True)
    assert "Traceback" not in result.stderr


def test_the_command_reports_the_deliveries_and_reads_options_as_yaml(history: list[Event]) -> None:
    """A list or a mapping; an invalid one is a text."""
    options = ["path=[out.jsonl", "types=[RunStarted, RunEnded]"]
    result = command("run", "--to", "jsonl", *options, "--to", "memory")
    said = f"jsonl: 2 events delivered\nmemory: {len(history)} events delivered\n"
    assert (result.returncode, result.stdout) == (0, said), result.stderr
    assert len(Path("[out.jsonl").read_text().splitlines()) == 2
