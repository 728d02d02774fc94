"""``stagecast replay``: the events of a run, sent to sinks after or during the run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from events.errors import RunFolderError
from events.journal.history import read_history
from events.journal.lines import decode_line, encode_lines
from events.journal.tail import journal_tail
from events.messages import Event, ObserverFailed, ObserverRecovered, TrainStepEnded
from events.run.folder import is_held
from events.sink import Delivery
from sinks import Memory
from sinks.replay import replay

HOSTED = Path(__file__).parent / "hosted"


def command(kit: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer.cli.main", "replay", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(kit.ROOT), str(HOSTED)])},
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


@pytest.mark.parametrize("arguments", [["nothing", "--to", "memory"], ["run", "--to", "pigeon"]])
def test_a_failed_replay_is_reported_in_one_sentence(kit: Any, arguments: list[str]) -> None:
    """And nothing is created."""
    result = command(kit, *arguments)
    assert result.returncode in (1, 2)
    assert result.stderr.startswith("stagecast replay: error: ")
    assert result.stderr.count("\n") == 1
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["memory", "capacity"], "NAME=VALUE"),
        (["memory", "size=3"], "size: is not known; known are capacity"),
        (["memory", "capacity=many"], "capacity = 'many': Expected `int`"),
    ],
)
def test_a_wrong_option_is_named(kit: Any, options: list[str], says: str) -> None:
    """With the known options, or the required type."""
    result = command(kit, "run", "--to", *options)
    assert result.returncode == 2
    assert says in result.stderr


def test_a_run_is_fed_as_the_history_that_counts(kit: Any, tmp_path: Path) -> None:
    """Steps that a later attempt has done again are there once; everybody gets all of it."""
    for epochs in (2, 3):
        options = {"run_dir": tmp_path / "run", "run_id": "run", "journal": True, "epochs": epochs}
        assert kit.train(kit.Net(), **options).result.status == "finished"
    sinks: list[Any] = [Memory(), Memory(), Flaky(0)]
    reports = anyio.run(replay, tmp_path / "run", [sinks[0], sinks[2], sinks[1]])
    history = list(read_history(tmp_path / "run/journal"))
    assert sinks[0].events == sinks[1].events == history
    assert {event.attempt for event in sinks[0].of(TrainStepEnded)} == {2}
    assert [(report.observer, report.state, report.left) for report in reports] == [
        ("memory", "closed", 0),
        ("flaky", "closed", 0),
        ("memory-2", "closed", 0),  # as in a run
    ]
    later = Memory()

    async def from_the_middle() -> None:
        await replay(tmp_path / "run", [later], since=history[10].seq)

    anyio.run(from_the_middle, backend="trio")
    assert later.events == history[11:]


def test_a_server_that_comes_back_gets_everything_once(kit: Any, tmp_path: Path) -> None:
    """A sink that does not recover is disabled, with a count of the missed events."""
    kit.train(kit.Net(), run_dir=tmp_path / "run", journal=True)
    history = list(read_history(tmp_path / "run/journal"))
    told: list[Event] = []
    back, away = Flaky(2), Flaky(100)

    async def feed() -> Any:
        return await replay(tmp_path / "run", [back, away], on_health=told.append)

    reports = anyio.run(feed)
    assert back.__dict__["got"] == history
    assert [(report.state, report.delivered, report.left) for report in reports] == [
        ("closed", len(history), 0),
        ("disabled", 0, len(history)),
    ]
    assert sum(isinstance(event, ObserverRecovered) for event in told) == 1
    assert [event.action for event in told if isinstance(event, ObserverFailed)].count("disabled") == 1


def test_a_run_under_way_is_followed_to_its_end(kit: Any, tmp_path: Path) -> None:
    """From its beginning, however late one comes."""
    seen = Memory()

    class Paced(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            threading.Event().wait(0.002)  # or a busy machine would have thousands of steps to catch up with
            return super().train_step(global_step, batch, device)

    async def main() -> None:
        ready = kit.make_trainer(Paced(), journal=True, run_dir=tmp_path / "run", run_id="run", epochs=10**6)
        with anyio.fail_after(kit.WAIT_S):
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
    kept = list(read_history(tmp_path / "run/journal"))
    assert seen.events == kept


def test_a_run_that_has_only_begun_is_waited_for(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its folder, and not an event yet."""
    seen, asked = Memory(), threading.Event()
    monkeypatch.setattr("sinks.replay.is_held", lambda folder: (asked.set(), is_held(folder))[1])

    class Late(kit.Net):
        def get_train_dataloader(self, *given: Any) -> Any:
            assert asked.wait(kit.WAIT_S)
            return super().get_train_dataloader(*given)

    async def main() -> None:
        ready = kit.make_trainer(Late(), journal=True, run_dir=tmp_path / "run", run_id="run")
        with anyio.fail_after(kit.WAIT_S):
            async with ready.run(), anyio.create_task_group() as tasks:
                assert journal_tail(tmp_path / "run/journal").seq == 0
                tasks.start_soon(replay, tmp_path / "run", [seen])

    anyio.run(main)
    assert seen.events == list(read_history(tmp_path / "run/journal"))


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    """With its path."""
    with pytest.raises(RunFolderError, match="has no journal in"):
        anyio.run(replay, tmp_path, [Memory()])


