"""A rank that dies or hangs ends the others, by name; torchrun starts them again, and the run continues exactly."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from support.rank_runs import Small, trainer
from support.ranks import StartRanks
from support.training import read_journal

from events.journal.history import read_history
from events.messages import RankEnded, RunEnded, RunResumed, RunStarted, TrainStepEnded

pytestmark = pytest.mark.timeout(150)  # they share two cores with the tests beside
HOST = socket.gethostname()
DIES = """
import os, torch
from support.rank_runs import LIFE, RANK, Small, trainer
from trainer import Checkpoints

def die(stage, step):
    if (LIFE, RANK, stage) in ((0, 1, "train"), (1, 0, "val")) and step >= 20:
        os.kill(os.getpid(), 9)

module = Small(die)
trainer(module, checkpoints=Checkpoints(every_steps=5)).train()
torch.save(module.state_dict(), f"weights-{RANK}.pt")
"""


def test_a_run_whose_ranks_are_killed_continues_exactly_under_torchrun(ranks: StartRanks, tmp_path: Path) -> None:
    """Rank 1 within a step, then rank 0 within a validation: the same run, with one history that names both."""
    started = ranks(DIES, 2, "--max-restarts=2", "--rdzv-id=job")
    alone = Small()
    trainer(alone, arguments={"strategy": "single"}, run_dir=tmp_path / "alone", checkpoints=False).train()
    ended = started.end()
    assert ended.code == 0, ended
    assert "Traceback" not in "".join(ended.err)
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"weights-{rank}.pt").items():
            assert (value - alone.state_dict()[name]).abs().max() < 1e-12

    (folder,) = (tmp_path / "runs").iterdir()
    events = read_journal(folder)
    assert folder.name == events[0].run_id
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.attempt for event in events if isinstance(event, RunStarted)] == [1, 2, 3]
    resumed = [event.checkpoint for event in events if isinstance(event, RunResumed)]
    assert [bool(name) for name in resumed] == [True, True], resumed
    first, last = [event for event in events if isinstance(event, RunEnded)]
    assert (first.attempt, first.status) == (1, "failed")
    assert (first.reason or "").startswith(f"rank 1 on {HOST}: its process ")
    assert last.status == "finished"
    (other,) = [event for event in events if isinstance(event, RankEnded)]
    assert (other.attempt, other.ended_attempt, other.ended_rank, other.status) == (3, 2, 1, "failed")
    assert (other.reason or "").startswith(f"rank 0 on {HOST}: its process ")
    steps = [event for event in read_history(folder / "journal") if isinstance(event, TrainStepEnded)]
    assert [event.global_step for event in steps] == list(range(1, 46))
    losses = [event.loss for event in read_journal(tmp_path / "alone") if isinstance(event, TrainStepEnded)]
    assert [event.loss for event in steps] == pytest.approx(losses, rel=1e-12)


HANGS = """
import time
from support.rank_runs import RANK, Small, trainer

read = []

def hang(stage, number):
    read.append(stage)
    if RANK == 1 and read.count("data") == 25:
        time.sleep(1000)

trainer(Small(hang), arguments={"collective_timeout_s": 2.0}, run_dir="run").train()
"""


def test_a_rank_that_hangs_in_its_dataloader_is_named_and_all_end(ranks: StartRanks, tmp_path: Path) -> None:
    """Its process runs and shows signs of life; only its place in training shows it."""
    ended = ranks(HANGS).end()
    assert ended.codes == [3, 3], ended
    (end,) = [event for event in read_journal(tmp_path / "run") if isinstance(event, RunEnded)]
    assert (end.status, end.phase) == ("failed", "the training dataloader")
    assert (end.reason or "").startswith(f"rank 1 on {HOST}: no progress for 2 s (collective_timeout_s=2)")
    assert end.reason in ended.err[0]
    assert "Traceback" not in "".join(ended.err)
