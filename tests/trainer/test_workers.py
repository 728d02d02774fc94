"""When a run has ended, in whatever way, the workers of its dataloaders are gone and its exception keeps no data."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import queue
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.threads import WAIT_S, join_threads, wait_until_failed
from support.training import Net, make_trainer
from torch.utils.data import DataLoader, Dataset

from events.errors import RunCancelled
from trainer import CallbackInterface, Checkpoints, Delivery, Trainer, inline


class Rows(Dataset[Any]):
    """Rows of which one may raise in the worker that reads it; the loop reports each epoch to them."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.on_epoch: Callable[[], object] = lambda: None

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise ValueError("this row is broken")
        return torch.full((4,), float(index)), torch.ones(1)

    def __len__(self) -> int:
        return 24

    def set_epoch(self, epoch: int) -> None:
        self.on_epoch()

    def __getstate__(self) -> dict[str, Any]:
        return {"broken": self.broken}


class Reads(Net):
    """Trains on rows that two workers read, and calls ``on_reach`` at a place of the run.

    Args:
        fails_at: The place whose second visit raises.
    """

    def __init__(self, persistent: bool = False, broken: int | None = None, fails_at: str = "") -> None:
        super().__init__(act=lambda step: self.reach("train_step"))
        self.persistent = persistent
        self.rows = Rows(broken)
        self.rows.on_epoch = lambda: self.reach("set_epoch")
        self.on_reach: dict[str, Callable[[], object]] = {fails_at: nth(2, failing)}
        self.handed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.waits = False

    def reach(self, place: str) -> None:
        self.on_reach.get(place, lambda: None)()

    def loader(self, batch_size: int, **options: Any) -> Any:
        return DataLoader(self.rows, batch_size, num_workers=2, persistent_workers=self.persistent, **options)

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return self.loader(batch_size, sampler=sampler(self.rows))

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        self.reach("get_val_dataloaders")
        return self.loader(batch_size)

    def get_test_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        return self.loader(batch_size)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.reach("val_step")
        return self.forward_loss(batch)

    def wait_for_cancellation(self) -> None:
        self.waits = True
        wait_until_failed(self.handed.get(timeout=WAIT_S))


class Observing(CallbackInterface):
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        raise ValueError("a hook")


class Inline(Observing):
    on_end_train_step = inline(Observing.on_end_train_step)  # type: ignore[assignment]


class ByHand(Reads):
    """Gives a generator that keeps its iteration in a variable, and fails within it."""

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        batches = iter(self.loader(batch_size, sampler=sampler(self.rows)))
        yield next(batches)
        raise ValueError("this place is the generator")


def failing() -> None:
    raise ValueError("the place")


def nth(number: int, function: Callable[[], object]) -> Callable[[], object]:
    """Call a function at the n-th time."""
    left = iter(range(number - 1))
    return lambda: None if next(left, None) is not None else function()


@pytest.fixture(autouse=True)
def _without_collections() -> Iterator[None]:
    """The garbage collector must not be what ends the workers; and no test may leave any to the next."""
    assert not multiprocessing.active_children()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        for one in multiprocessing.active_children():
            one.kill()
            one.join()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    ("options", "callbacks"),
    [
        ({"broken": 9}, []),
        ({"fails_at": "train_step"}, []),
        ({"fails_at": "get_val_dataloaders"}, []),
        ({"fails_at": "val_step"}, []),
        ({"fails_at": "set_epoch"}, []),
        ({}, [Inline()]),
        ({}, [Observing()]),
    ],
    ids=["row", "train_step", "get_val_dataloaders", "val_step", "set_epoch", "inline hook", "observer"],
)
def test_a_failed_run_has_no_workers_while_its_exception_is_kept(
    options: dict[str, Any], callbacks: list[CallbackInterface], persistent: bool
) -> None:
    with pytest.raises(Exception, match=r"broken|place|hook") as caught:
        make_trainer(Reads(persistent, **options), callbacks=callbacks, epochs=3).train()
    assert not multiprocessing.active_children()
    assert caught.value.__traceback__ is not None


def test_a_generator_that_fails_with_its_iteration_in_a_variable_leaves_no_workers() -> None:
    with pytest.raises(ValueError, match="generator") as caught:
        make_trainer(ByHand(), epochs=1).train()
    assert not multiprocessing.active_children()
    assert caught.value is not None


