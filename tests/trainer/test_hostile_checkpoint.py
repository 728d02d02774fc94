"""Crafted checkpoints are refused before they harm the process, its memory or its disk."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.run_folder import RunFolder
from support.training import Net

from events.errors import CheckpointDamaged, CheckpointMismatch
from events.messages import CheckpointRejected
from trainer.callbacks import EMA, EarlyStopping
from trainer.data.rng import capture_rng, restore_rng
from trainer.data.tensors import clone_tensors
from trainer.hooks.capture import EpochOutputs
from trainer.hooks.readback import DeviceReadback
from trainer.loop.checkpointing import Checkpointing
from trainer.loop.optimization import Optimization
from trainer.loop.saved_state import checked_optimizer, checked_scaler, checked_scheduler, restore_optimizer

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------- random generators


def changed(state: Any, index: int, value: Any) -> Any:
    return (*state[:index], value, *state[index + 1 :])


@pytest.mark.parametrize(
    ("generator", "index", "value"),
    [
        ("numpy", 0, "PCG64"),
        ("numpy", 1, np.zeros(623, np.uint32)),
        ("numpy", 1, np.zeros(624, np.uint64)),
        ("numpy", 1, np.zeros((1, 624), np.uint32)),
        ("numpy", 1, [0] * 624),
        ("numpy", 2, 10**9),
        ("numpy", 2, -1),
        ("numpy", 2, 1.0),
        ("numpy", 3, 2),
        ("numpy", 4, float("nan")),
        ("numpy", 4, "0.5"),
        ("numpy", 2, 2**80),
        ("python", 0, 9),
        ("python", 1, (0,) * 624),
        ("python", 1, (*[0] * 624, 625)),
        ("python", 2, "0.5"),
        ("torch", slice(0), torch.zeros(16, dtype=torch.uint8)),
        ("torch", slice(0), torch.zeros(5_056, dtype=torch.uint8)),
        ("torch", slice(0), torch.zeros(5_056)),
    ],
)
def test_an_invalid_state_of_one_generator_changes_none(generator: str, index: Any, value: Any) -> None:
    """NumPy's reads beyond its state with a wrong position."""
    good = capture_rng(CPU)
    bad = good | {generator: value if generator == "torch" else changed(good[generator], index, value)}
    drawn = random.random(), np.random.rand(), torch.rand(1)
    before = capture_rng(CPU)
    with pytest.raises(CheckpointDamaged, match="random generators cannot be restored"):
        restore_rng(bad, CPU)
    after = capture_rng(CPU)
    assert before["python"] == after["python"]
    assert torch.equal(before["torch"], after["torch"])
    assert all(map(np.array_equal, before["numpy"], after["numpy"]))
    restore_rng(good, CPU)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn


# ------------------------------------------------------------------------------ optimizers, schedulers, the scale

ADAM, SGD, LBFGS, OPTIM = torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS, torch.optim
KINDS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (ADAM, {"amsgrad": True}),
    (ADAM, {"lr": torch.tensor(0.1), "betas": (0.9, 0.99)}),
    (ADAM, {"fused": True}),
    (OPTIM.AdamW, {"fused": True}),
    (SGD, {"momentum": 0.9, "fused": True}),
    (SGD, {}),
    (OPTIM.Adagrad, {"fused": True}),
    (OPTIM.RMSprop, {"momentum": 0.9, "centered": True}),
    (OPTIM.Rprop, {}),
    (OPTIM.ASGD, {}),
    (OPTIM.NAdam, {}),
    (OPTIM.RAdam, {}),
    (OPTIM.Adamax, {}),
    (OPTIM.Adadelta, {}),
    (LBFGS, {"line_search_fn": "strong_wolfe"}),
    *[(kind, {}) for name in ("Adafactor", "Muon") if (kind := getattr(OPTIM, name, None)) is not None],
]


