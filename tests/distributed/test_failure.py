"""Naming the rank that failed, from what all ranks show of themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from support.threads import wait_until
from torch.utils.data import DataLoader, Dataset, _utils

from trainer.data.loaders import end_iteration
from trainer.distributed.failure import Beat, Identity, LocalProcesses, Peers
from trainer.distributed.worker_signals import count_runs, open_guarded

HERE = Identity.here()


def peers_of(*hosts: str) -> Peers:
    return Peers([Identity(host, 0, "") for host in hosts], 60.0, 0.0)


def beat(number: int, tick: int = 1, phase: str = "train_step", *, ended: bool = False) -> Beat:
    return Beat(number, 1, tick, phase, tick, 0, ended)


def test_a_host_of_which_no_rank_gives_a_sign_is_lost() -> None:
    """One that is silent beside others is not: its neighbours would see its process die."""
    peers = peers_of("a", "b", "b", "c")
    for second in range(1, 12):
        for rank in (0, 1) if second < 5 else (0,):
            peers.hear(rank, beat(second, second), second)
        peers.hear(3, beat(second, second), second)
        if second < 9:
            assert peers.silent(second, 10, range(4)) is None, "rank 2 alone is silent"
    assert peers.silent(14.0, 10, range(4)) is None
    failure = peers.silent(14.1, 10, [0, 1, 2])
    why = "no sign of life for 10.1 s (peer_timeout_s=10)"
    assert str(failure) == f"rank 1 on b: {why} (last seen in train_step after global_step 4)"
    assert peers.is_silent(1, 14.1, 10)
    assert not peers.is_silent(0, 14.1, 10)


def test_the_same_beat_twice_is_no_sign_of_life_and_a_rank_that_has_ended_needs_none() -> None:
    peers = peers_of("a", "b", "c")
    for second in range(20):
        peers.hear(0, beat(second), second)
        peers.hear(1, beat(7), second)
        peers.hear(2, beat(7, ended=True), second)
    failure = peers.silent(19.0, 10, [1, 2])
    assert failure is not None
    assert failure.rank == 1
    assert peers.silent(19.0, 10, [2]) is None
    assert peers.has_ended(2)


@pytest.mark.parametrize(
    ("places", "culprit"),
    [
        ([(5, "backward"), (5, "backward"), (4, "the training dataloader")], 2),
        ([(5, "backward"), (5, "the training dataloader"), (5, "backward")], 1),
        ([(5, "the training dataloader"), (5, "backward")], 0),
        ([(9, "waiting for the other ranks"), (5, "val_step")], 1),
        ([(5, "backward"), (5, "backward")], None),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(places: list[tuple[int, str]], culprit: int | None) -> None:
    """Their beats go on. Ranks that all do the same are not judged."""
    peers = peers_of(*["a"] * len(places))
    for second in range(0, 70, 10):
        for rank, (tick, phase) in enumerate(places):
            peers.hear(rank, beat(second, tick, phase), second)
        assert peers.stalled(second) is None
    failure = peers.stalled(60.5)
    assert (failure.rank if failure is not None else None) == culprit
    if failure is not None:
        assert failure.phase == places[failure.rank][1]
        assert "collective_timeout_s=60" in failure.text
    peers.hear(0, beat(99, 10), 60.6)
    assert peers.stalled(61.0) is None, "one has moved"


def test_entries_are_deleted_only_when_every_rank_has_read_them() -> None:
    peers = peers_of("a", "a")
    peers.hear(0, Beat(1, 1, 1, "train_step", 1, read=30), 0.0)
    assert peers.read_by_all == 0
    assert not peers.all_ended
    peers.hear(1, Beat(1, 1, 1, "train_step", 1, read=20, ended=True), 0.0)
    assert peers.read_by_all == 20
    assert not peers.all_ended
    peers.hear(0, Beat(2, 1, 1, "train_step", 1, read=30, ended=True), 0.0)
    assert peers.all_ended


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs the process descriptors of Linux")
def test_the_death_of_a_process_on_this_host_is_seen_before_it_is_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identities = [HERE, Identity(HERE.host, child.pid, HERE.space), Identity("elsewhere", child.pid, "other")]
        processes = LocalProcesses(identities, 0)
        assert processes.take_dead() == []
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert processes.take_dead() == [1]
        assert processes.take_dead() == []
        processes.close()
    assert LocalProcesses(identities, 0).take_dead() == [1], "dead already"


class Blocking(Dataset[int]):
    """Its last row waits for a byte that never comes."""

    def __init__(self) -> None:
        self.ends = os.pipe()

    def __len__(self) -> int:
        return 9

    def __getitem__(self, number: int) -> int:
        return number if number < 8 else len(os.read(self.ends[0], 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_ignore_a_stop_during_a_run_and_end_with_it_at_any_other_time(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that hangs, which torch only terminates. The user's own start of a worker is kept."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    rows, started = Blocking(), os.pipe()
    loader = DataLoader(rows, num_workers=1, worker_init_fn=lambda worker: os.write(started[1], b"s") and None)

    def begin() -> tuple[Any, Any]:
        batches: Any = open_guarded(loader, lambda: iter(loader))
        assert os.read(started[0], 9) == b"s"
        return batches, batches._workers[0]

    count_runs(1)
    try:
        batches, worker = begin()
        os.kill(worker.pid, number)
        assert [int(next(batches)) for _ in range(8)] == list(range(8))
        assert worker.is_alive()
        end_iteration(batches, loader)
        wait_until(lambda: not worker.is_alive(), "a worker is left")
        batches, worker = begin()
    finally:
        count_runs(-1)
    _utils.signal_handling._remove_worker_pids(id(batches))  # the death is no error here
    batches._worker_pids_set = False
    os.kill(worker.pid, number)
    worker.join(20)
    assert worker.exitcode == -number
    end_iteration(batches, loader)
    for end in (*rows.ends, *started):
        os.close(end)
