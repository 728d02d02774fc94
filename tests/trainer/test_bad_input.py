"""What users get wrong, from end to end: each a clear error that names what, where and what to do."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from events.journal import Journal
from events.messages import Event, RunEnded, RunStarted
from events.sink import Delivery
from trainer import CallbackInterface, ModuleInterface, Trainer, TrainerArguments, inline
from trainer.errors import ArgumentsError, EmptyDataLoader, OptimizerError, StepOutputError


class Lines(NamedTuple):
    """A sink that is a named tuple: a plain description like any other."""

    name: str
    place: str

    def open(self, run: Any) -> Lines:
        return self

    def write(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


class Opened:
    """Has what a sink's writer has, but cannot be opened."""

    def write(self, events: Sequence[Event]) -> None: ...


class Quiet(CallbackInterface):
    """A callback without hooks."""


# ---------------------------------------------------------------------------------------- what a trainer is given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"module": None}, "module must be an instance of a ModuleInterface, not None"),
        ({"module": torch.nn.Identity()}, "module must be an instance of a ModuleInterface, not Identity()"),
        ({"module": ModuleInterface}, "module must be an instance of a ModuleInterface, not the class ModuleInterface"),
        ({"module": Quiet()}, "module must be an instance of a ModuleInterface, not <"),
        (
            {"arguments": {"epochs": 3}},
            "arguments must be TrainerArguments, not {'epochs': 3}; TrainerArguments.from_dict builds them",
        ),
        ({"arguments": TrainerArguments}, "arguments must be TrainerArguments, not the class TrainerArguments"),
        ({"arguments": "conf.yaml"}, "arguments must be TrainerArguments, not 'conf.yaml'"),
        ({"callbacks": Quiet()}, "callbacks must be a list, not <"),
        ({"callbacks": None}, "callbacks must be a list, not None; put a single one in brackets"),
        ({"callbacks": [Quiet(), Quiet]}, "callbacks[1] must be a CallbackInterface, or a pair of one and a Delivery"),
        ({"callbacks": [print]}, "callbacks[0] must be a CallbackInterface"),
        ({"callbacks": [(Quiet(), "drop_oldest")]}, "callbacks[0] must be a CallbackInterface, or a pair"),
        ({"callbacks": [(Quiet(), Delivery(), 3)]}, "callbacks[0] must be a CallbackInterface, or a pair"),
        ({"callbacks": (Quiet(), Delivery())}, "callbacks[1] must be a CallbackInterface, or a pair"),
        ({"sinks": Lines}, "sinks must be a list, not the class Lines"),
        ({"sinks": "console"}, "sinks must be a list, not 'console'"),
        ({"sinks": [Lines]}, "sinks[0] must be a sink (an object with open(run)) or a pair"),
        ({"sinks": [Opened()]}, "sinks[0] must be a sink (an object with open(run)) or a pair"),
        ({"sinks": [Lines("a", "b"), Path("log.txt"), None]}, "sinks[2] must be a sink"),
        ({"sinks": [(Lines("a", "b"), 5)]}, "sinks[0] must be a sink (an object with open(run)) or a pair"),
        ({"sinks": [(Lines("a", "b"),)]}, "sinks[0] must be a sink (an object with open(run)) or a pair"),
        ({"journal": "runs"}, "journal must be True, False or a Journal, not 'runs'"),
        ({"journal": 0}, "journal must be True, False or a Journal, not 0"),
        ({"journal": {}}, "journal must be True, False or a Journal, not {}"),
        ({"sinks": [Journal()]}, "sinks[0] is a Journal, of which a run has one: give it as journal="),
        ({"sinks": [(Journal(), Delivery())]}, "sinks[0] is a Journal, of which a run has one"),
        ({"run_id": ""}, "run_id must be a name without slashes, not ''; run_dir chooses the folder"),
        ({"run_id": "a/b"}, "run_id must be a name without slashes, not 'a/b'"),
        ({"run_id": ".."}, "run_id must be a name without slashes, not '..'"),
        ({"run_id": "."}, "run_id must be a name without slashes, not '.'"),
        ({"run_id": "a\0"}, r"run_id must be a name without slashes, not 'a\x00'"),
        ({"run_id": 7}, "run_id must be a name without slashes, not 7"),
        ({"run_dir": 7}, "run_dir must be the path of a folder, not 7"),
        ({"run_dir": ""}, "run_dir must be the path of a folder, not ''"),
        ({"run_dir": b"run"}, "run_dir must be the path of a folder, not b'run'"),
    ],
)
def test_what_a_trainer_cannot_use_is_named_when_it_is_built(kit: Any, given: dict[str, Any], says: str) -> None:
    """By its argument and place, with what came and what it must be; nothing is written."""
    with pytest.raises(ArgumentsError, match=f"^Trainer: {re.escape(says)}"):
        Trainer(**({"module": kit.Net()} | given))
    assert os.listdir() == []