def make(kind: Any, **options: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    shapes = [(6, 8), (6, 8)] if kind.__name__ == "Muon" else [(6, 8), (5,), ()]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    made = kind(parameters, **options)
    made.loss = lambda: sum(one.square().sum() for one in parameters)
    return made


def step(optimizer: Any) -> list[torch.Tensor]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = optimizer.loss()
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    return [one.detach().clone() for group in optimizer.param_groups for one in group["params"]]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_an_optimizer_of_torch_with_restored_state_takes_the_same_step(kind: Any, options: dict[str, Any]) -> None:
    first, second = make(kind, **copy.deepcopy(options)), make(kind, **copy.deepcopy(options))
    step(first)
    weights, state = step(first), copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for one, value in zip(second.param_groups[0]["params"], weights, strict=True):
            one.copy_(value)
    restore_optimizer(second, checked_optimizer(second, state, "c"))
    assert all(map(torch.equal, step(first), step(second)))


@pytest.mark.parametrize("craft", ["small", "number", "integers", "complex", "list"])
@pytest.mark.parametrize(("kind", "options"), [one for one in KINDS if one != (SGD, {})])
def test_state_that_does_not_fit_its_parameter_is_refused(kind: Any, options: dict[str, Any], craft: str) -> None:
    """A fused kernel would write beyond moments that are smaller than the parameter."""
    first, second = make(kind, **copy.deepcopy(options)), make(kind, **copy.deepcopy(options))
    step(first)
    made = {
        "small": lambda one: torch.zeros(4),
        "number": lambda one: torch.zeros(()),
        "integers": lambda one: one.to(torch.int8),
        "complex": lambda one: one.to(torch.complex64),
        "list": lambda one: [[one]],
    }[craft]
    state = copy.deepcopy(first.state_dict())
    names = [name for name, value in state["state"][0].items() if isinstance(value, torch.Tensor) and value.numel() > 1]
    assert names
    for name in names:
        if kind is LBFGS and craft == "number":
            continue  # as others in its state, and no kernel reads it
        crafted = copy.deepcopy(state)
        crafted["state"][0][name] = made(crafted["state"][0][name])
        with pytest.raises(
            CheckpointMismatch, match=rf"c: state of {kind.__name__} has '{name}' of parameter 0, which"
        ):
            checked_optimizer(second, crafted, "c")


def test_counters_are_numbers_and_a_subclass_may_have_state_of_its_own() -> None:
    class Mine(ADAM):
        pass

    first = make(Mine)
    step(first)
    state = first.state_dict()
    state["state"][0]["seen"] = torch.zeros(17)
    checked_optimizer(make(Mine), state, "c")
    for name, problem in (("exp_avg", "exp_avg"), ("step", "not that of a number")):
        crafted = copy.deepcopy(state)
        crafted["state"][0][name] = torch.zeros(17)
        with pytest.raises(CheckpointMismatch, match=problem):
            checked_optimizer(make(Mine), crafted, "c")


@pytest.mark.parametrize("fits", [True, False])
def test_a_run_resumes_with_its_own_switches_and_refuses_state_that_does_not_fit_before_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    whole = Optimization.state_dict

    def crafted(self: Optimization) -> dict[str, Any]:
        state = copy.deepcopy(whole(self))
        state["optimizers"][0]["param_groups"][0]["foreach"] = False
        if not fits and state["optimizers"][0]["state"]:
            state["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(())
        return state

    def adam(net: Net) -> Any:
        return [made.append(ADAM(net.parameters(), lr=0.01)) or made[-1]], []  # type: ignore[func-returns-value]

    made: list[torch.optim.Optimizer] = []
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "state_dict", crafted)
        folder.train(Net(optimizers=adam), every_steps=1)
    outcome = folder.train(Net(optimizers=adam), resume="auto", checkpoints=False, epochs=2)
    if fits:
        assert outcome.result.status == "finished"
    else:
        assert isinstance(outcome.error, CheckpointMismatch)
        assert "'exp_avg' of parameter 0" in str(outcome.error)
    assert made[-1].param_groups[0]["foreach"] is None


MISTYPED: list[dict[str, Any]] = [
    {"position": {"batches": "many"}},
    {"position": {"limits": [1, 2]}},
    {"position": {"generators_at_iter": [1]}},
    {"position": {"rng_at_iter": 5}},
    {"frozen": [[]]},
    {"global_step": -1},
    {"global_step": 2**80},
    {"epoch": 1.5},
    {"rng": 7},
    {"metrics": []},
    {"callbacks": [3]},
    {"callbacks": [{"key": [], "kind": None, "state": 1}]},
    {"metrics": {"validation": {}, "epoch": {}, "validated_at": 1, "seen": 3, "followed_loss": (0, 0)}},
    {"optimizers": {"a": 1}},
    {"schedulers": [5]},
]


def test_states_of_other_types_are_damage_and_an_older_checkpoint_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Checkpointing._tree

    def crafted(self: Checkpointing) -> Any:
        state = tree(self)
        return state | MISTYPED[state["global_step"] - 2] if state["global_step"] > 1 else state

    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "_tree", crafted)
        folder.train(every_steps=1, keep_last=99, train_batch_size=1)
    outcome = folder.train(resume="auto", checkpoints=False, train_batch_size=1)
    assert outcome.result.status == "finished"
    rejected = outcome.of(CheckpointRejected)
    assert len(rejected) == len(MISTYPED)
    assert all("is not the state of a run" in one.error for one in rejected)


