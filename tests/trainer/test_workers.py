"""However a run ends, the workers of its dataloaders are gone when it has ended, and its exception keeps no data."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import queue
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from events.errors import RunCancelled
from trainer import CallbackInterface, Checkpoints, Delivery, ModuleInterface, Trainer, inline


class Rows(Dataset[Any]):
    """Rows of which one may raise in the worker that reads it; the loop announces each epoch to it."""

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


class Reads(ModuleInterface):
    """Trains on rows that two workers read, and calls what a test has put at a place in the run."""

    def __init__(self, persistent: bool = False, broken: int | None = None) -> None:
        super().__init__()
        self.persistent = persistent
        self.rows = Rows(broken)
        self.linear = torch.nn.Linear(4, 1)
        self.at: dict[str, Callable[[], object]] = {}
        self.run: Any = None
        self.handed: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def come_to(self, place: str) -> None:
        self.at.get(place, lambda: None)()

    def loader(self, batch_size: int, **options: Any) -> Any:
        return DataLoader(self.rows, batch_size, num_workers=2, persistent_workers=self.persistent, **options)

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.01)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return self.loader(batch_size, sampler=sampler(self.rows))

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        self.come_to("get_val_dataloaders")
        return self.loader(batch_size)

    def get_test_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        return self.loader(batch_size)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.come_to("train_step")
        return torch.nn.functional.mse_loss(self.linear(batch[0]), batch[1])

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.come_to("val_step")
        return torch.nn.functional.mse_loss(self.linear(batch[0]), batch[1])


class Inline(CallbackInterface):
    """Fails in a step hook on the loop's thread."""

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        raise ValueError("a hook")


class Observing(CallbackInterface):
    """Fails in a step hook on its own thread."""

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        raise ValueError("a hook")


class ByHand(Reads):
    """Gives a generator that keeps its iteration in a variable, and fails within it."""

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        def generate() -> Iterator[Any]:
            batches = iter(self.loader(batch_size, sampler=sampler(self.rows)))
            yield next(batches)
            raise ValueError("the generator")

        return generate()


def failing() -> None:
    raise ValueError("the place")


def nth(number: int, function: Callable[[], object]) -> Callable[[], object]:
    """Calls a function at the n-th time."""
    left = iter(range(number - 1))
    return lambda: None if next(left, None) is not None else function()


@pytest.fixture(autouse=True)
def _without_collections() -> Iterator[None]:
    """The collector must not be what ends the workers; and no test may leave any to the next."""
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


WAYS: dict[str, Callable[[bool], tuple[Reads, Any]]] = {
    "a row fails in its worker": lambda persistent: (Reads(persistent, broken=9), None),
    "a train step fails": lambda persistent: (_placed(Reads(persistent), "train_step"), None),
    "an inline hook fails": lambda persistent: (Reads(persistent), Inline()),
    "an observer fails": lambda persistent: (Reads(persistent), Observing()),
    "the validation dataloaders fail": lambda persistent: (_placed(Reads(persistent), "get_val_dataloaders"), None),
    "a validation step fails": lambda persistent: (_placed(Reads(persistent), "val_step"), None),
    "the data's set_epoch fails": lambda persistent: (_with_epoch(Reads(persistent)), None),
}


def _placed(module: Reads, place: str) -> Reads:
    module.at[place] = nth(2, failing)
    return module


def _with_epoch(module: Reads) -> Reads:
    module.rows.on_epoch = nth(2, failing)
    return module


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_failed_run_has_no_workers_while_its_exception_is_kept(kit: Any, way: str, persistent: bool) -> None:
    module, callback = WAYS[way](persistent)
    trainer = kit.make_trainer(module, callbacks=[callback] if callback else [], epochs=3)
    with pytest.raises(Exception, match=r"broken|place|hook") as caught:
        trainer.train()
    assert not multiprocessing.active_children()
    assert caught.value.__traceback__ is not None


def test_a_finished_run_has_no_workers(kit: Any) -> None:
    counts: list[int] = []
    module = Reads(persistent=True)
    module.at["train_step"] = lambda: counts.append(len(multiprocessing.active_children()))
    kit.make_trainer(module, epochs=4, max_train_steps_per_epoch=2, val_interval_epochs=0).train()
    assert not multiprocessing.active_children()
    assert counts == [2] * 8, "workers of an earlier epoch's dataloader live on"


def test_a_limit_within_the_data_and_a_stop_leave_no_workers(kit: Any) -> None:
    kit.make_trainer(Reads(), max_steps=1, max_val_steps_per_epoch=1).train()
    assert not multiprocessing.active_children()


