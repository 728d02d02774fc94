"""A fork while a checkpoint is written harms neither side: the child ends normally, the checkpoint is complete."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from faults import resume_runs as runs
from faults.child import run_job
from faults.injections import injected
from support.threads import WAIT_S

from events.checkpoint import disk
from events.checkpoint.files import verify
from events.checkpoint.store import CheckpointStore
from trainer import Checkpoints

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

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def verified_steps(run_dir: Path) -> list[int]:
    store = CheckpointStore(run_dir / "checkpoints")
    for name in store.names():
        verify(store.path(name), store.manifest(name))
    return [name.step for name in store.names()]


@injected("how, door", FORKS, 0)
def test_a_fork_during_a_save_harms_neither_side(how: str, door: str, tmp_path: Path) -> None:
    """From the main thread or from a hook, with the interpreter's finalisation or without: the child exits with 0.

    The run continues, its first checkpoint is complete, and a run that is resumed from it is exact.
    """
    reports, status, errors = run_job("fork", run_dir=tmp_path / "run", how=how, door=door)
    assert (status, errors) == (0, "")
    assert reports == {"ended": [0], "result": [["finished", 18]]}
    assert verified_steps(tmp_path / "run") == [3, 6, 9, 12, 15, 18]
    last = runs.attempt(runs.Case(), tmp_path / "run", resume="step-3.a1")
    runs.assert_continues(last, tmp_path / "run", runs.straight(runs.Case()))


def test_memory_of_a_child_where_the_slab_was_stays_its_own() -> None:
    """A forked child has no slab, so closing it unmaps nothing; the parent's slab is unchanged."""
    reports, status, errors = run_job("slab")
    assert status == 0, errors
    assert reports == {"ended": [0], "kept": [True]}


@pytest.mark.timeout(120)
@injected("workers, data", [(2, "map"), (2, "iterable"), (2, "kept"), (4, "map")], 1)
def test_workers_that_are_forked_during_saves_work(
    workers: int, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of an epoch are forked while a checkpoint is written: data, run and checkpoints are exact."""
    case = runs.Case(workers=workers, data=data, augment=True, resume_data="replay")
    saving, begun = threading.Semaphore(0), threading.Semaphore(0)
    writes = disk.write_image
    left = iter("12")

    def write(*args: Any) -> Any:
        saving.release()
        if next(left, None):  # after the last checkpoint no epoch begins
            assert begun.acquire(timeout=WAIT_S)
        return writes(*args)

    monkeypatch.setattr(disk, "write_image", write)
    one = runs.prepare(case, tmp_path, checkpoints=Checkpoints(every_epochs=1, keep_last=9, at_end=False))
    train_step = one.net.train_step

    def get_train_dataloader(*args: Any) -> Any:
        loader = type(one.net).get_train_dataloader(one.net, *args)
        if one.net.working_on:  # the checkpoint of the epoch before is staged: the writer writes it from now on
            assert saving.acquire(timeout=WAIT_S)
        return loader

    def step(global_step: int, batch: Any, device: Any) -> Any:
        if global_step in (7, 13):  # the workers are forked, and have sent data
            begun.release()
        return train_step(global_step, batch, device)

    one.net.get_train_dataloader, one.net.train_step = get_train_dataloader, step
    one.result = one.trainer.train()
    assert verified_steps(tmp_path) == [6, 12, 18]
    runs.assert_continues(one, tmp_path, runs.straight(case))
