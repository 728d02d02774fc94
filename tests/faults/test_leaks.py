"""However often a run saves, it holds no more memory, threads, files or folders than after its first few saves."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from faults.injections import injected
from support.threads import stack_of, wait_until
from torch import nn

from events.checkpoint import disk
from events.checkpoint.files import verify
from events.checkpoint.manifest import STATE_NAME
from events.checkpoint.store import CheckpointStore
from events.messages import CheckpointDeleted, CheckpointFailed, CheckpointSaved, CheckpointStaged, Event
from events.sink import Delivery, RunInfo
from trainer import CallbackInterface, Checkpoints, ModuleInterface, Trainer, TrainerArguments, inline

FLOATS = 2**16  # 256 KiB of weights: memory that a save keeps shows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts file descriptors in /proc")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: these tests do not concern the disk."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None) as folder:
        yield Path(folder)


class Tally:
    """A sink that counts events by type."""

    delivery = Delivery(latency_s=0.001, overflow="block")

    def __init__(self) -> None:
        self.count: Counter[type[Event]] = Counter()

    def open(self, run: RunInfo) -> Tally:
        return self

    def write(self, events: Sequence[Event]) -> None:
        self.count.update(type(event) for event in events)

    def close(self) -> None: ...


class Weights(ModuleInterface):
    """Weights that take no time to train."""

    def __init__(self, floats: int = FLOATS) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(floats), requires_grad=False)
        self.small = nn.Parameter(torch.ones(2))

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return [torch.ones(2)] * 50

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return [torch.ones(2)] if self.small[0] > 0 else None

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return (self.small * batch).square().mean(), batch.expand(64, 2)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return (self.small * batch).square().mean()


class Keeps(CallbackInterface):
    """Has a state on its own thread, and gets the outputs of the epoch."""

    def __init__(self) -> None:
        self.average = torch.zeros(10_000)

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.average = self.average + outputs[0].mean()

    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        self.average = self.average * 0

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Held(NamedTuple):
    """What the process holds."""

    threads: list[str]
    files: int
    nbytes: int

    @classmethod
    def now(cls) -> Held:
        """Once no thread is in the writer of checkpoints, hashes one, or has a folder of the run open."""
        gc.collect()
        writing = {"writer.py", "disk.py", "safe_files.py"}
        wait_until(lambda: not any(stack_of(thread) & writing for thread in sys._current_frames()))
        threads = sorted(one.name for one in threading.enumerate())
        return cls(threads, len(os.listdir("/proc/self/fd")), psutil.Process().memory_info().rss)


class Measures(CallbackInterface):
    """Measures between two steps, when all saves so far are done."""

    def __init__(self, at: Sequence[int], settled: Callable[[int], bool]) -> None:
        self.at = set(at)
        self.settled = settled
        self.found: list[Held] = []

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        if global_step in self.at:
            wait_until(lambda: self.settled(global_step))
            self.found.append(Held.now())

    def assert_flat(self) -> None:
        first, *later = self.found
        assert later
        assert {(*one.threads, one.files) for one in later} == {(*first.threads, first.files)}
        # The allocator keeps a block for some time, now and then: leaked memory shows in every sample.
        assert min(one.nbytes for one in later) - first.nbytes < 8 * FLOATS * 4, [one.nbytes for one in self.found]


def train(
    folder: Path, net: ModuleInterface, callbacks: Sequence[Any], sink: Tally, steps: int, **settings: Any
) -> None:
    arguments = TrainerArguments(epochs=30, device="cpu", val_interval_epochs=10, max_steps=steps)
    settings = {"every_steps": 1, "when_busy": "wait", "weights": False, "at_end": False, "max_failures": 9, **settings}
    options = {"run_dir": folder, "run_id": "leaks", "checkpoints": Checkpoints(**settings)}
    assert Trainer(net, arguments, callbacks=callbacks, sinks=[sink], **options).train().status == "finished"


def store_of(place: Path, steps: list[int]) -> CheckpointStore:
    """The store, with these checkpoints and one note of an attempt, and nothing else."""
    store = CheckpointStore(place / "checkpoints")
    assert [name.step for name in store.names()] == steps
    assert len(os.listdir(store.folder)) == len(steps) + 1
    return store


@pytest.mark.timeout(300)
@injected("saves, first", [(60, 20), (1_000, 100)], 1)
def test_saves_leave_nothing_behind(place: Path, saves: int, first: int) -> None:
    """Memory, threads and open files are those of the first saves; there are no temporary folders."""
    tally = Tally()

    def is_done(step: int) -> bool:
        # The save of this step comes after the hook. Of those before it, all but two are deleted.
        count = tally.count
        return count[CheckpointSaved] == step - 1 and count[CheckpointDeleted] == max(0, step - 3)

    measures = Measures(range(first, saves + 1, (saves - first) // 4), is_done)
    train(place, Weights(), [Keeps(), measures], tally, saves)
    assert tally.count[CheckpointSaved] == tally.count[CheckpointStaged] == saves
    measures.assert_flat()
    store = store_of(place, [saves - 1, saves])
    for name in store.names():
        verify(store.path(name), store.manifest(name))


@pytest.mark.timeout(120)
@injected("name, skips", [("fsync", 0), ("open", 1), ("replace", 0), ("pwrite", 0)], 0)
def test_saves_that_fail_leave_nothing_behind(
    place: Path, name: str, skips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three saves fail, at one call to the disk: the others are complete."""
    original, saving = getattr(os, name), threading.local()
    writes = disk.write_image

    def write(folder: disk.Folder, *args: Any) -> Any:
        saving.left = skips if int(folder.path.name.partition("-")[2].partition(".")[0]) % 3 else None
        return writes(folder, *args)

    def fail(*args: Any, **options: Any) -> Any:
        left = getattr(saving, "left", None)
        if left is not None and (name != "replace" or str(args[0]).endswith(".tmp")):
            saving.left = left - 1 if left else None
            if not left:
                raise OSError(28, "No space left on device")
        return original(*args, **options)

    monkeypatch.setattr(disk, "write_image", write)
    monkeypatch.setattr(os, name, fail)
    tally = Tally()
    ends = (CheckpointSaved, CheckpointFailed)
    measures = Measures((10, 25), lambda step: sum(tally.count[kind] for kind in ends) == step - 1)
    train(place, Weights(), [Keeps(), measures], tally, 26)
    assert (tally.count[CheckpointFailed], tally.count[CheckpointSaved]) == (18, 8)
    measures.assert_flat()
    store = store_of(place, [21, 24])
    assert STATE_NAME in store.manifest(store.names()[0]).files


@injected("runs", [6, 10, 14, 18], 1)
def test_a_finished_run_releases_its_memory(place: Path, runs: int) -> None:
    """Runs of 8 MiB, one after the other in one process, as in a notebook: none keeps its 8 MiB."""
    found: list[Held] = []
    for number in range(runs):
        train(place / str(number), Weights(32 * FLOATS), [Keeps()], Tally(), 3, weights="last")
        wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith("stagecast-")])
        found.append(Held.now())
    # The allocator keeps a block or two from then on, whatever the number of runs: leaked memory grows with it.
    assert found[-1].nbytes - found[0].nbytes < (len(found) - 1) * 8 * 2**20, [one.nbytes for one in found]
    assert {(*one.threads, one.files) for one in found} == {(*found[0].threads, found[0].files)}
