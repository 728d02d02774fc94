"""Mistakes of users, end to end: each is a clear error with the value, the place and a fix."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
import types
import unittest.mock
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.threads import join_threads, trainer_threads
from support.training import LANES, Diary, Net, failing, make_trainer, read_journal, train

from events.journal.writer import Journal
from events.messages import BackwardEnded, Event, RunEnded, RunStarted
from events.sink import Delivery
from sinks import CSV
from trainer import CallbackInterface, ModuleInterface, Trainer, TrainerArguments, inline, observer
from trainer.callbacks import EMA, EarlyStopping, LearningRateMonitor, ModelStatistics
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
        (
            {"sinks": "console"},
            "sinks must be a list, not 'console'; write sinks=[Console()] (from sinks import Console)",
        ),
        ({"sinks": "TensorBoardLogger"}, "sinks must be a list, not 'TensorBoardLogger'; write sinks=[TensorBoard()]"),
        ({"sinks": "wordpress"}, "sinks must be a list, not 'wordpress'; write sinks=[...] with objects"),
        ({"sinks": CSV}, "sinks must be a list, not the class CSV; write sinks=[CSV()]"),
        ({"sinks": CSV()}, "sinks must be a list, not CSV(path=None); put a single one in brackets: sinks=[...]"),
        ({"sinks": {"csv": CSV()}}, "sinks must be a list, not {'csv': CSV(path=None)}; put a single one in brackets"),
        ({"sinks": ["w&b", "wandb"]}, "sinks[0] must be a sink (an object with open(run)) or a pair of one and a"),
        (
            {"sinks": ["wandb"]},
            "sinks[0] must be a sink (an object with open(run)) or a pair of one and a Delivery, not"
            " 'wandb'; write sinks=[WandB()] (from sinks import WandB)",
        ),
        ({"sinks": [Quiet()]}, re.compile(r"sinks\[0\] must be a sink .*; give it as callbacks=\[\.\.\.\]")),
        ({"callbacks": [CSV()]}, re.compile(r"callbacks\[0\] must be .*; give it as sinks=\[\.\.\.\]")),
        ({"callbacks": EMA}, "callbacks must be a list, not the class EMA; write callbacks=[EMA(...)]"),
        (
            {"callbacks": ["ema"]},
            re.compile(r".*, not 'ema'; write callbacks=\[EMA\(module\)\] \(from trainer.callbacks"),
        ),
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
        (
            {"callbacks": [(Quiet(), Delivery(types=frozenset({RunEnded})))]},
            "callbacks[0] (Quiet) has Delivery(types=...), but its hooks select its events; remove types",
        ),
        (
            {"callbacks": [Quiet(), (Quiet(), Delivery(overflow="catch_up"))]},
            "callbacks[1] (Quiet) cannot catch up from the journal, which holds no outputs; give it overflow='block'",
        ),
        (
            {"sinks": [CSV("m.csv")], "journal": False},
            "sinks[0] (CSV) has overflow='catch_up', which reads the journal; keep the journal, or give (CSV(...),"
            " Delivery(overflow='drop_oldest'))",
        ),
        (
            {"sinks": [(CSV("m.csv"), Delivery(overflow="catch_up", types=frozenset({BackwardEnded})))]},
            "sinks[0] (CSV) has overflow='catch_up', but the journal does not keep BackwardEnded; give",
        ),
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
def test_an_invalid_argument_is_named_when_the_trainer_is_built(given: dict[str, Any], says: Any) -> None:
    with pytest.raises(
        ArgumentsError, match=f"^Trainer: {says.pattern if isinstance(says, re.Pattern) else re.escape(says)}"
    ):
        Trainer(**({"module": Net()} | given))
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((), {"max_epochs": 3}, "Trainer: max_epochs: is not known; set epochs in TrainerArguments"),
        ((), {"epochs": 3}, "Trainer: epochs: is not known; set epochs in TrainerArguments"),
        ((), {"logger": 1, "sink": 2}, "Trainer: logger: is not known; did you mean sinks?; sink: is not known; "),
        ((), {"train_dataset": 1}, "Trainer: train_dataset: is not known; return the data from get_train_dataloader"),
        ((TrainerArguments(), [Quiet]), {}, "Trainer: [<class '"),
    ],
)
def test_an_unknown_argument_is_named_with_the_replacement(arguments: Any, options: Any, says: str) -> None:
    with pytest.raises(ArgumentsError, match=f"^{re.escape(says)}"):
        Trainer(Net(), *arguments, **options)
    with pytest.raises(ArgumentsError, match=r"^Trainer: model: is not known; did you mean module\?$"):
        Trainer(model=Net())


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (lambda t: t.fit(t.module), AttributeError, "build Trainer(module, arguments) and call train()"),
        (lambda t: t.callback_metrics, AttributeError, "train() returns a result with metrics"),
        (lambda t: t.train(resume_from_checkpoint="a"), ArgumentsError, "instead of resume_from_checkpoint, give the"),
        (lambda t: t.train(t.module), ArgumentsError, "Trainer.train() takes no arguments; give them to Trainer"),
        (lambda t: t.test(dataloaders=[]), ArgumentsError, "return the data from get_val_dataloaders or get_test"),
        (lambda t: t.module.log_metrics({}), AttributeError, "call self.log(name, value), or self.log_dict(values)"),
        (lambda t: t.module.save_hyperparameters(), AttributeError, "record them with Trainer(config=...)"),
        (lambda t: t.nothing, AttributeError, "'Trainer' object has no attribute 'nothing'"),
    ],
)
def test_a_method_of_another_trainer_is_named_with_the_replacement(use: Any, error: Any, says: str) -> None:
    trainer = make_trainer(Net())
    with pytest.raises(error, match=re.escape(says)):
        use(copy.copy(trainer))
    assert not hasattr(trainer, "fit")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda self: self.trainer.global_step, "has no trainer; every hook receives"),
        (lambda self: self.device, "has no device; every step receives the device as its third argument"),
        (lambda self: self.log("x", 1.0, prog_bar=True), "log(name, value) has no argument prog_bar; remove it"),
        (
            lambda self: self.log_dict({"x": 1.0}, reduce_fx="max"),
            "log(name, value) has no argument reduce_fx; use reduce",
        ),
    ],
)
@pytest.mark.parametrize("where", ["step", "inline", "observer"])
def test_an_attribute_of_another_trainers_module_is_named_in_a_note(use: Any, says: str, where: str) -> None:

    class Hook(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            use(self)

        if where == "inline":
            inline(on_end_train_step)

    net = Net(act=lambda step: use(net) if where == "step" else None)
    outcome = train(net, callbacks=[] if where == "step" else [Hook()])
    assert type(outcome.error) in (AttributeError, TypeError)
    notes = [note for note in outcome.error.__notes__ if says in note]
    assert len(notes) == 1


# ------------------------------------------------------------------------------------------------- what never fits


def built(target: str, **methods: Any) -> Any:
    """A trainer of a module, or with a callback, that has these methods."""
    if target == "module":
        return make_trainer(type("Own", (Net,), methods)())
    return make_trainer(Net(), callbacks=[type("Own", (CallbackInterface,), methods)()])


async def waits(self: Any, global_step: int) -> None:
    """A hook that would have to be awaited."""


def yields(self: Any, global_step: int) -> Any:
    """A hook that would have to be iterated over."""
    yield


@pytest.mark.parametrize("target", ["module", "callback"])
@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("on_begin_train_epoch", lambda self, epoch: 0, "define it as on_begin_train_epoch(self, global_step, epoch)"),
        ("on_end_train_epoch", lambda self: 0, "Own.on_end_train_epoch(self) cannot take the trainer's arguments"),
        ("on_end_backward", lambda self, loss: 0, "define it as on_end_backward(self, global_step, loss_tensor)"),
        (
            "on_end_val_epoch",
            lambda self, step, *outputs: 0,
            'define it as on_end_val_epoch(self, global_step, *val_step_collated_outputs, key="default")',
        ),
        ("on_end_train", lambda: 0, "Own.on_end_train() takes no argument, not even self; define it as on_end_train("),
        ("on_end_val_epoch", lambda self, step, key, *outputs: 0, "Own.on_end_val_epoch(self, step, key, *outputs)"),
        ("on_begin_train_epoch", lambda self, epoch, global_step: 0, "takes its arguments in another order; define"),
        ("on_end_train", waits, "Own.on_end_train is async, but the trainer calls it on a thread; make it a plain"),
        ("on_end_train", yields, "Own.on_end_train is a generator, whose body would never run; make it a function"),
        ("on_end_train", 3, "Own.on_end_train is 3, not a method; define it as on_end_train(self, global_step)"),
        ("on_end_train_step", lambda self, *, outputs: 0, "Own.on_end_train_step(self, *, outputs) cannot take"),
    ],
)
def test_a_hook_with_a_wrong_signature_is_named_when_the_trainer_is_built(
    target: str, name: str, method: Any, says: str
) -> None:
    with pytest.raises(ArgumentsError, match=re.escape(says)):
        built(target, **{name: method})


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("train_step", lambda self, batch: 0, "define it as train_step(self, global_step, batch, device)"),
        ("val_step", lambda self, batch, batch_idx: 0, "define it as val_step(self, global_step, batch, device)"),
        (
            "get_optimizers_schedulers",
            lambda self: 0,
            "get_optimizers_schedulers(self, estimated_global_steps_per_epoch,",
        ),
        ("get_train_dataloader", lambda self: 0, "define it as get_train_dataloader(self, sampler, batch_size)"),
        (
            "get_val_dataloaders",
            lambda self, batch_size: 0,
            "define it as get_val_dataloaders(self, sampler, batch_size)",
        ),
        ("train_step", lambda self, batch, global_step, device: 0, "takes its arguments in another order; define"),
        ("get_state", lambda self, path: 0, "define it as get_state(self)"),
        ("update_state", lambda self: 0, "define it as update_state(self, state)"),
        ("forward", lambda self, x: x, "Own.forward replaces the method that calls train_step and val_step; rename it"),
    ],
)
def test_a_method_of_the_module_that_cannot_be_called_is_named_when_the_trainer_is_built(
    name: str, method: Any, says: str
) -> None:
    with pytest.raises(ArgumentsError, match=re.escape(says)) as caught:
        built("module", **{name: method, "on_end_train": lambda self: 0})
    assert "Own.on_end_train(self) cannot take" in str(caught.value)


@pytest.mark.parametrize("name", ["should_stop", "bind_optimizers", "around_run", "state_dict", "load_state_dict"])
def test_optional_methods_of_a_callback_are_checked_too(name: str) -> None:
    with pytest.raises(
        ArgumentsError, match=rf"Own.{name}\(self, a, b, c\) cannot take the trainer's arguments; define"
    ):
        built("callback", **{name: lambda self, a, b, c: 0})


def test_methods_of_any_form_are_accepted() -> None:
    methods = {
        "on_begin_train_epoch": lambda self, *args, **kwargs: None,
        "on_end_train_step": unittest.mock.Mock(return_value=None),
        "on_end_train_epoch": staticmethod(functools.partial(lambda said, *args: None, "said")),
        "on_end_val_epoch": classmethod(lambda cls, step, loss, predicted=None, **key: None),
        "on_end_train": staticmethod(math.sqrt),
    }
    assert built("callback", **methods).train().status == "finished"
    assert built("callback", on_end_train=staticmethod(min)) is not None

    class Own(Net):
        @torch.autocast("cpu", enabled=False)  # a wrapper of any arguments
        def forward(self, stage: Any, *rest: Any) -> Any:
            return super().forward(stage, *rest)

    assert train(Own()).result.status == "finished"
    replaced = Net()
    replaced.forward = lambda x: x
    with pytest.raises(ArgumentsError, match=r"Net\.forward replaces the method that calls train_step"):
        make_trainer(replaced)


@pytest.mark.parametrize(
    ("target", "name", "served"),
    [
        ("module", "training_step", "training_step is called train_step here"),
        ("module", "validation_step", "validation_step is called val_step here"),
        ("module", "configure_optimizers", "configure_optimizers is called get_optimizers_schedulers here"),
        ("module", "trian_step", "trian_step is called train_step here"),
        ("callback", "on_train_epoch_end", "on_train_epoch_end is called on_end_train_epoch here"),
        ("callback", "on_step_end", "on_step_end is called on_end_train_step here"),
        ("callback", "on_log", "instead of on_log, give the Trainer a sink"),
        ("module", "on_train_step_end", "on_train_step_end is called on_end_train_step here"),
        ("callback", "on_end_train_epcoh", "on_end_train_epcoh is called on_end_train_epoch here"),
        ("callback", "on_train_epohc_end", "on_train_epohc_end is called on_end_train_epoch here"),
    ],
)
def test_a_method_that_is_never_called_gets_one_warning(caplog: Any, target: str, name: str, served: str) -> None:
    built(target, **{name: lambda self, *args: None})
    assert [record.message for record in caplog.records] == [f"Own has methods that the trainer never calls: {served}"]


def test_helper_methods_get_no_warning(caplog: Any) -> None:
    """Methods that the class calls itself, private ones, those of a library, and names that resemble no hook."""

    class Own(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return self.training_step(batch)

        def training_step(self, batch: Any) -> Any:
            return self.forward_loss(batch)

        def _validation_step(self) -> None: ...
        def get_train_dataset(self) -> None: ...
        def encode(self) -> None: ...

    library = type("Library", (), {"on_train_epoch_end": lambda self: None, "__module__": "lightning.pytorch"})
    callback = type("Mixed", (library, CallbackInterface), {"export": lambda self: None})()
    assert train(Own(), callbacks=[callback, callback]).result.status == "finished"
    assert caplog.records == []


def test_an_incomplete_module_names_the_missing_methods_and_their_names_here() -> None:
    ported = type("Ported", (ModuleInterface,), {"training_step": print, "train_dataloader": lambda self: None})
    lacks = "lacks get_optimizers_schedulers, get_train_dataloader, get_val_dataloaders, train_step, val_step"
    with pytest.raises(TypeError, match=f"^Ported {lacks}; train_dataloader is called get_train_dataloader here$"):
        ported()
    with pytest.raises(TypeError, match=f"^Empty {lacks}; define them"):
        type("Empty", (ModuleInterface,), {})()


# ------------------------------------------------------------------------------------------------- live state

shared: Any = None
"""A global variable that a hook reads."""


class Holder(CallbackInterface):
    """Keeps its arguments, and reads them off the loop's thread."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None: ...


