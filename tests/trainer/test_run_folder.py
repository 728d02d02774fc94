"""A run's folder and its journal, across attempts, processes and full disks."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import threading
import zlib
from collections import UserList
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.scripts import Start
from support.threads import WAIT_S
from support.training import Diary, Net, Outcome, make_trainer, read_journal, train

from events.errors import RunFolderError, RunFolderHeld, RunFolderMismatch
from events.journal.history import read_history
from events.journal.reader import JournalReader, SkippedLine
from events.journal.tail import journal_tail
from events.messages import (
    Event,
    JournalGap,
    LedgerReported,
    ObserverFailed,
    ObserverRecovered,
    ObserversReported,
    RunEnded,
    RunResumed,
    RunStarted,
    TrainStepEnded,
)
from events.run.folder import RunFolder
from events.sink import Delivery
from sinks import Memory
from trainer.errors import ArgumentsError


def lines(folder: Path) -> list[bytes]:
    """All lines of a run's journal."""
    segments = sorted((folder / "journal").glob("*.jsonl"))
    return [line for segment in segments for line in segment.read_bytes().splitlines(keepends=True)]


MINE = {"journal": True, "run_id": "mine"}


@pytest.fixture
def first_attempt() -> Outcome:
    """A finished run of two steps in ``run``, and its events."""
    return again()


def again(folder: Any = "run", **options: Any) -> Outcome:
    """Train in a folder, as the next attempt if it has one."""
    return train(Net(), **MINE | {"run_dir": folder} | options)


def history_of(folder: str) -> tuple[list[Event], list[SkippedLine]]:
    skipped: list[SkippedLine] = []
    return list(read_history(f"{folder}/journal", skipped=skipped)), skipped


def attempts(events: list[Event], kind: type[Event]) -> list[int]:
    return [event.attempt for event in events if type(event) is kind]


def attempted_steps(events: list[Event]) -> list[tuple[int, int]]:
    return [(event.attempt, event.global_step) for event in events if type(event) is TrainStepEnded]


def segment_of(folder: str) -> Path:
    (segment,) = Path(folder, "journal").iterdir()
    return segment


# ------------------------------------------------------------------------------------------- it cannot be used


@pytest.mark.anyio
async def test_a_folder_that_another_process_holds_is_refused_by_both_doors(script: Start) -> None:
    """The error has the process id, and comes before the module is asked for anything."""
    holder = script(
        "import os, sys\nfrom events.run.folder import RunFolder\n"
        "folder = RunFolder.open('run', 'mine')\nprint('held')\nsys.stdin.read()"
    )
    holder.wait_for("held")
    trainer = make_trainer(Net(train_data=lambda net, size: pytest.fail("the run has begun")), **MINE, run_dir="run")
    with pytest.raises(RunFolderHeld, match=f"process {holder.process.pid} .*choose another folder"):
        trainer.train()
    with pytest.raises(RunFolderHeld, match=f"process {holder.process.pid} "):
        async with trainer.run():
            raise AssertionError("must not be entered")
    holder.process.kill()
    holder.process.wait()
    assert again().result.attempt == 1


@pytest.mark.usefixtures("first_attempt")
@pytest.mark.parametrize("run_id", ["another", None], ids=["named", "unnamed"])
def test_a_folder_of_another_run_is_left_unchanged(run_id: str | None) -> None:
    """The error has both names and a fix; a run without a name is always another one."""
    before = lines(Path("run")), Path("run/arguments.json").read_bytes()
    outcome = again(run_id=run_id, epochs=7)
    assert type(outcome.error) is RunFolderMismatch
    assert "belongs to run 'mine', not to '" in str(outcome.error)
    assert "run_id='mine' to continue that run" in str(outcome.error)
    assert outcome.events == []
    assert (lines(Path("run")), Path("run/arguments.json").read_bytes()) == before


@pytest.mark.parametrize("where", ["file", "file/run", "/dev/null/run", "/proc/self/run", "a\0b"])
@pytest.mark.parametrize("journal", [True, False])
def test_a_path_that_cannot_be_a_folder_is_named(where: str, journal: bool) -> None:
    """A file, a path below one, and a place that takes no folders even from root."""
    Path("file").write_text("mine")
    outcome = again(where, journal=journal)
    assert type(outcome.error) is RunFolderError
    assert where.partition("\0")[0] in str(outcome.error)
    assert "choose another folder" in str(outcome.error)
    assert outcome.events == []
    assert (Path("file").read_text(), os.listdir()) == ("mine", ["file"])


