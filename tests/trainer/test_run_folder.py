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
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

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
from trainer.errors import ArgumentsError

NET = """
import os, resource, signal, sys, threading
from pathlib import Path
import torch
from torch import nn
from events.messages import ObserverFailed, ObserverRecovered
from events.sink import Delivery
from trainer import ModuleInterface, Trainer, TrainerArguments

class Net(ModuleInterface):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.01)], []
    def get_train_dataloader(self, sampler, batch_size):
        while self.goes_on():
            yield torch.ones(batch_size, 4)
    def get_val_dataloaders(self, sampler, batch_size):
        return None
    def train_step(self, global_step, batch, device):
        return self.linear(batch).mean()
    def val_step(self, global_step, batch, device): ...
    def goes_on(self):
        return True
"""


def lines(folder: Path) -> list[bytes]:
    """All lines of a run's journal."""
    segments = sorted((folder / "journal").glob("*.jsonl"))
    return [line for segment in segments for line in segment.read_bytes().splitlines(keepends=True)]


def steps(events: list[Event]) -> list[int]:
    return [event.global_step for event in events if type(event) is TrainStepEnded]


@pytest.fixture
def first_attempt(kit: Any) -> Any:
    """A finished run of two steps in ``run``, and what it published."""
    return kit.train(kit.Net(), journal=True, run_id="mine", run_dir="run")


def again(kit: Any, folder: Any = "run", **options: Any) -> Any:
    """Take the run up again."""
    return kit.train(kit.Net(), **{"journal": True, "run_id": "mine", "run_dir": folder} | options)


# ------------------------------------------------------------------------------------------- it cannot be used


