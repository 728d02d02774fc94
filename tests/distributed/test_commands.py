"""What stops or holds one rank does so on all of them, at the same step."""

from __future__ import annotations

import ast
import signal
import socket
from pathlib import Path

import pytest
from support.journal_waits import JournalWaiter
from support.rank_runs import found_by
from support.ranks import StartRanks
from support.scripts import ROOT
from support.training import read_journal

from events.messages import CheckpointSaved, CheckpointStaged, CommandTaken, RunEnded, TrainStepEnded
from events.protocol import Checkpoint, Pause, Resume
from events.run.inbox import commands_of

pytestmark = pytest.mark.timeout(150)  # they share two cores with the tests beside

ENDS = """
import time, torch
from support.rank_runs import RANK, Small, leave, outcome, trainer
from trainer import Checkpoints
from trainer.callback_interface import CallbackInterface

class Patience(CallbackInterface):
    monitor = "val_loss"
    def should_stop(self, global_step, metrics):
        return "rank 1 is tired" if RANK == 1 else None

class Broken(CallbackInterface):
    def on_end_train_step(self, global_step, *outputs):
        if global_step == 5:
            raise ValueError("no disk")

def wait(stage, step):
    time.sleep(0.002)

def nan(stage, step):
    wait(stage, step)
    return torch.tensor(float("nan") if step >= 20 and stage == "train" else 0.0)

def bad(stage, step):
    wait(stage, step)
    if step == 7 and RANK == 1:
        raise KeyError("bad batch")

forever = {"epochs": None, "max_steps": 1_000_000, "val_interval_epochs": 10}
found = {}
for name, fault, arguments, more in (
    ("time", wait, {**forever, "max_time_s": 0.4}, {}),
    ("minutes", wait, {**forever, "max_time_s": 0.8}, {"checkpoints": Checkpoints(every_minutes=0.2 / 60)}),
    ("patience", wait, {"epochs": 3}, {"callbacks": [Patience()]}),
    ("broken", wait, forever, {"callbacks": [Broken()]}),
    ("nan", nan, {**forever, "non_finite": "stop"}, {}),
):
    module = Small(fault)
    found[name] = outcome(module, trainer(module, arguments=arguments, run_dir=f"runs/{name}", **more))
leave("found", found)
trainer(Small(bad), arguments=forever, run_dir="runs/bad").train()
"""


def test_what_ends_one_rank_ends_all_at_the_same_step(ranks: StartRanks, tmp_path: Path) -> None:
    """A limit of time, a callback, a fatal observer, a loss that is not finite, an exception; and then they go on."""
    started = ranks(ENDS)
    ended = started.end()
    assert ended.codes == [3, 1], ended
    first, second = found_by(tmp_path, "found")
    for name in first:
        assert first[name]["steps"] == second[name]["steps"], name
    assert first["time"]["reason"] == second["time"]["reason"] == "max_time_s=0.4 is over"
    assert first["patience"] == second["patience"]
    assert (first["patience"]["reason"], first["patience"]["step"]) == ("rank 1 is tired", 15)
    assert (first["broken"]["error"], second["broken"]["error"]) == ("ValueError", "PeerFailed")
    assert "rank 0 on " in second["broken"]["text"]
    assert "on_end_train_step" in second["broken"]["text"]
    assert "ValueError: no disk" in second["broken"]["text"]
    assert {first["nan"]["error"], second["nan"]["error"]} <= {"NonFiniteLossError", "PeerFailed"}

    events = read_journal(tmp_path / "runs/minutes")
    staged = [event for event in events if isinstance(event, CheckpointStaged)]
    assert [event.reasons for event in staged[:2]] == [["minutes"]] * 2
    assert not [event for event in events if isinstance(event, CommandTaken) and event.command != "stop"]
    (end,) = [event for event in read_journal(tmp_path / "runs/bad") if isinstance(event, RunEnded)]
    why = f"rank 1 on {socket.gethostname()} in train_step after global_step 6: KeyError: 'bad batch'"
    assert (end.status, end.reason, end.phase) == ("failed", why, "train_step")
    assert f"the run failed after global_step 6: {why}" in ended.err[0]  # once, and without a traceback
    assert "Traceback" not in ended.err[0]
    assert "KeyError: 'bad batch'" in ended.err[1]


SERVES = """
import os
from support.rank_runs import RANK, Small, leave, trainer
from trainer import Checkpoints
from trainer.errors import RunTerminated

def follow(stage, step):
    if stage != "data":
        with open(f"step-{RANK}", "w") as file:
            file.write(str(step))

module = Small(follow)
module.workers = 1  # torchrun signals the process group of each rank, and so its workers
forever = {"epochs": None, "max_steps": 10**9, "val_interval_steps": 40}
one = trainer(module, arguments=forever, run_dir="run", checkpoints=Checkpoints())
try:
    one.train()
except RunTerminated as stopped:
    leave("found", {"step": stopped.result.global_step, "reason": stopped.result.reason, "steps": module.steps})
"""


def test_commands_and_sigterm_are_taken_by_all_ranks_at_the_same_step(ranks: StartRanks, tmp_path: Path) -> None:
    """Those from the run folder, which rank 0 holds, and a signal that each of them gets."""
    started, folder = ranks(SERVES), tmp_path / "run"
    wait_for = JournalWaiter(folder, lambda: started.process.poll() is not None).wait_for
    wait_for(TrainStepEnded, lambda event: event.global_step >= 50)
    commands = commands_of(folder)
    commands.send(Pause(id="a"))
    paused = wait_for(CommandTaken, lambda event: event.command_id == "a")
    commands.send(Checkpoint(id="b"))  # while all wait
    saved = wait_for(CheckpointSaved, lambda event: "b" in event.command_ids)
    assert saved.checkpoint == f"step-{paused.global_step}.a1"
    reached = {int((tmp_path / f"step-{rank}").read_text()) for rank in range(2)}
    assert reached <= {paused.global_step}  # in training it is that of the last step
    commands.send(Resume(id="c"))
    resumed = wait_for(CommandTaken, lambda event: event.command_id == "c")
    assert resumed.global_step == paused.global_step
    wait_for(TrainStepEnded, lambda event: event.global_step >= paused.global_step + 20)
    started.signal(signal.SIGTERM)
    ended = started.end()
    first, second = found_by(tmp_path, "found")
    assert first == second
    assert first["reason"] == "SIGTERM"
    assert not any(ended.err), ended.err
    events = read_journal(folder)
    assert [event.command for event in events if isinstance(event, CommandTaken)] == [
        "pause",
        "checkpoint",
        "resume",
        "stop",
    ]
    (last,) = [event for event in events if isinstance(event, CheckpointStaged) and "stop" in event.reasons]
    assert last.global_step == first["step"] == first["steps"][-1]


def test_commands_are_read_at_boundaries_only() -> None:
    """A rank that looks at its own inbox at a time of its own would take what the others do not."""
    reads = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "trainer").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "pending" and ast.unparse(node.value).endswith("control")
    ]
    assert {place.partition(":")[0] for place in reads} == {"trainer/loop/boundary.py"}