# ------------------------------------------------------------------------------------------- several attempts


def test_a_killed_run_is_continued_as_one_history(script: Start) -> None:
    """A run that was killed with -9 leaves a journal without a gap; the next attempt supersedes its steps."""
    program = script(
        """
import itertools
from pathlib import Path
from support.training import Net, make_trainer

def act(step):
    if step % 500 == 0 and sum(path.read_bytes().count(b"\\n") for path in Path("run/journal").iterdir()) > 300:
        print("training")

endless = Net(act=act, train_data=lambda net, size: itertools.cycle(net.batches(size)), val_data=lambda *_: None)
make_trainer(endless, journal=True, run_id="mine", run_dir="run").train()
"""
    )
    program.wait_for("training")
    program.signal(signal.SIGKILL)
    assert program.end()[0] == -signal.SIGKILL

    left = JournalReader("run/journal").read(1_000_000)
    assert [event.seq for event in left] == list(range(1, len(left) + 1))
    assert type(left[0]) is RunStarted
    assert attempts(left, RunEnded) == []
    steps = [step for _, step in attempted_steps(left)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 100

    outcome = again()
    assert outcome.result.attempt == 2
    assert min(event.seq for event in outcome.events) > left[-1].seq
    assert [event.global_step for event in outcome.of(RunResumed)] == [0]
    history, skipped = history_of("run")
    assert attempted_steps(history) == [(2, 1), (2, 2)]
    assert attempts(history, RunStarted) == [1, 2]
    assert len(skipped) <= 1  # the line that it was killed in, if any


def test_each_attempt_continues_the_numbers_and_supersedes_the_steps_before(first_attempt: Outcome) -> None:
    """The history has each step once, of the newest attempt, and the end of every attempt. The folder can be moved."""
    outcomes = [first_attempt, again()]
    shutil.move("run", "moved")
    outcomes.append(again("moved", epochs=2))
    assert [outcome.result.attempt for outcome in outcomes] == [1, 2, 3]
    journal = read_journal("moved")
    assert [e.seq for e in journal] == list(range(1, len(journal) + 1))
    assert [e.attempt for e in journal] == sorted(e.attempt for e in journal)
    history, _ = history_of("moved")
    assert attempted_steps(history) == [(3, n) for n in (1, 2, 3, 4)]
    assert attempts(history, RunEnded) == [1, 2, 3]


@pytest.mark.anyio
@pytest.mark.usefixtures("first_attempt")
async def test_a_watcher_of_a_later_attempt_sees_the_earlier_ones() -> None:
    async with make_trainer(Net(), **MINE, run_dir="run").run() as run:
        seen = [(event.attempt, type(event)) async for event in run.events(since=0)]
    assert (seen[0], seen[-1]) == ((1, RunStarted), (2, RunEnded))
    assert (2, RunResumed) in seen


@pytest.mark.usefixtures("first_attempt")
def test_an_attempt_without_an_event_in_the_journal_keeps_its_number() -> None:
    """Its process may have been killed before the first event was on disk."""
    segment_of("run").unlink()
    assert again().result.attempt == 2


# ----------------------------------------------------------------------------------------------- a damaged journal


@pytest.mark.usefixtures("first_attempt")
def test_a_journal_cut_at_any_byte_is_continued_above_its_last_event() -> None:
    segment = segment_of("run")
    whole = segment.read_bytes()
    last = len(lines(Path("run"))[-1])
    seqs = [event.seq for event in read_journal("run")]
    for cut in range(last + 1):
        segment.write_bytes(whole[: len(whole) - cut])
        with RunFolder.open("run", "mine") as folder:
            assert folder.last_attempt == 1
            # A line without its newline is still an event.
            assert folder.last_seq == (seqs[-1] if cut <= 1 else seqs[-2])
    Path("run/run.lock").unlink()


@pytest.mark.usefixtures("first_attempt")
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0], ids=["only the newline", "in the middle", "all of it"])
def test_a_run_continues_after_a_torn_line(part: float) -> None:
    """Half a line is a reported skip, and nothing else is lost."""
    segment = segment_of("run")
    *kept, last = lines(Path("run"))
    torn = last[: int((len(last) - 1) * (1 - part))]
    segment.write_bytes(b"".join(kept) + torn)
    outcome = again()
    history, skipped = history_of("run")
    assert attempts(history, RunStarted) == [1, 2]
    assert attempts(history, RunEnded) == ([1, 2] if part == 0.0 else [2])
    expected = [(str(segment), len(kept) + 1, len(torn))] if part == 0.5 else []
    assert [(s.path, s.line, s.length) for s in skipped] == expected
    assert min(e.seq for e in outcome.events) > max(e.seq for e in history if e.attempt == 1)