@pytest.mark.anyio
async def test_a_folder_that_another_process_holds_is_refused_by_both_doors(kit: Any, script: Any) -> None:
    """With the process's number, before the module is asked for anything; it is free once that process is gone."""
    holder = script(
        "import os, sys\nfrom events.run.folder import RunFolder\n"
        "folder = RunFolder.open('run', 'mine')\nprint('held')\nsys.stdin.read()"
    )
    holder.wait_for("held")

    class Untouched(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            raise AssertionError("the run has begun")

    trainer = kit.make_trainer(Untouched(), journal=True, run_id="mine", run_dir="run")
    with pytest.raises(RunFolderHeld, match=f"process {holder.process.pid} .*choose another folder"):
        trainer.train()
    with pytest.raises(RunFolderHeld, match=f"process {holder.process.pid} "):
        async with trainer.run():
            raise AssertionError("must not be entered")
    holder.process.kill()
    holder.process.wait()
    assert again(kit).result.attempt == 1


@pytest.mark.parametrize("run_id", ["another", None], ids=["named", "unnamed"])
def test_a_folder_of_another_run_is_left_as_it_was(kit: Any, first_attempt: Any, run_id: str | None) -> None:
    """Both names stand in the error, and how to go on; a run without a name is always another one."""
    before = lines(Path("run"))
    arguments = Path("run/arguments.json").read_bytes()
    outcome = again(kit, run_id=run_id, epochs=7)
    assert type(outcome.error) is RunFolderMismatch
    assert "belongs to run 'mine', not to '" in str(outcome.error)
    assert "run_id='mine' to continue that run" in str(outcome.error)
    assert outcome.events == []
    assert lines(Path("run")) == before
    assert Path("run/arguments.json").read_bytes() == arguments


@pytest.mark.parametrize("where", ["file", "file/run", "/dev/null/run", "/proc/self/run", "a\0b"])
@pytest.mark.parametrize("journal", [True, False])
def test_a_path_that_cannot_be_a_folder_is_named(kit: Any, where: str, journal: bool) -> None:
    """A file, something below one, and a place that takes no folders even from root; with what to do."""
    Path("file").write_text("mine")
    outcome = again(kit, where, journal=journal)
    assert type(outcome.error) is RunFolderError
    assert where.partition("\0")[0] in str(outcome.error)
    assert "choose another folder" in str(outcome.error)
    assert outcome.events == []
    assert Path("file").read_text() == "mine"
    assert os.listdir() == ["file"]


# ---------------------------------------------------------------------------------------------- killed and again


def test_a_killed_run_is_taken_up_again_as_one_history(kit: Any, script: Any, tmp_path: Path) -> None:
    """Of a run killed with -9 a gapless beginning is there; the next attempt goes on above it and does it again."""
    program = script(
        NET
        + """
class Killed(Net):
    def train_step(self, global_step, batch, device):
        if global_step % 500 == 0 and sum(map(len, (p.read_bytes().split(b"\\n") for p in JOURNAL.iterdir()))) > 300:
            print("training")
        return super().train_step(global_step, batch, device)

JOURNAL = Path("run/journal")
Trainer(Killed(), TrainerArguments(train_batch_size=8, device="cpu"), sinks=[], run_id="mine", run_dir="run").train()
"""
    )
    program.wait_for("training")
    program.signal(signal.SIGKILL)
    assert program.end()[0] == -signal.SIGKILL

    reader = JournalReader("run/journal")
    left = reader.read(1_000_000)
    assert [event.seq for event in left] == list(range(1, len(left) + 1))
    assert type(left[0]) is RunStarted
    assert RunEnded not in set(map(type, left))
    assert steps(left) == list(range(1, len(steps(left)) + 1))
    assert len(steps(left)) > 100

    outcome = again(kit)
    assert outcome.result.attempt == 2
    assert min(event.seq for event in outcome.events) > left[-1].seq
    assert [event.global_step for event in outcome.of(RunResumed)] == [0]
    skipped: list[SkippedLine] = []
    history = list(read_history("run/journal", skipped=skipped))
    assert [(e.attempt, e.global_step) for e in history if type(e) is TrainStepEnded] == [(2, 1), (2, 2)]
    assert [e.attempt for e in history if type(e) is RunStarted] == [1, 2]
    assert len(skipped) <= 1  # the line it was killed in, if it was


def test_each_attempt_numbers_on_and_supersedes_the_steps_before(kit: Any, first_attempt: Any) -> None:
    """Three of them: one history with each step once, by the newest; what happened to the run is there thrice."""
    outcomes = [first_attempt, again(kit), again(kit, epochs=2)]
    assert [outcome.result.attempt for outcome in outcomes] == [1, 2, 3]
    journal = kit.read_journal("run")
    assert [e.seq for e in journal] == list(range(1, len(journal) + 1))
    assert [e.attempt for e in journal] == sorted(e.attempt for e in journal)
    history = list(read_history("run/journal"))
    assert [(e.attempt, e.global_step) for e in history if type(e) is TrainStepEnded] == [(3, n) for n in (1, 2, 3, 4)]
    assert [e.attempt for e in history if type(e) is RunEnded] == [1, 2, 3]


@pytest.mark.anyio
async def test_a_watcher_of_a_later_attempt_sees_the_earlier_ones(kit: Any, first_attempt: Any) -> None:
    """run.events(since=0) is the whole history of the run, from its folder."""
    trainer = kit.make_trainer(kit.Net(), journal=True, run_id="mine", run_dir="run")
    async with trainer.run() as run:
        seen = [(event.attempt, type(event)) async for event in run.events(since=0)]
    assert seen[0] == (1, RunStarted)
    assert seen[-1] == (2, RunEnded)
    assert (2, RunResumed) in seen


def test_an_attempt_that_left_nothing_in_the_journal_keeps_its_number(kit: Any, first_attempt: Any) -> None:
    """As where its process was killed before the first event was on disk."""
    for segment in Path("run/journal").iterdir():
        segment.unlink()
    assert again(kit).result.attempt == 2


# ----------------------------------------------------------------------------------------------- a damaged journal


def test_a_journal_cut_anywhere_is_continued_above_what_others_may_have_seen(kit: Any, first_attempt: Any) -> None:
    """At every byte of its last line: the folder opens, and numbers on from the last whole event or above."""
    (segment,) = Path("run/journal").iterdir()
    whole = segment.read_bytes()
    last = len(lines(Path("run"))[-1])
    seqs = [event.seq for event in kit.read_journal("run")]
    for cut in range(last + 1):
        segment.write_bytes(whole[: len(whole) - cut])
        with RunFolder.open("run", "mine") as folder:
            assert folder.last_attempt == 1
            # Without its newline it is an event all the same.
            assert folder.last_seq == (seqs[-1] if cut <= 1 else seqs[-2])
    Path("run/run.lock").unlink()


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0], ids=["only the newline", "in the middle", "all of it"])
def test_a_run_goes_on_behind_a_torn_line(kit: Any, first_attempt: Any, part: float) -> None:
    """Half a line is a reported skip, and nothing else is lost."""
    (segment,) = Path("run/journal").iterdir()
    *kept, last = lines(Path("run"))
    torn = last[: int((len(last) - 1) * (1 - part))]
    segment.write_bytes(b"".join(kept) + torn)
    outcome = again(kit)
    skipped: list[SkippedLine] = []
    history = list(read_history("run/journal", skipped=skipped))
    assert [e.attempt for e in history if type(e) is RunStarted] == [1, 2]
    assert [e.attempt for e in history if type(e) is RunEnded] == ([1, 2] if part == 0.0 else [2])
    assert [(s.path, s.line, s.length) for s in skipped] == (
        [(str(Path("run/journal") / segment.name), len(kept) + 1, len(torn))] if part == 0.5 else []
    )
    assert min(e.seq for e in outcome.events) > max(e.seq for e in history if e.attempt == 1)