class ReadsGlobal(Holder):
    """Reads a global variable."""

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        assert shared is not None


class ReadsTable(Holder):
    """Reads a table among the global variables."""

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        assert TABLE["shared"] is not None


TABLE: dict[str, Any] = {}


class Slotted(CallbackInterface):
    """Keeps its arguments in a slot; another slot is not set."""

    __slots__ = ("held", "other")

    def __init__(self, held: Any) -> None:
        self.held = held

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None: ...


HELD: dict[str, Callable[[Any, Any], Any]] = {
    "the module": lambda net, optimizer: Holder(net),
    "a part of the module": lambda net, optimizer: Holder(net.linear),
    "a tensor of the module": lambda net, optimizer: Holder({"weights": [net.linear.weight]}),
    "an optimizer": lambda net, optimizer: Holder((optimizer,)),
    "a scheduler": lambda net, optimizer: Holder(torch.optim.lr_scheduler.StepLR(optimizer, 1)),
    "the module (bound method)": lambda net, optimizer: Holder(net.forward_loss),
    "the module (partial)": lambda net, optimizer: Holder(functools.partial(print, net)),
    "the module (closure)": lambda net, optimizer: Holder(lambda: net),
    "the module (object)": lambda net, optimizer: Holder(types.SimpleNamespace(net=net)),
    "the module (weak reference)": lambda net, optimizer: Holder(weakref.ref(net)),
    "the module (global)": lambda net, optimizer: ReadsGlobal(),
    "the module (global table)": lambda net, optimizer: ReadsTable(),
    "the module (slot)": lambda net, optimizer: Slotted(net),
    "the optimizers (bind_optimizers)": lambda net, optimizer: type(
        "Bound", (Holder,), {"bind_optimizers": lambda self, optimizers: None}
    )(),
}