@pytest.mark.usefixtures("first_attempt")
def test_garbage_in_the_middle_is_a_reported_skip() -> None:
    """With its place and reason; readers and the next attempt find the events around it."""
    segment = segment_of("run")
    before = lines(Path("run"))
    garbage = [b"not json\n", b"\x00\xff\n", b'{"type": 5}\n', b'{"type":"RunEnded","run_id":"alien","seq":3}\n']
    segment.write_bytes(b"".join([before[0], *garbage, *before[1:]]))
    assert again().result.attempt == 2
    history, skipped = history_of("run")
    assert [s.line for s in skipped] == [2, 3, 4, 5]
    assert all(s.reason and s.path.endswith(segment.name) for s in skipped)
    assert attempts(history, RunStarted) == attempts(history, RunEnded) == [1, 2]


@pytest.mark.usefixtures("first_attempt")
def test_an_event_of_a_newer_version_is_kept_and_the_next_attempt_numbers_above_it() -> None:
    tail = journal_tail("run/journal")
    ended = json.loads(lines(Path("run"))[-1])
    del ended["crc32"]
    future = ended | {"type": "ModelTeleported", "seq": tail.seq + 5, "attempt": 3, "whither": {"x": [1, 2]}}
    newer_fields = ended | {"seq": tail.seq + 6, "attempt": 3, "mood": "good"}
    with segment_of("run").open("ab") as file:
        for event in (future | {"previous_seq": tail.seq}, newer_fields):
            body = json.dumps(event, separators=(",", ":")).encode()
            file.write(b'%b,"crc32":"%08x"}\n' % (body[:-1], zlib.crc32(body)))
    outcome = again()
    assert outcome.result.attempt == 4
    assert min(event.seq for event in outcome.events) == tail.seq + 7
    journal = {event.seq: event for event in read_journal("run")}
    assert json.loads(journal[tail.seq + 5].raw)["whither"] == {"x": [1, 2]}  # type: ignore[attr-defined]
    assert type(journal[tail.seq + 6]) is RunEnded


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("fails", [False, True])
def test_without_journal_and_folder_nothing_is_written(fails: bool) -> None:
    outcome = train(Net(act=lambda step: 1 // (not fails)), callbacks=[Diary()], journal=False)
    assert (outcome.error is not None) is fails
    assert fails or outcome.result.run_dir is None
    assert os.listdir() == []


def test_a_folder_without_a_journal_has_the_arguments() -> None:
    outcome = train(Net(), run_dir="run")
    assert outcome.result.run_dir == str(Path("run").absolute())
    assert sorted(os.listdir("run")) == ["arguments.json", "journal", "run.lock"]
    assert os.listdir("run/journal") == []


def test_runs_without_a_name_have_folders_of_their_own() -> None:
    trainer = make_trainer(Net(), journal=True)
    results = [trainer.train() for _ in range(2)]
    assert sorted(os.listdir("runs")) == sorted(result.run_id for result in results)
    for result in results:
        assert result.attempt == 1
        assert {event.run_id for event in read_journal(result.run_dir or "")} == {result.run_id}


def test_a_trainer_with_a_folder_validates_the_run_that_it_has_trained() -> None:
    trainer = make_trainer(Net(), run_dir="run", journal=True)
    result = trainer.train()
    assert trainer.validate()["val_loss"] == result.metrics["val_loss"]
    assert attempts(history_of("run")[0], RunStarted) == [1, 2]


def test_a_relative_folder_belongs_to_the_working_directory_of_the_start(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    outcome = train(Net(act=lambda step: os.chdir(elsewhere)), journal=True, run_dir="run")
    assert outcome.result.run_dir == str(tmp_path / "run")
    assert type(read_journal(tmp_path / "run")[-1]) is RunEnded
    assert os.listdir(elsewhere) == []


@pytest.mark.usefixtures("first_attempt")
def test_arguments_are_those_of_the_newest_attempt_and_the_journal_has_all() -> None:
    """Readable JSON; an object, such as a function for torch.compile, becomes its text."""
    assert again(epochs=3, compile_options={"backend": len, "mode": None}).error is None
    stored = json.loads(Path("run/arguments.json").read_text())
    assert (stored["epochs"], stored["train_batch_size"], stored["device"]) == (3, 8, "cpu")
    assert stored["compile_options"] == {"backend": "<built-in function len>", "mode": None}
    started = [event.arguments for event in read_journal("run") if isinstance(event, RunStarted)]
    assert [arguments["epochs"] for arguments in started] == [None, 3]
    assert started[1] == stored


@dataclasses.dataclass
class Size:
    width: int = 3
    path: Path = Path("data")


class Settings(msgspec.Struct):
    size: Size


DEEP = functools.reduce(lambda inner, _: {"a": inner}, range(150), {})


class Model:
    """Like a model of pydantic."""

    def model_dump(self) -> dict[str, Any]:
        return {"lr": 0.1}


class Hidden:
    """Has no public attributes."""

    def __init__(self) -> None:
        self._width = 3

    def __str__(self) -> str:
        return "hidden"


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        ({"lr": 0.1, "sizes": (1, 2), 3: None, "gate": torch.relu}, {"lr": 0.1, "sizes": [1, 2], "3": None}),
        (Size(), {"width": 3, "path": "data"}),
        (Settings(Size()), {"size": {"width": 3, "path": "data"}}),
        (argparse.Namespace(lr=0.5, model=Model()), {"lr": 0.5, "model": {"lr": 0.1}}),
        (Model(), {"lr": 0.1}),
        (
            {"big": 2**70, "list": [2**64, 10**9_000]},
            {"big": str(2**70), "list": [str(2**64), "an integer of 29,898 bits"]},
        ),
        ({"a\udc80": ["\udc81"]}, {"a\\udc80": ["\\udc81"]}),
        ({"db": ["pg://me:hid/den@there/x"]}, {"db": ["pg://...@there/x"]}),
        (
            {"sizes": UserList([1, {"depth": UserList([2])}]), "model": Hidden()},
            {"sizes": [1, {"depth": [2]}], "model": "hidden"},
        ),
        ({"lr": np.float32(0.5), "n": np.int64(2), "table": np.ones(2)}, {"lr": 0.5, "n": 2, "table": "[1. 1.]"}),
    ],
    ids=[
        "mapping",
        "dataclass",
        "struct",
        "namespace",
        "model",
        "integers",
        "surrogates",
        "password",
        "lists",
        "numpy",
    ],
)
def test_the_users_hyperparameters_are_recorded(config: Any, recorded: dict[str, Any]) -> None:
    """In the folder and in `RunStarted`; values that JSON cannot hold become text."""
    assert train(Net(), journal=True, run_dir="run", config=config).error is None
    stored = json.loads(Path("run/config.json").read_text())
    assert stored.items() >= recorded.items()
    started = read_journal("run")[0]
    assert isinstance(started, RunStarted)
    assert started.config == stored


@pytest.mark.parametrize("config", [3, "lr=1", [1, 2], {("a", "b"): 1}, torch.ones(2), DEEP])
def test_a_config_without_names_is_refused_before_anything_is_opened(config: Any) -> None:
    with pytest.raises(ArgumentsError, match=r"config=.* give a mapping"):
        make_trainer(Net(), run_dir="run", config=config)
    assert not Path("run").exists()


# --------------------------------------------------------------------------------------------------- a full disk

FULL = """
import itertools, resource, signal, threading
from pathlib import Path
import msgspec
from events.messages import ObserverFailed, ObserverRecovered
from events.sink import Delivery
from support.training import Net, make_trainer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

class Watch:
    delivery = Delivery(latency_s=0.001)
    def __init__(self, lifts):
        self.lifts, self.events, self.seen = lifts, [], threading.Event()
    def open(self, run):
        return self
    def write(self, events):
        self.events += events
        for event in events:
            if type(event) is ObserverFailed and event.observer == "journal":
                if self.lifts:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                else:
                    self.seen.set()
            elif type(event) is ObserverRecovered:
                self.seen.set()
    def close(self): ...

def data(net, size):  # until the disk has refused (or has had room again), and then a little longer
    left = 100
    for batch in itertools.cycle(net.batches(size)):
        left -= watch.seen.is_set()
        if left <= 0:
            return
        yield batch

for name, lifts, drain_s in (("full", False, 0.2), ("lifted", True, 20.0)):
    watch = Watch(lifts)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    net = Net(train_data=data, val_data=lambda *_: None)
    run = make_trainer(net, drain_timeout_s=drain_s, sinks=[watch], run_dir=name, run_id="r", journal=True)
    result = run.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal = next(report for report in result.observers if report.observer == "journal")
    published = [(event.seq, type(event).__name__) for event in watch.events]
    Path(name + ".json").write_bytes(msgspec.json.encode((result.status, journal, published)))
"""


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_training_continues_while_the_disk_is_full(script: Start) -> None:
    """The failure is published once with its reason, and the report counts the missing events.

    The disk of a second run has room again after the first refusal: its journal is complete.
    """
    code, _, err = script(FULL).end()
    assert code == 0
    assert re.search(r"^stagecast: warning: journal failed .*: .*File too large", err, re.M)
    status, report, published = json.loads(Path("full.json").read_text())
    assert status == "finished"
    assert [name for _, name in published].count("ObserverFailed") == 1
    assert report["state"] == "stuck"
    assert "File too large" in report["error"]
    assert report["published"] == report["delivered"] + report["dropped"] + report["conflated"] + report["left"]
    kept = read_journal("full")
    assert [event.seq for event in kept] == list(range(1, len(kept) + 1))
    assert 0 < len(kept) < len(published)
    assert report["left"] + report["dropped"] >= report["published"] - len(kept)  # whole lines of a batch stay
    assert again("full", run_id="r").result.attempt == 2

    status, report, published = json.loads(Path("lifted.json").read_text())
    assert status == "finished"
    assert (report["state"], report["left"], report["dropped"]) == ("closed", 0, 0)
    journal = read_journal("lifted")
    assert {ObserverFailed, ObserverRecovered} <= {type(event) for event in journal}
    assert JournalGap not in {type(event) for event in journal}
    assert [[event.seq, type(event).__name__] for event in journal][: len(published)] == published
    assert RunEnded in {type(event) for event in journal}
    assert [json.loads(line)["seq"] for line in lines(Path("lifted"))] == [event.seq for event in journal]  # each once


def test_a_slow_sink_that_catches_up_misses_nothing(tmp_path: Path) -> None:
    """It writes its first batch after the last step, and has room for two events; the loop does not wait for it."""
    trained = threading.Event()

    class Slow(Memory):
        def open(self, run: Any) -> Any:
            writer = super().open(run)
            write = writer.write
            writer.write = lambda events: (trained.wait(WAIT_S), write(events))[1]  # type: ignore[method-assign]
            return writer

    class Sets(Diary):
        def on_end_train(self, global_step: int) -> None:
            trained.set()

    slow = Slow()
    sinks = [(slow, Delivery(overflow="catch_up", capacity=2))]
    outcome = train(Net(), sinks=sinks, callbacks=[Sets()], journal=True, run_dir=tmp_path / "run", epochs=5)
    report = next(one for one in outcome.result.observers if one.observer == "slow")
    assert (report.state, report.dropped, report.left) == ("closed", 0, 0)
    history = read_journal(tmp_path / "run")
    assert len(history) > 20
    last = slow.events[-1].seq
    assert [event.seq for event in slow.events] == [event.seq for event in history if event.seq <= last]
    assert isinstance(slow.events[-1], RunEnded | ObserversReported | LedgerReported)