def test_garbage_in_the_middle_is_a_reported_skip(kit: Any, first_attempt: Any) -> None:
    """Where it stands and why; the events around it are there, for readers and for the next attempt."""
    (segment,) = Path("run/journal").iterdir()
    before = lines(Path("run"))
    garbage = [b"not json\n", b"\x00\xff\n", b'{"type": 5}\n', b'{"type":"RunEnded","run_id":"alien","seq":3}\n']
    segment.write_bytes(b"".join([before[0], *garbage, *before[1:]]))
    assert again(kit).result.attempt == 2
    skipped: list[SkippedLine] = []
    history = list(read_history("run/journal", skipped=skipped))
    assert [s.line for s in skipped] == [2, 3, 4, 5]
    assert all(s.reason and s.path.endswith(segment.name) for s in skipped)
    assert len([e for e in history if e.attempt == 1 and type(e) in (RunStarted, RunEnded)]) == 2


def test_an_event_of_the_future_is_kept_and_numbered_above(kit: Any, first_attempt: Any) -> None:
    """A newer version has written to this journal: its event is returned, raw, and the next attempt stays above."""
    (segment,) = Path("run/journal").iterdir()
    tail = journal_tail("run/journal")
    ended = json.loads(lines(Path("run"))[-1])
    del ended["crc32"]
    future = ended | {"type": "ModelTeleported", "seq": tail.seq + 5, "attempt": 3, "whither": {"x": [1, 2]}}
    newer_fields = ended | {"seq": tail.seq + 6, "attempt": 3, "mood": "good"}
    with segment.open("ab") as file:
        for event in (future | {"previous_seq": tail.seq}, newer_fields):
            body = json.dumps(event, separators=(",", ":")).encode()
            file.write(b'%b,"crc32":"%08x"}\n' % (body[:-1], zlib.crc32(body)))
    outcome = again(kit)
    assert outcome.result.attempt == 4
    assert min(event.seq for event in outcome.events) == tail.seq + 7
    reader = JournalReader("run/journal")
    journal = reader.read()
    assert reader.skipped == []
    unknown = next(event for event in journal if event.seq == tail.seq + 5)
    assert json.loads(unknown.raw)["whither"] == {"x": [1, 2]}
    assert type(next(event for event in journal if event.seq == tail.seq + 6)) is RunEnded