class Foreign(torch.optim.Optimizer):
    """Has state of unusual shapes, created at once and at the first step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        for one in self.param_groups[0]["params"]:
            self.state[one]["early"] = torch.zeros(3)

    def step(self, closure: Any = None) -> None:
        for one in self.param_groups[0]["params"]:
            self.state[one]["late"] = torch.zeros(7)


def test_state_of_shapes_that_nothing_explains_is_restored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """State that exists already is checked against its shape."""
    first = make(Foreign)
    first.step()
    state = first.state_dict()
    checked_optimizer(make(Foreign), state, "c")
    assert "late of Foreign has shapes that are not those of its parameters" in caplog.text
    state["state"][0]["early"] = torch.zeros(2)
    with pytest.raises(CheckpointMismatch, match="early"):
        checked_optimizer(make(Foreign), state, "c")


def group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["param_groups"][0].update(changes)


def test_how_an_optimizer_computes_is_not_taken_from_a_checkpoint() -> None:
    """Hyperparameters are."""
    first, second = make(ADAM, fused=True, lr=0.5), make(ADAM, lr=0.1)
    step(first)
    state = first.state_dict()
    group(foreach=True, capturable=True, differentiable=True, maximize=True, name="mine", betas=[0.5, 0.6])(state)
    restore_optimizer(second, checked_optimizer(second, state, "c"))
    got = second.param_groups[0]
    assert [got[name] for name in ("fused", "foreach", "capturable", "differentiable")] == [None, None, False, False]
    assert (got["lr"], got["maximize"], got["name"], got["betas"]) == (0.5, True, "mine", (0.5, 0.6))
    state["state"][0]["step"] = torch.tensor(3.0, dtype=torch.float64)
    restore_optimizer(first, checked_optimizer(first, state, "c"))
    assert first.state[first.param_groups[0]["params"][0]]["step"].dtype is torch.float32  # as its kernel reads it


@pytest.mark.parametrize(
    "craft",
    [
        group(lr="1"),
        group(lr=None),
        group(lr=True),
        group(lr=[0.1]),
        group(lr=10**400),
        group(lr=torch.ones(2)),
        group(lr=1j),
        group(betas=(0.9,)),
        group(betas=(0.9, "x")),
        group(betas=0.9),
        group(amsgrad=1),
        group(maximize="yes"),
        group(params=[0, 0, 1]),
        group(params=[0, [], 1]),
        group(params=3),
        group(params=[0]),
        lambda state: state.update(param_groups=3),
        lambda state: state.update(param_groups=[]),
        lambda state: state.update(param_groups=[[]]),
        lambda state: state.pop("param_groups"),
        lambda state: state.update(state=[1]),
        lambda state: state.update(state={0: [1]}),
        lambda state: state.pop("state"),
    ],
)
def test_an_invalid_state_of_an_optimizer_is_refused(craft: Callable[[Any], None]) -> None:
    state = make(ADAM).state_dict()
    craft(state)
    with pytest.raises(CheckpointMismatch, match=r"c.*reset_optimizers_schedulers"):
        checked_optimizer(make(ADAM), state, "c")


def test_a_learning_rate_stays_a_number_or_a_tensor() -> None:
    number, tensor = make(ADAM, lr=0.5), make(ADAM, lr=torch.tensor(0.25))
    for own, other, value in ((number, tensor, 0.25), (tensor, number, 0.5)):
        rate = checked_optimizer(own, other.state_dict(), "c")["param_groups"][0]["lr"]
        assert (type(rate), float(rate)) == (type(own.param_groups[0]["lr"]), value)


SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: OPTIM.lr_scheduler.StepLR(o, 2),
    lambda o: OPTIM.lr_scheduler.MultiStepLR(o, [1, 3]),
    lambda o: OPTIM.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    lambda o: OPTIM.lr_scheduler.OneCycleLR(o, 0.1, 10),
    lambda o: OPTIM.lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=False),
    lambda o: OPTIM.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    lambda o: OPTIM.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lambda o: OPTIM.lr_scheduler.SequentialLR(
        o, [OPTIM.lr_scheduler.LinearLR(o), OPTIM.lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    lambda o: OPTIM.lr_scheduler.ChainedScheduler([OPTIM.lr_scheduler.LinearLR(o), OPTIM.lr_scheduler.StepLR(o, 2)]),
    lambda o: OPTIM.swa_utils.SWALR(o, 0.05),
]


@pytest.mark.parametrize("build", SCHEDULERS)
def test_the_state_of_a_scheduler_returns_and_nothing_else_does(build: Callable[[Any], Any]) -> None:
    """Torch would set any attribute, among them the optimizer and methods."""

    def stepped(scheduler: Any, times: int) -> Any:
        for _ in range(times):
            scheduler.optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, OPTIM.lr_scheduler.ReduceLROnPlateau) else []))
        return scheduler

    first, second = stepped(build(make(SGD)), 4), build(make(SGD))
    state = {name: value for name, value in copy.deepcopy(first.state_dict()).items() if not callable(value)}
    second.load_state_dict(checked_scheduler(second, state, "c"))
    second.optimizer.param_groups[0]["lr"] = first.optimizer.param_groups[0]["lr"]
    for _ in range(3):
        assert stepped(first, 1).get_last_lr() == stepped(second, 1).get_last_lr()
    some = next((name for name, value in state.items() if type(value) in (int, float)), "_schedulers")
    for crafted in ({"optimizer": 1}, {"step": 1}, {"get_lr": 1}, {some: "x"}, {some: [1]}, {some: torch.ones(2)}):
        with pytest.raises(CheckpointMismatch, match=f"c: '{next(iter(crafted))}'|c: 'state'"):
            checked_scheduler(second, state | crafted, "c")
    for crafted in ([], 3, "state"):
        with pytest.raises(CheckpointMismatch, match="c: 'state'"):
            checked_scheduler(second, crafted, "c")


@pytest.mark.parametrize("crafted", [[], {"scale": "1"}, {"growth_interval": None}, {"_growth_tracker": 10**30}])
def test_the_state_of_the_loss_scale_is_numbers(crafted: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    state = scaler.state_dict()
    assert checked_scaler(scaler, state | {"scale": 8.0, "junk": 1}, "c") == state | {"scale": 8.0}
    with pytest.raises(CheckpointMismatch, match="the state of the loss scale"):
        checked_scaler(scaler, state | crafted if isinstance(crafted, dict) else crafted, "c")


@pytest.mark.parametrize(
    "crafted",
    [
        {"average": {"weight": [0.0], "bias": torch.zeros(2)}},
        {"average": {"weight": torch.zeros(2, 3, dtype=torch.int8)}},
        {"average": {"weight": torch.zeros(2, 3, dtype=torch.complex64)}},
        {"steps": "3"},
        {"steps": -1},
        {"decay": None},
    ],
)
def test_an_average_of_another_type_is_refused(crafted: dict[str, Any]) -> None:
    ema = EMA(torch.nn.Linear(3, 2))
    good = {"steps": 3, "decay": 0.999, "average": {"weight": torch.zeros(2, 3)}}
    ema.load_state_dict(good)
    with pytest.raises(CheckpointMismatch, match="EMA does not fit: "):
        ema.load_state_dict(good | crafted)


def test_a_state_dict_with_other_values_than_tensors_is_refused_by_their_names(tmp_path: Path) -> None:
    folder, net = RunFolder(tmp_path), Net()
    net.get_state = lambda: dict(net.state_dict()) | {"linear.bias": [0.0]}  # type: ignore[method-assign]
    folder.train(net, every_steps=1)
    outcome = folder.train(resume="auto")
    assert isinstance(outcome.error, CheckpointMismatch)
    assert "linear.bias is a list there and a tensor here" in str(outcome.error)


@pytest.mark.parametrize(
    "crafted",
    [3, [], {}, {"summary": 3}, {"summary": {"a": "x"}}, {"summary": {1: 1.0}}, {"summary": {}, "_loss_sum": "x"}],
)
def test_readings_that_are_not_numbers_are_damage(crafted: Any) -> None:
    readback = DeviceReadback.__new__(DeviceReadback)
    with pytest.raises(CheckpointDamaged, match="the checkpoint's readings"):
        readback.restore(crafted)


@pytest.mark.parametrize(
    "crafted",
    [
        3,
        {"steps": 2, "nbytes": 1, "columns": 3},
        {"steps": 2, "nbytes": 1, "columns": [{"stacked": 5}]},
        {"steps": 2, "nbytes": 1, "columns": [{"stacked": torch.zeros(3)}]},
        {"steps": 2, "nbytes": 1, "columns": [{"joined": torch.zeros(3), "rows": [1, 9]}]},
        {"steps": 2, "nbytes": 1, "columns": [{"values": [1], "there": []}]},
        {"steps": "many", "nbytes": 1, "columns": []},
    ],
)
def test_outputs_that_are_not_of_the_epochs_steps_are_damage(crafted: Any) -> None:
    with pytest.raises(CheckpointDamaged, match="the checkpoint's outputs"):
        EpochOutputs(10**6, "a hook", None).restore({0: crafted})


@pytest.mark.parametrize("crafted", [{"best": "x"}, {"waited": None}])
def test_what_early_stopping_has_counted_is_numbers(crafted: dict[str, Any]) -> None:
    stopping = EarlyStopping("val_loss", patience=3)
    with pytest.raises(CheckpointMismatch, match="not a number"):
        stopping.load_state_dict(stopping.state_dict() | crafted)


# ------------------------------------------------------------------------------------- tensors under many names


def test_a_tensor_that_occurs_often_is_copied_once() -> None:
    tensor = torch.zeros(4)
    copy = clone_tensors({"a": [tensor] * 300, "b": {"c": tensor}, "d": torch.ones(1)})
    assert copy["b"]["c"] is not tensor
    assert {id(one) for one in copy["a"]} == {id(copy["b"]["c"])}


def test_outputs_that_share_a_tensor_are_restored_in_the_memory_of_one() -> None:
    rows = torch.zeros(6, 2)
    columns: list[dict[str, Any]] = [{"joined": rows, "rows": [3, 3]}, {"values": [rows, rows], "there": [True] * 2}]
    collector = EpochOutputs(10**6, "a hook", None)
    collector.restore({0: {"steps": 2, "nbytes": 1, "columns": columns * 50}})
    memory = {part.untyped_storage().data_ptr() for column in collector._columns for part in column}
    assert len(memory) == 1
    assert rows.data_ptr() not in memory
