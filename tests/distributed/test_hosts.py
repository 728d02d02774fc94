"""Ranks on separate hosts, between which the network fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hosts import Host, TwoHosts
from support.training import read_journal

from events.messages import RunEnded, TrainStepEnded

TRAINS = """
import os, time
from support.rank_runs import RANK, Small, trainer
from trainer.distributed import agent

agent.SILENT_LOOKS = 20  # sooner than a poll of thousands of ranks would allow

def show(stage, step):
    if stage == "train":
        os.write(1, b".")
        time.sleep(0.005)

arguments = {"epochs": None, "max_steps": 10**6, "val_interval_epochs": 100, "peer_timeout_s": 5.0}
trainer(Small(show), arguments=arguments, run_dir="run" if RANK == 0 else None).train()
"""


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Callable[[str], TwoHosts]]:
    started: list[TwoHosts] = []

    def start(text: str) -> TwoHosts:
        program = tmp_path / "rank.py"
        program.write_text(text)
        started.append(TwoHosts(program))
        return started[-1]

    yield start
    for one in started:
        one.close()


def trains(host: Host, steps: int) -> None:
    """Wait for some steps."""
    while steps > 0:
        got = host.read(60)
        assert got, host.errors
        steps -= len(got)


def wait_for_rest(host: Host) -> None:
    """Wait until no step has begun for a while."""
    while host.read(1.0):
        continue


@pytest.mark.timeout(150)
def test_a_short_partition_holds_the_ranks_and_a_long_one_ends_both_by_name(
    two_hosts: Callable[[str], TwoHosts], tmp_path: Path
) -> None:
    """Neither host sees the other's processes, and no connection is closed: only signs of life are missing."""
    both = two_hosts(TRAINS)
    first, second = both.hosts
    trains(second, 30)
    both.cut()
    wait_for_rest(second)
    wait_for_rest(first)
    assert (first.process.poll(), second.process.poll()) == (None, None)
    both.heal()
    trains(first, 30)
    trains(second, 30)

    both.cut()
    cut_s = time.monotonic()
    assert [host.process.wait(60) for host in both.hosts] == [3, 3], [host.errors for host in both.hosts]
    assert time.monotonic() - cut_s < 25, "neither waits for an answer of the other's host"
    (end,) = [event for event in read_journal(tmp_path / "run") if isinstance(event, RunEnded)]
    assert end.status == "failed"
    assert (end.reason or "").startswith("rank 1 on host-1: no sign of life for "), end
    assert "(peer_timeout_s=5)" in (end.reason or "")
    assert (end.reason or "") in first.errors
    assert "the store at 10.77.0.1:29500 does not answer" in second.errors
    for host in both.hosts:
        assert "Traceback" not in host.errors
    steps = [event.global_step for event in read_journal(tmp_path / "run") if isinstance(event, TrainStepEnded)]
    assert steps == list(range(1, len(steps) + 1))