def test_a_failed_test_has_no_workers(kit: Any) -> None:
    module = _placed(Reads(), "val_step")
    with pytest.raises(ValueError, match="place"):
        kit.make_trainer(module).test()
    assert not multiprocessing.active_children()


def test_a_generator_that_fails_with_its_iteration_in_a_variable_leaves_no_workers(kit: Any) -> None:
    with pytest.raises(ValueError, match="generator") as caught:
        kit.make_trainer(ByHand(), epochs=1).train()
    assert not multiprocessing.active_children()
    assert caught.value is not None


async def _cancelled(module: Reads, trainer: Trainer) -> BaseException:
    """Run it and leave the block by an exception once the module waits for that; return the run's own."""
    with pytest.raises(EOFError, match="body"):
        async with trainer.run() as run:
            module.run = run
            module.handed.put(run)
            while not module.rows.__dict__.get("reached"):  # noqa: ASYNC110  # set by the loop's thread
                await anyio.sleep(0.01)
            raise EOFError("the body")
    with pytest.raises(RunCancelled) as caught:
        await run.result()
    return caught.value


def _wait_for_cancellation(kit: Any, module: Reads) -> Callable[[], None]:
    def wait() -> None:
        module.rows.__dict__["reached"] = True
        kit.wait_until_failed(module.handed.get(timeout=kit.WAIT_S))

    return wait


@pytest.mark.anyio
@pytest.mark.parametrize("persistent", [False, True])
async def test_a_run_that_is_cancelled_before_its_first_batch_has_no_workers(kit: Any, persistent: bool) -> None:
    module = Reads(persistent)
    module.rows.on_epoch = _wait_for_cancellation(kit, module)
    error = await _cancelled(module, kit.make_trainer(module))
    assert not multiprocessing.active_children()
    assert error.__traceback__ is not None


@pytest.mark.anyio
@pytest.mark.parametrize("place", ["val_step", "get_val_dataloaders", "replay"])
async def test_a_resumed_run_that_is_cancelled_while_it_catches_up_has_no_workers(
    kit: Any, place: str, tmp_path: Any
) -> None:
    module = Reads()
    own = {"run_dir": tmp_path / "run", "run_id": "one", "checkpoints": Checkpoints(every_steps=1)}
    own |= {"resume_data": "replay", "epochs": 2, "val_interval_steps": 2}  # within the epoch, whose data is open
    stop = nth(2, lambda: module.handed.get(timeout=kit.WAIT_S).stop())
    module.at["train_step" if place == "replay" else "val_step"] = stop
    async with kit.make_trainer(module, **own).run() as run:
        module.handed.put(run)
    assert (await run.result()).status == "stopped"

    module = Reads()
    wait = _wait_for_cancellation(kit, module)
    if place == "replay":
        module.rows.on_epoch = wait
    else:
        module.at[place] = wait
    error = await _cancelled(module, kit.make_trainer(module, resume="auto", **own))
    assert not multiprocessing.active_children()
    assert error.__traceback__ is not None


def test_a_run_whose_exception_was_handled_is_freed_without_a_collection(kit: Any) -> None:
    """The module, its dataloader and a batch: nothing of the run refers to them in a circle."""
    seen: list[weakref.ref[Any]] = []

    class Seen(Reads):
        def loader(self, batch_size: int, **options: Any) -> Any:
            seen.append(weakref.ref(made := super().loader(batch_size, **options)))
            return made

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            seen.append(weakref.ref(batch[0]))
            return super().train_step(global_step, batch, device)

    module = _placed(Seen(), "train_step")
    with contextlib.suppress(ValueError):
        kit.make_trainer(module).train()
    del module
    kit.join_threads()
    assert len(seen) == 3
    assert [one() for one in seen] == [None] * 3


@pytest.mark.anyio
async def test_the_handle_of_a_failed_run_keeps_no_data(kit: Any) -> None:
    seen: list[weakref.ref[Any]] = []

    class Seen(Reads):
        def loader(self, batch_size: int, **options: Any) -> Any:
            seen.append(weakref.ref(made := super().loader(batch_size, **options)))
            return made

    module = _placed(Seen(), "train_step")
    with pytest.raises(ValueError, match="place") as caught:
        async with kit.make_trainer(module, callbacks=[(Inline(), Delivery(on_error="disable"))]).run() as run:
            pass
    assert [one() for one in seen] == [None]
    with pytest.raises(ValueError, match="place"):
        await run.result()
    assert caught.value is not None
