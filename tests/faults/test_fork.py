"""A fork while a checkpoint is written harms neither side: the child ends as it would have, the checkpoint is whole."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from events.checkpoint import disk
from events.checkpoint.files import verify
from events.checkpoint.store import CheckpointStore
from trainer import Checkpoints

INJECTIONS = {
    "test_a_fork_during_a_save_harms_neither_side": (0, 8),
    "test_workers_that_are_forked_during_saves_work": (1, 4),
}
FORKS = [
    ("sys.exit", "asyncio"),
    ("hook", "train"),
    ("sys.exit", "train"),
    ("sys.exit", "trio"),
    ("os._exit", "asyncio"),
    ("os._exit", "train"),
    ("process", "train"),
    ("process", "trio"),
]
WAIT_S = 20.0

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def whole(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that there are; each is whole."""
    store = CheckpointStore(run_dir / "checkpoints")
    for name in store.names():
        verify(store.path(name), store.manifest(name))
    return [name.step for name in store.names()]


def test_a_fork_during_a_save_harms_neither_side(runs: Any, child: Any, tmp_path: Path, injection: int) -> None:
    """From the main thread or from a hook, with an end of the interpreter or without: the child exits with 0.

    The run goes on, its first checkpoint is whole, and a run that is resumed from it is exact.
    """
    how, door = FORKS[injection]
    said, status, errors = child("fork", run_dir=tmp_path / "run", how=how, door=door)
    assert status == 0, errors
    assert errors == ""
    assert said == {"ended": [0], "result": [["finished", 18]]}
    assert whole(tmp_path / "run") == [3, 6, 9, 12, 15, 18]
    last = runs.attempt(runs.Case(), tmp_path / "run", resume="step-3.a1")
    runs.assert_continues(last, tmp_path / "run", runs.straight(runs.Case()))


def test_memory_of_a_child_where_the_slab_was_stays_its_own(child: Any) -> None:
    """Forked children have no slab, so nothing of theirs is unmapped when they let it go; the parent's is as it was."""
    said, status, errors = child("slab")
    assert status == 0, errors
    assert said == {"ended": [0], "kept": [True]}


@pytest.mark.timeout(120)
def test_workers_that_are_forked_during_saves_work(
    runs: Any, tmp_path: Path, injection: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an epoch are forked while a checkpoint is written: data, run and checkpoints are as they must be."""
    workers, data = ((2, "map"), (2, "iterable"), (2, "kept"), (4, "map"))[injection]
    case = runs.Case(workers=workers, data=data, augment=True, resume_data="replay")
    saving = threading.Semaphore(0)
    begun = threading.Semaphore(0)
    writes = disk.write_image
    left = iter("12")

    def write(*args: Any) -> Any:
        saving.release()
        if next(left, None):  # after the last one no epoch begins
            assert begun.acquire(timeout=WAIT_S)
        return writes(*args)

    monkeypatch.setattr(disk, "write_image", write)
    one = runs.prepare(case, tmp_path, checkpoints=Checkpoints(every_epochs=1, keep_last=9, at_end=False))
    train_step = one.net.train_step

    def get_train_dataloader(*args: Any) -> Any:
        loader = type(one.net).get_train_dataloader(one.net, *args)
        if one.net.working_on:  # the checkpoint of the epoch before is taken: it is being written from now on
            assert saving.acquire(timeout=WAIT_S)
        return loader

    def step(global_step: int, batch: Any, device: Any) -> Any:
        if global_step in (7, 13):  # the workers have been forked, and have given data
            begun.release()
        return train_step(global_step, batch, device)

    one.net.get_train_dataloader, one.net.train_step = get_train_dataloader, step
    one.result = one.trainer.train()
    assert whole(tmp_path) == [6, 12, 18]
    runs.assert_continues(one, tmp_path, runs.straight(case))