# ------------------------------------------------------------------------------------------------ what is written


def test_without_journal_and_folder_nothing_is_written(kit: Any) -> None:
    """Not even an empty folder, whether the run finishes or fails."""

    class Failing(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            raise ZeroDivisionError

    for net in (kit.Net(), Failing()):
        outcome = kit.train(net, callbacks=[kit.Diary()], journal=False)
        assert outcome.error is not None or outcome.result.run_dir is None
    assert os.listdir() == []


def test_a_folder_without_a_journal_has_the_arguments(kit: Any) -> None:
    """A folder was asked for, so it is there and held, but has no history."""
    outcome = kit.train(kit.Net(), run_dir="run")
    assert outcome.result.run_dir == str(Path("run").absolute())
    assert sorted(os.listdir("run")) == ["arguments.json", "journal", "run.lock"]
    assert os.listdir("run/journal") == []


def test_runs_without_a_name_have_folders_of_their_own(kit: Any) -> None:
    """Of the same trainer, one after the other; each below runs/ with its name."""
    trainer = kit.make_trainer(kit.Net(), journal=True)
    results = [trainer.train() for _ in range(2)]
    assert sorted(os.listdir("runs")) == sorted(result.run_id for result in results)
    assert {result.attempt for result in results} == {1}
    for result in results:
        assert {event.run_id for event in kit.read_journal(result.run_dir)} == {result.run_id}


def test_a_relative_folder_is_that_of_the_start(kit: Any, tmp_path: Path) -> None:
    """A step that changes the working directory does not take the journal with it."""

    class Wandering(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            os.chdir(elsewhere)
            return self.forward_loss(batch)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    outcome = kit.train(Wandering(), journal=True, run_dir="run")
    assert outcome.result.run_dir == str(tmp_path / "run")
    assert type(kit.read_journal(tmp_path / "run")[-1]) is RunEnded
    assert os.listdir(elsewhere) == []


def test_arguments_are_those_of_the_newest_attempt_and_the_journal_has_all(kit: Any, first_attempt: Any) -> None:
    """Readable JSON; what is no plain value, such as a function given to torch.compile, is text."""
    assert again(kit, epochs=3, compile_options={"backend": len, "mode": None}).error is None
    stored = json.loads(Path("run/arguments.json").read_text())
    assert (stored["epochs"], stored["train_batch_size"], stored["device"]) == (3, 8, "cpu")
    assert stored["compile_options"] == {"backend": "<built-in function len>", "mode": None}
    started = [event for event in kit.read_journal("run") if type(event) is RunStarted]
    assert [event.arguments["epochs"] for event in started] == [None, 3]
    assert started[1].arguments == stored


@dataclasses.dataclass
class Size:
    width: int = 3
    path: Path = Path("data")


class Settings(msgspec.Struct):
    size: Size


DEEP = functools.reduce(lambda inner, _: {"a": inner}, range(150), {})


class Model:
    """Stands for a model of pydantic."""

    def model_dump(self) -> dict[str, Any]:
        return {"lr": 0.1}


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
        ({"lr": np.float32(0.5), "n": np.int64(2), "table": np.ones(2)}, {"lr": 0.5, "n": 2, "table": "[1. 1.]"}),
    ],
    ids=["mapping", "dataclass", "struct", "namespace", "model", "integers", "surrogates", "password", "numpy"],
)
def test_the_users_hyperparameters_are_recorded(kit: Any, config: Any, recorded: dict[str, Any]) -> None:
    """In the folder and in `RunStarted`; what JSON cannot hold is text."""
    assert kit.train(kit.Net(), journal=True, run_dir="run", config=config).error is None
    stored = json.loads(Path("run/config.json").read_text())
    assert stored.items() >= recorded.items()
    assert kit.read_journal("run")[0].config == stored