@pytest.mark.parametrize("held", HELD)
def test_a_callback_that_holds_the_module_or_an_optimizer_gets_one_warning(
    caplog: Any, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    net = Net()
    monkeypatch.setitem(globals(), "shared", net)
    monkeypatch.setitem(TABLE, "shared", net)
    make = HELD[held]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    callbacks = [make(net, optimizer), make(net, optimizer)]
    make_trainer(net, callbacks=callbacks)
    (record,) = caplog.records if "closure" not in held else caplog.records[:1]
    assert f" holds {held.partition(' (')[0]}" in record.message
    assert "mark on_end_train_step with @inline, or with @observer to silence this" in record.message


def test_other_callbacks_get_no_warning(caplog: Any) -> None:
    net = Net()
    marked = type("Marked", (Holder,), {"on_end_train_step": observer(lambda self, step, *outputs: None)})
    ending = type("Ending", (CallbackInterface,), {"on_end_train": lambda self, step: None})()
    ending.net = net
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    odd = type("Odd", (), {"__dict__": property(lambda self: 1 / 0)})()
    callbacks = [marked(net), Holder(copy.deepcopy(net)), Holder(Net()), Holder(cyclic), Holder(odd), ending]
    shipped = [EarlyStopping("val_loss"), EMA(net), LearningRateMonitor(net), ModelStatistics(net)]
    make_trainer(net, callbacks=[*callbacks, *shipped])
    assert caplog.records == []


def test_all_invalid_arguments_are_named_at_once() -> None:
    wrong: Any = {"callbacks": [3], "sinks": [4], "run_id": "a/b", "journal": 5}
    with pytest.raises(ArgumentsError) as caught:
        Trainer(Net, {}, **wrong)
    for name in ("module", "arguments", "callbacks[0]", "sinks[0]", "run_id", "journal"):
        assert f"{name} must be" in str(caught.value)


def test_unusual_arguments_are_accepted() -> None:
    callbacks = iter([Quiet(), (Quiet(), Delivery())])
    outcome = train(Net(), callbacks=callbacks, sinks=[Lines("a", "b")], run_id="läuft ..  gut", journal=True)
    assert outcome.result.status == "finished"
    assert os.listdir("runs") == ["läuft ..  gut"]
    assert [report.observer for report in outcome.result.observers if report.observer == "lines"]


@pytest.mark.anyio
@pytest.mark.parametrize("device", ["quantum", "cuda:99", "cpu:x"])
async def test_a_device_that_does_not_exist_is_refused_before_anything_is_written(device: str) -> None:
    trainer = make_trainer(Net(), device=device, journal=True)
    expected = pytest.raises(ArgumentsError, match=f"device = '{device}': cannot be used: .* Available here: 'auto'")
    with expected:
        trainer.train()
    with expected:
        trainer.test()
    with expected:
        async with trainer.run():
            raise AssertionError("must not be entered")
    assert os.listdir() == []
    join_threads()


# ------------------------------------------------------------------------------------------ what a module returns


@pytest.mark.parametrize("rows_at_once", [8, 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda loss: (), r"Net.train_step\(\) returned nothing: return the loss tensor, or a tuple that begins"),
        (lambda loss: {"loss": loss}, "returned a dict with loss; return the loss, or a tuple that begins with it"),
        (lambda loss: loss.item(), r"Net.train_step\(\) returned a float \(.*\) as its first value: that must be the"),
        (lambda loss: (None, loss), "that must be the loss tensor; return None alone to leave the batch out"),
        (lambda loss: ("loss", loss), r"Net.train_step\(\) returned a str \('loss'\) as its first value"),
        (lambda loss: loss.expand(3), r"a loss of shape \(3,\): it must be one number; reduce it with .mean\(\)"),
        (lambda loss: loss.expand(0), r"a loss of shape \(0,\): it must be one number"),
        (lambda loss: loss.detach(), r"Net.train_step\(\) returned a loss that needs no gradient: it does not depend"),
        (lambda loss: torch.tensor(3), r"Net.train_step\(\) returned a loss that needs no gradient"),
    ],
)
def test_the_error_of_a_train_step_without_a_loss_names_the_right_value(
    make: Callable[[torch.Tensor], Any], says: str, rows_at_once: int
) -> None:
    net = Net(train_step=lambda net, step, batch: make(net.forward_loss(batch)[0]))
    outcome = train(net, gpu_batch_size_limit=rows_at_once)
    assert isinstance(outcome.error, StepOutputError)
    assert isinstance(outcome.error, TypeError)
    assert re.search(says, str(outcome.error)), outcome.error
    assert re.fullmatch("stagecast: in (train_step|backward) after global_step 0", outcome.error.__notes__[0])
    assert outcome.of(RunEnded)[0].status == "failed"