def test_everything_that_is_wrong_is_named_at_once(kit: Any) -> None:
    """Nobody has to try five times."""
    wrong: Any = {"callbacks": [3], "sinks": [4], "run_id": "a/b", "journal": 5}
    with pytest.raises(ArgumentsError) as caught:
        Trainer(kit.Net, {}, **wrong)
    for name in ("module", "arguments", "callbacks[0]", "sinks[0]", "run_id", "journal"):
        assert f"{name} must be" in str(caught.value)


def test_what_looks_unusual_is_accepted(kit: Any) -> None:
    """Any iterables, a named tuple as a sink, and odd names of runs."""
    callbacks = iter([Quiet(), (Quiet(), Delivery())])
    outcome = kit.train(kit.Net(), callbacks=callbacks, sinks=[Lines("a", "b")], run_id="läuft ..  gut", journal=True)
    assert outcome.result.status == "finished"
    assert os.listdir("runs") == ["läuft ..  gut"]
    assert [report.observer for report in outcome.result.observers if report.observer == "lines"]


@pytest.mark.anyio
@pytest.mark.parametrize("device", ["quantum", "cuda:99", "cpu:x"])
async def test_a_device_that_does_not_exist_is_refused_before_anything_is_written(kit: Any, device: str) -> None:
    """By all doors, with those that exist."""
    trainer = kit.make_trainer(kit.Net(), device=device, journal=True)
    expected = pytest.raises(ArgumentsError, match=f"device = '{device}': cannot be used: .* Available here: 'auto'")
    with expected:
        trainer.train()
    with expected:
        trainer.test()
    with expected:
        async with trainer.run():
            raise AssertionError("must not be entered")
    assert os.listdir() == []
    kit.join_threads()


# ------------------------------------------------------------------------------------------ what a module returns