@pytest.mark.parametrize("config", [3, "lr=1", [1, 2], {("a", "b"): 1}, torch.ones(2), DEEP])
def test_a_config_without_names_is_refused(kit: Any, config: Any) -> None:
    """With its value and the fix; nothing was opened."""
    with pytest.raises(ArgumentsError, match=r"config=.* give a mapping"):
        kit.make_trainer(kit.Net(), run_dir="run", config=config)
    assert not Path("run").exists()


def test_a_folder_can_be_moved_and_continued(kit: Any, first_attempt: Any) -> None:
    """Nothing in it depends on where it lies."""
    shutil.move("run", "moved")
    assert again(kit, "moved").result.attempt == 2
    assert {event.attempt for event in kit.read_journal("moved")} == {1, 2}


# --------------------------------------------------------------------------------------------------- a full disk

FULL = (
    NET
    + """
import msgspec
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

class Full(Net):
    left = 100
    def goes_on(self):  # until the disk has refused (or has had room again), and then a little longer
        self.left -= watch.seen.is_set()
        return self.left > 0

for name, lifts, drain_s in (("full", False, 0.2), ("lifted", True, 20.0)):
    watch = Watch(lifts)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    arguments = TrainerArguments(train_batch_size=8, device="cpu", drain_timeout_s=drain_s)
    result = Trainer(Full(), arguments, sinks=[watch], run_dir=name, run_id="r").train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal = next(report for report in result.observers if report.observer == "journal")
    published = [(event.seq, type(event).__name__) for event in watch.events]
    Path(name + ".json").write_bytes(msgspec.json.encode((result.status, journal, published)))
"""
)


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_training_goes_on_while_the_disk_is_full(kit: Any, script: Any) -> None:
    """It finishes, the failure is published once with its reason, and the report counts what is missing.

    A second run's disk has room again after the first refusal: its journal lacks nothing.
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
    kept = kit.read_journal("full")
    assert [event.seq for event in kept] == list(range(1, len(kept) + 1))
    assert 0 < len(kept) < len(published)
    assert report["left"] + report["dropped"] >= report["published"] - len(kept)  # whole lines of a batch stay
    assert kit.train(kit.Net(), journal=True, run_id="r", run_dir="full").result.attempt == 2  # goes on from there

    status, report, published = json.loads(Path("lifted.json").read_text())
    assert status == "finished"
    assert (report["state"], report["left"], report["dropped"]) == ("closed", 0, 0)
    journal = kit.read_journal("lifted")
    assert {ObserverFailed, ObserverRecovered} <= {type(event) for event in journal}
    assert JournalGap not in {type(event) for event in journal}
    assert [[event.seq, type(event).__name__] for event in journal][: len(published)] == published
    assert RunEnded in {type(event) for event in journal}
    assert [json.loads(line)["seq"] for line in lines(Path("lifted"))] == [event.seq for event in journal]  # each once


def test_a_slow_sink_that_catches_up_misses_nothing(kit: Any, tmp_path: Path) -> None:
    """It writes its first batch after the last step, and has room for two events; the loop does not wait for it."""
    trained = threading.Event()

    class Slow(kit.Memory):
        def open(self, run: Any) -> Any:
            writer = super().open(run)
            write = writer.write
            writer.write = lambda events: (trained.wait(kit.WAIT_S), write(events))[1]
            return writer

    class Sets(kit.Diary):
        def on_end_train(self, global_step: int) -> None:
            trained.set()

    slow = Slow()
    sinks = [(slow, Delivery(overflow="catch_up", capacity=2))]
    outcome = kit.train(kit.Net(), sinks=sinks, callbacks=[Sets()], journal=True, run_dir=tmp_path / "run", epochs=5)
    report = next(one for one in outcome.result.observers if one.observer == "slow")
    assert (report.state, report.dropped, report.left) == ("closed", 0, 0)
    history = kit.read_journal(tmp_path / "run")
    assert len(history) > 20
    last = slow.events[-1].seq
    assert [event.seq for event in slow.events] == [event.seq for event in history if event.seq <= last]
    assert isinstance(slow.events[-1], RunEnded | ObserversReported | LedgerReported)