@pytest.mark.parametrize("stage", ["val", "test"])
def test_the_error_of_a_val_step_that_returns_a_dict_names_the_right_value(stage: str) -> None:
    def val_step(net: Net, step: int, batch: Any) -> Any:
        return dict(zip(("loss", "logits"), net.forward_loss(batch), strict=True))

    trainer = make_trainer(Net(val_step=val_step, test_data=Net.batches))
    with pytest.raises(StepOutputError, match="a dict with loss, logits; return the loss, or a tuple") as caught:
        trainer.train() if stage == "val" else trainer.test()
    assert caught.value.__notes__ == [f"stagecast: in {stage}_step after global_step {2 if stage == 'val' else 0}"]


@pytest.mark.parametrize("returned", [[], None])
def test_wrong_optimizers_end_the_run_before_its_first_step(returned: Any) -> None:

    diary = Diary()
    outcome = train(Net(optimizers=lambda net: returned), callbacks=[diary])
    assert isinstance(outcome.error, OptimizerError)
    assert outcome.error.__notes__ == ["stagecast: in get_optimizers_schedulers after global_step 0"]
    assert type(outcome.events[0]) is RunStarted
    assert outcome.events[-1].reason == f"OptimizerError: {outcome.error}"
    assert diary.lines == []


def test_an_empty_test_loader_is_named_with_its_key() -> None:

    with pytest.raises(EmptyDataLoader, match=r"get_test_dataloaders\(\) gave no batch for the key 'far': give it"):
        make_trainer(Net(test_data=lambda net, size: {"near": net.batches(size), "far": []})).test()


