"""Several ranks train what one process trains: weights, losses, metrics, outputs, and one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.otlp_receiver import free_port
from support.ranks import StartRanks
from support.shared_runs import CASES, Case, check_same, train
from support.training import read_journal

from events.messages import RunStarted, TrainStepEnded

PROGRAM = """
import os, torch
from pathlib import Path
from support.shared_runs import CASES, train
from trainer.distributed.ddp import DdpStrategy
from trainer.distributed.strategy import Share

found = [train(CASES[number], Path("run-%d" % number)) for number in {numbers!r}]
torch.save(found, f"found-{{os.environ['RANK']}}.pt")

def total(strategy, check, *, is_whole):  # as on an accelerator, where the host does not read the weight of a step
    gradient, strategy._tally.grad = strategy._tally.grad, None
    return Share(*(number.clone() for number in gradient.unbind())), None

DdpStrategy.total = total
found = [train(CASES[number], Path("unread-%d" % number)) for number in {unread!r}]
torch.save(found, f"unread-{{os.environ['RANK']}}.pt")
"""
UNREAD = (1, 3, 4)
EXPECTED = ("train_step() returned None", "find_unused_parameters=True was specified")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world_size", "numbers"), [(2, range(len(CASES))), (4, (0, 2, 3, 6, 7))])
def test_ranks_train_what_one_process_trains(
    ranks: StartRanks, tmp_path: Path, world_size: int, numbers: tuple[int, ...]
) -> None:
    """In float64, for numbers of rows that leave ranks without a block, and whatever a module does with its batches."""
    numbers = tuple(numbers)
    started = ranks(PROGRAM.format(numbers=numbers, unread=UNREAD if world_size == 2 else ()), world_size)
    alone = [train(CASES[number], tmp_path / f"alone-{number}", strategy="single") for number in numbers]
    started.end(280).check(*EXPECTED)
    everyone = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=False) for rank in range(world_size)]
    for rank, found in enumerate(everyone):
        for number, one, other in zip(numbers, alone, found, strict=True):
            check_same(one, other, (rank, CASES[number]))
            assert other["run_id"] == everyone[0][numbers.index(number)]["run_id"]
            assert other["folder"] == str(tmp_path / f"run-{number}")
        unread = torch.load(tmp_path / f"unread-{rank}.pt", weights_only=False)
        for number, other in zip(UNREAD, unread, strict=False):  # none with four ranks
            check_same(alone[numbers.index(number)], other, (rank, number, "the weight is not read"))
    folder = tmp_path / "run-0"
    events = read_journal(folder)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))  # one history, of rank 0
    assert {(event.rank, event.attempt) for event in events} == {(0, 1)}
    steps = [event for event in events if isinstance(event, TrainStepEnded)]
    before = read_journal(tmp_path / "alone-0")
    losses = [event.loss for event in before if isinstance(event, TrainStepEnded)]
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-12)  # of all ranks, at every step
    assert [step.rows for step in steps[:13]] == [16] * 12 + [11]
    assert sum(isinstance(event, RunStarted) for event in events) == 1
    assert json.loads((folder / "arguments.json").read_text())["strategy"] == "auto"


def test_a_group_of_one_rank_trains_what_a_process_alone_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train(Case(rows=77), tmp_path / "alone")  # the last micro-batch of an epoch has a single row
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **address}.items():
        monkeypatch.setenv(name, value)
    check_same(alone, train(Case(rows=77), tmp_path / "ddp", strategy="ddp"), "ddp")