def test_damaged_lines_of_the_journal_are_reported(kit: Any, tmp_path: Path) -> None:
    """And the exit code is 1, and a gap is delivered; a line that a crash has torn was never an event."""
    kit.train(kit.Net(), run_dir=tmp_path / "run", journal=True)
    (segment,) = (tmp_path / "run/journal").glob("*.jsonl")
    whole = segment.read_bytes().split(b"\n")
    out = f"path={tmp_path / 'out.jsonl'}"

    segment.write_bytes(b"\n".join([*whole[:2], b"#" * 20, b"#", *whole[4:]]))
    result = command(kit, "run", "--to", "jsonl", out, "--to", "memory")
    assert result.returncode == 1
    assert result.stdout.startswith(f"jsonl: {len(whole) - 2} events delivered\n")
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        f"{segment}, line {number}" for number in (3, 4)
    ]
    assert result.stderr.count("2 events are lost") == 1

    seq = len(whole)
    event, _ = decode_line(whole[-2])
    last = encode_lines([msgspec.structs.replace(event, seq=seq)], seq - 1).rstrip()
    segment.write_bytes(b"\n".join(whole) + last[:20])
    (segment.parent / f"{seq:020d}.jsonl").write_bytes(last + b"\n")
    result = command(kit, "run", "--to", "memory")
    assert (result.returncode, result.stdout) == (0, f"memory: {seq} events delivered\n")
    assert f"line {seq}: torn when" in result.stderr

    segment.write_bytes(b"#\n" * 20)
    (segment.parent / f"{seq:020d}.jsonl").unlink()
    result = command(kit, "run", "--to", "memory")
    assert (result.returncode, "is damaged: no line of it is an event" in result.stderr) == (1, True)
    assert "Traceback" not in result.stderr


def test_an_option_may_be_a_list_or_a_mapping(kit: Any, tmp_path: Path) -> None:
    """Written as in YAML; what only begins like one is a text."""
    kit.train(kit.Net(), run_dir=tmp_path / "run", journal=True)
    result = command(kit, "run", "--to", "jsonl", "path=[out.jsonl", "types=[RunStarted, RunEnded]")
    assert (result.returncode, result.stdout) == (0, "jsonl: 2 events delivered\n"), result.stderr
    assert len((tmp_path / "[out.jsonl").read_text().splitlines()) == 2


def test_the_command_says_what_was_delivered(kit: Any, tmp_path: Path) -> None:
    """To a sink with options, and with the exit code of success."""
    kit.train(kit.Net(), run_dir=tmp_path / "run", journal=True)
    out = tmp_path / "out.jsonl"
    result = command(kit, "run", "--to", "jsonl", f"path={out}", "--to", "memory")
    assert result.returncode == 0, result.stderr
    count = len(list(read_history(tmp_path / "run/journal")))
    assert result.stdout == f"jsonl: {count} events delivered\nmemory: {count} events delivered\n"
    assert len(out.read_text().splitlines()) == count