# ------------------------------------------------------------------------------------------ what user code raises


class Interrupted(KeyboardInterrupt):
    """A host's own kind of interrupt."""


class Unspeakable(Exception):
    """Its text cannot be read."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Aloof(Exception):
    """Refuses notes."""

    def add_note(self, note: str) -> None:
        raise TypeError("no notes")


class Sealed(Exception):
    """Its notes are not a list."""

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


def same(caught: BaseException | None, error: BaseException) -> bool:
    """Whether the exception is the user's own object, without a cause or a context."""
    return caught is error and error.__cause__ is None and error.__context__ is None


@pytest.mark.parametrize("make", KINDS, ids=name_of)
def test_train_raises_any_exception_unchanged(make: Callable[[], BaseException]) -> None:
    error = make()
    outcome = train(failing(error), journal=True, run_id="r")
    assert same(outcome.error, error)
    ended = read_journal("runs/r")[-1]
    cancelled = isinstance(error, (KeyboardInterrupt, SystemExit))
    assert (type(ended), ended.status) == (RunEnded, "cancelled" if cancelled else "failed")
    assert ended.reason.startswith(type(error).__name__)
    join_threads()


@pytest.mark.anyio
@pytest.mark.parametrize("make", KINDS, ids=name_of)
async def test_run_raises_any_exception_unchanged(make: Callable[[], BaseException]) -> None:
    """Only StopIteration cannot leave a coroutine: Python turns it into a RuntimeError."""
    error = make()
    caught: BaseException | None = None
    try:
        async with make_trainer(failing(error)).run():
            pass
    except BaseException as raised:
        caught = raised
    if isinstance(error, StopIteration):
        assert type(caught) is RuntimeError
        caught = caught.__cause__
    assert same(caught, error)
    assert trainer_threads(loops=True) == []


@pytest.mark.parametrize("make", KINDS, ids=name_of)
@pytest.mark.parametrize("lane", ["inline", "observer"])
def test_any_exception_of_a_hook_propagates_unchanged(lane: str, make: Callable[[], BaseException]) -> None:
    error = make()

    class Own(CallbackInterface):
        @LANES[lane]
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            raise error

    outcome = train(Net(), callbacks=[Own()])
    assert same(outcome.error, error)
    # The loop may have ended before an observer's hook failed: what is published then corrects the end.
    ends = [event.status for event in outcome.of(RunEnded)]
    assert ends in (["failed"], ["cancelled"], ["finished", "failed"], ["finished", "cancelled"])
    join_threads()


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
def test_an_invalid_delivery_is_refused_by_its_constructor(options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Delivery(**options)