def train_step_that_returns(kit: Any, make: Callable[[torch.Tensor], Any]) -> Any:
    class Odd(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, _ = self.forward_loss(batch)
            return make(loss)

    return Odd()


@pytest.mark.parametrize("rows_at_once", [8, 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda loss: None, r"Odd.train_step\(\) returned nothing: return the loss tensor, or a tuple that begins"),
        (lambda loss: (), r"Odd.train_step\(\) returned nothing"),
        (lambda loss: {"loss": loss}, "returned a dict with loss: return the loss, or a tuple that begins with it"),
        (lambda loss: loss.item(), r"Odd.train_step\(\) returned a float \(.*\) as its first value: that must be the"),
        (lambda loss: ("loss", loss), r"Odd.train_step\(\) returned a str \('loss'\) as its first value"),
        (lambda loss: loss.expand(3), r"a loss of shape \(3,\): it must be one number; reduce it with .mean\(\)"),
        (lambda loss: loss.expand(0), r"a loss of shape \(0,\): it must be one number"),
        (lambda loss: loss.detach(), r"Odd.train_step\(\) returned a loss that needs no gradient: it does not depend"),
        (lambda loss: torch.tensor(3), r"Odd.train_step\(\) returned a loss that needs no gradient"),
    ],
)
def test_a_train_step_without_a_loss_says_what_to_return(
    kit: Any, make: Callable[[torch.Tensor], Any], says: str, rows_at_once: int
) -> None:
    """What came, from which method of which class; also where a step has several micro-batches."""
    outcome = kit.train(train_step_that_returns(kit, make), gpu_batch_size_limit=rows_at_once)
    assert isinstance(outcome.error, StepOutputError)
    assert isinstance(outcome.error, TypeError)
    assert re.search(says, str(outcome.error)), outcome.error
    assert re.fullmatch("stagecast: in (train_step|backward) after global_step 0", outcome.error.__notes__[0])
    assert outcome.of(RunEnded)[0].status == "failed"


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_val_step_that_returns_a_dict_says_what_to_return(kit: Any, stage: str) -> None:
    """Its keys are named, and the step is in the note."""

    class Odd(kit.Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, logits = self.forward_loss(batch)
            return {"loss": loss, "logits": logits}

        def get_test_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return self.batches(batch_size)

    trainer = kit.make_trainer(Odd())
    with pytest.raises(StepOutputError, match="a dict with loss, logits: return the loss, or a tuple") as caught:
        trainer.train() if stage == "val" else trainer.test()
    assert caught.value.__notes__ == [f"stagecast: in {stage}_step after global_step {2 if stage == 'val' else 0}"]


@pytest.mark.parametrize("returned", [[], None])
def test_wrong_optimizers_end_the_run_before_its_first_step(kit: Any, returned: Any) -> None:
    """Observers hear of the run and of its end; no epoch begins."""

    class Odd(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return returned

    diary = kit.Diary()
    outcome = kit.train(Odd(), callbacks=[diary])
    assert isinstance(outcome.error, OptimizerError)
    assert outcome.error.__notes__ == ["stagecast: in get_optimizers_schedulers after global_step 0"]
    assert type(outcome.events[0]) is RunStarted
    assert outcome.events[-1].reason == f"OptimizerError: {outcome.error}"
    assert diary.lines == []


def test_an_empty_test_loader_says_which(kit: Any) -> None:
    """The method, the key, and what to do."""

    class Odd(kit.Net):
        def get_test_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return {"near": self.batches(batch_size), "far": []}

    with pytest.raises(EmptyDataLoader, match=r"get_test_dataloaders\(\) gave no batch for the key 'far': give it"):
        kit.make_trainer(Odd()).test()


# ------------------------------------------------------------------------------------------ what user code raises


class Interrupted(KeyboardInterrupt):
    """A host's own kind of interrupt."""


class Unspeakable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Aloof(Exception):
    """Takes no notes."""

    def add_note(self, note: str) -> None:
        raise TypeError("no notes")


class Sealed(Exception):
    """Its notes are something else."""

    def __init__(self) -> None:
        self.__notes__ = 5  # type: ignore[assignment]


KINDS: list[Callable[[], BaseException]] = [
    lambda: Interrupted("mine"),
    lambda: SystemExit("mine"),
    lambda: GeneratorExit("mine"),
    lambda: StopIteration("mine"),
    lambda: StopAsyncIteration("mine"),
    Unspeakable,
    Aloof,
    Sealed,
    lambda: ExceptionGroup("mine", [ValueError("a"), ExceptionGroup("b", [KeyError("c")])]),
    lambda: BaseExceptionGroup("mine", [KeyboardInterrupt()]),
]


def name_of(make: Any) -> str:
    return type(make()).__name__


def failing(kit: Any, error: BaseException) -> Any:
    class Failing(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 2:
                raise error
            return self.forward_loss(batch)

    return Failing()


def same(caught: BaseException | None, error: BaseException) -> bool:
    """Whether it is the user's own, with nothing around or behind it."""
    return caught is error and error.__cause__ is None and error.__context__ is None


@pytest.mark.parametrize("make", KINDS, ids=name_of)
def test_any_exception_comes_out_of_train_as_itself(kit: Any, make: Callable[[], BaseException]) -> None:
    """Whatever its kind: the observers are told of the end first, and nothing is left running."""
    error = make()
    outcome = kit.train(failing(kit, error), journal=True, run_id="r")
    assert same(outcome.error, error)
    ended = kit.read_journal("runs/r")[-1]
    cancelled = isinstance(error, (KeyboardInterrupt, SystemExit))
    assert (type(ended), ended.status) == (RunEnded, "cancelled" if cancelled else "failed")
    assert ended.reason.startswith(type(error).__name__)
    kit.join_threads()


@pytest.mark.anyio
@pytest.mark.parametrize("make", KINDS, ids=name_of)
async def test_any_exception_comes_out_of_run_as_itself(kit: Any, make: Callable[[], BaseException]) -> None:
    """At the end of the block; only StopIteration cannot leave a coroutine, Python makes a RuntimeError of it."""
    error = make()
    caught: BaseException | None = None
    try:
        async with kit.make_trainer(failing(kit, error)).run():
            pass
    except BaseException as raised:
        caught = raised
    if isinstance(error, StopIteration):
        assert type(caught) is RuntimeError
        caught = caught.__cause__
    assert same(caught, error)
    assert kit.trainer_threads(loops=True) == []


@pytest.mark.parametrize("make", KINDS, ids=name_of)
@pytest.mark.parametrize("lane", ["inline", "observer"])
def test_any_exception_of_a_hook_comes_out_as_itself(kit: Any, lane: str, make: Callable[[], BaseException]) -> None:
    """On the loop's thread or on the callback's own."""
    error = make()

    class Observing(CallbackInterface):
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            raise error

    class Inline(CallbackInterface):
        @inline
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            raise error

    outcome = kit.train(kit.Net(), callbacks=[Inline() if lane == "inline" else Observing()])
    assert same(outcome.error, error)
    assert len(outcome.of(RunEnded)) == 1
    kit.join_threads()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overflow": "drop"}, "overflow='drop'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"capacity": 0}, "capacity=0"),
        ({"latency_s": 0}, "latency_s=0"),
        ({"timeout_s": "soon"}, "timeout_s='soon'"),
        ({"types": [RunEnded]}, "frozenset of event types"),
        ({"types": frozenset({"RunEnded"})}, "frozenset of event types"),
    ],
)
def test_a_delivery_that_cannot_be_is_refused_where_it_is_made(options: Any, says: str) -> None:
    """It would otherwise train on silently, or hang."""
    with pytest.raises(ValueError, match=says):
        Delivery(**options)


@pytest.mark.parametrize("where", ["train_step", "val_step"])
def test_a_failed_run_leaves_no_dataloader_workers(kit: Any, where: str) -> None:
    """Though its exception, which the caller holds, keeps the frames of the loop alive."""

    class Net(kit.Net):
        def loader(self) -> Any:
            dataset = torch.utils.data.TensorDataset(self.x, self.y)
            return torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=2)

        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            return self.loader()

        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return self.loader()

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if where == "train_step":
                raise ValueError("boom")
            return self.forward_loss(batch)

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            raise ValueError("boom")

    gc.disable()
    try:
        outcome = kit.train(Net())
        assert isinstance(outcome.error, ValueError)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()