def test_a_finished_run_has_no_workers() -> None:
    """Nor those of an earlier epoch's dataloader during the run; a limit within the data leaves none either."""
    counts: list[int] = []
    module = Reads(persistent=True)
    module.on_reach["train_step"] = lambda: counts.append(len(multiprocessing.active_children()))
    make_trainer(module, epochs=4, max_train_steps_per_epoch=2, val_interval_epochs=0).train()
    assert not multiprocessing.active_children()
    assert counts == [2] * 8
    make_trainer(Reads(), max_steps=1, max_val_steps_per_epoch=1).train()
    assert not multiprocessing.active_children()


def test_a_failed_test_has_no_workers() -> None:
    with pytest.raises(ValueError, match="place"):
        make_trainer(Reads(fails_at="val_step")).test()
    assert not multiprocessing.active_children()


async def cancelled(module: Reads, trainer: Trainer) -> BaseException:
    """Leave the block by an exception once the module waits for that; return the run's own."""
    with pytest.raises(EOFError, match="body"):
        async with trainer.run() as run:
            module.handed.put(run)
            while not module.waits:  # noqa: ASYNC110  # set by the loop's thread
                await anyio.sleep(0.01)
            raise EOFError("the body")
    with pytest.raises(RunCancelled) as caught:
        await run.result()
    return caught.value


@pytest.mark.anyio
@pytest.mark.parametrize("persistent", [False, True])
async def test_a_run_that_is_cancelled_before_its_first_batch_has_no_workers(persistent: bool) -> None:
    module = Reads(persistent)
    module.on_reach["set_epoch"] = module.wait_for_cancellation
    error = await cancelled(module, make_trainer(module))
    assert not multiprocessing.active_children()
    assert error.__traceback__ is not None


@pytest.mark.anyio
@pytest.mark.parametrize("place", ["val_step", "get_val_dataloaders", "set_epoch"])
async def test_a_resumed_run_that_is_cancelled_while_it_catches_up_has_no_workers(place: str, tmp_path: Path) -> None:
    """In its validation, and while it replays the data of the epoch."""
    own = {"run_dir": tmp_path / "run", "run_id": "one", "checkpoints": Checkpoints(every_steps=1)}
    own |= {"resume_data": "replay", "epochs": 2, "val_interval_steps": 2}  # within the epoch, whose data is open
    first = Reads()
    stop_at = "train_step" if place == "set_epoch" else "val_step"
    first.on_reach[stop_at] = nth(2, lambda: first.handed.get(timeout=WAIT_S).stop())
    async with make_trainer(first, **own).run() as run:
        first.handed.put(run)
    assert (await run.result()).status == "stopped"

    module = Reads()
    module.on_reach[place] = module.wait_for_cancellation
    error = await cancelled(module, make_trainer(module, resume="auto", **own))
    assert not multiprocessing.active_children()
    assert error.__traceback__ is not None


class Seen(Reads):
    """Keeps weak references to its dataloaders and batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[weakref.ref[Any]] = []

    def loader(self, batch_size: int, **options: Any) -> Any:
        self.seen.append(weakref.ref(made := super().loader(batch_size, **options)))
        return made

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.seen.append(weakref.ref(batch[0]))
        return super().train_step(global_step, batch, device)


def test_a_run_whose_exception_was_handled_is_freed_without_a_collection() -> None:
    """Nothing of the run refers to its dataloader and its batches in a circle."""
    module = Seen(fails_at="train_step")
    seen = module.seen
    with contextlib.suppress(ValueError):
        make_trainer(module).train()
    del module
    join_threads()
    assert [one() for one in seen] == [None] * 3


@pytest.mark.anyio
async def test_the_handle_of_a_failed_run_keeps_no_data() -> None:
    module = Seen(fails_at="train_step")
    with pytest.raises(ValueError, match="place") as caught:
        async with make_trainer(module, callbacks=[(Inline(), Delivery(on_error="disable"))]).run() as run:  # type: ignore[list-item]
            pass
    assert module.seen[0]() is None
    with pytest.raises(ValueError, match="place"):
        await run.result()
    assert caught.value is not None
