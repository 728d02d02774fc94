"""`EMA`: its averages, its results, its validation, and an exact resume."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import load_file
from support.command import Stagecast
from support.training import Net, make_trainer, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from events.errors import CheckpointMismatch, StagecastError
from events.messages import StepSkipped, ValEpochEnded, ValEpochStarted
from trainer import CallbackInterface, Checkpoints, ModuleInterface, inline
from trainer.callbacks import EMA
from trainer.errors import ArgumentsError
from trainer.loop.control import Control

EACH_STEP = Checkpoints(every_minutes=None, every_steps=1, when_busy="wait")


class Reference(CallbackInterface):
    """Averages with torch's own class, which copies the whole module."""

    def __init__(self, module: nn.Module, decay: float, **options: Any) -> None:
        self.averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), **options)
        self.module = module

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.averaged.update_parameters(self.module)


class Rich(Net):
    """Has a frozen parameter, a shared one, a batch norm, and one in half precision."""

    def __init__(self, **options: Any) -> None:
        super().__init__(rows=32, **options)
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward_loss(self, batch: Any) -> Any:
        x, y = batch
        predicted = self.linear(self.frozen(self.second(self.first(self.norm(x)))) * self.scale.float())
        return nn.functional.mse_loss(predicted, y), predicted


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_part_of_the_module_is_accepted_trained_or_frozen() -> None:
    net = Rich()
    assert train(net, callbacks=[EMA(net.first), EMA(net.frozen)]).error is None


@pytest.mark.parametrize(
    "use", [EMA.weights, lambda ema: ema.applied().__enter__(), lambda ema: ema.copy_to(nn.Linear(1, 1))]
)
def test_there_is_no_average_before_the_first_step(use: Any) -> None:
    with pytest.raises(StagecastError, match="has not averaged any step"):
        use(EMA(nn.Linear(1, 1)))


def test_averaged_weights_are_not_trained() -> None:
    """Otherwise a hook that stays in the block would train the averaged weights."""
    net = Net()
    ema = EMA(net)
    block = ema.applied()

    class Forgets(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            if global_step == 2:
                block.__enter__()

    error = train(net, callbacks=[ema, Forgets()], epochs=2).error
    assert isinstance(error, StagecastError)
    assert "a step was trained inside the block" in str(error)
    assert "raised by EMA.on_end_train_step at global_step 3" in error.__notes__


def test_applying_them_twice_is_refused() -> None:
    """The inner block would restore the averages as the module's own weights."""
    net = Net()
    ema = EMA(net)
    train(net, callbacks=[ema])
    own = copy.deepcopy(net.state_dict())
    with pytest.raises(StagecastError, match="is nested"), ema.applied(), ema.applied():
        pass
    assert same(net.state_dict(), own)
    with ema.applied():
        assert same(net.state_dict(), ema.weights())


def test_the_average_of_another_model_is_refused(tmp_path: Path) -> None:
    class Wide(Net):
        def get_state(self) -> dict[str, Any]:
            return {}

        def update_state(self, state: dict[str, Any]) -> None: ...

    class Other(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2, bias=False)

    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": EACH_STEP}
    net, other = Wide(), Other()
    train(net, callbacks=[EMA(net)], **run)
    error = train(other, callbacks=[EMA(other)], epochs=2, resume="auto", reset_optimizers_schedulers=True, **run).error
    assert isinstance(error, CheckpointMismatch)
    assert "linear.bias does not exist here" in str(error)
    assert "linear.weight has the shape (1, 4) there and (2, 4) here" in str(error)


# ------------------------------------------------------------------------------------------------ what it averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("options", [{}, {"gpu_batch_size_limit": 2}, {"clip_grads": True}])
def test_it_is_torchs_average_to_the_last_bit(decay: float, options: dict[str, Any]) -> None:
    """`AveragedModel` is the reference."""
    net = Net(rows=64)
    ema, reference = EMA(net, decay), Reference(net, decay)
    result = train(net, callbacks=[ema, reference], epochs=2, **options).result
    assert ema.steps == result.global_step == 16
    assert same(ema.weights(), reference.averaged.module.state_dict())
    assert same(ema.weights(), net.state_dict()) == (decay == 0.0)


def test_nothing_but_weights_is_copied() -> None:
    """A module may hold a large data set that cannot be copied."""

    class Data(list[Any]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the data set was copied")

        __copy__ = __reduce_ex__ = __deepcopy__  # type: ignore[assignment]

    net = Net()
    net.data = Data([1])
    ema = EMA(net)
    assert train(net, callbacks=[ema]).result.status == "finished"
    assert list(ema.state_dict()["average"]) == ["linear.weight", "linear.bias"]


def test_frozen_parameters_are_not_averaged() -> None:
    net = Rich()
    ema = EMA(net, 0.5)
    train(net, callbacks=[ema])
    assert set(ema.state_dict()["average"]) == {
        *("linear.weight", "linear.bias", "norm.weight", "norm.bias", "first.weight", "second.bias", "scale")
    }
    weights = ema.weights()
    assert weights.keys() == net.state_dict().keys()
    assert torch.equal(weights["first.weight"], weights["second.weight"])
    assert not torch.equal(weights["first.weight"], net.first.weight)
    assert torch.equal(weights["frozen.weight"], net.frozen.weight)
    assert torch.equal(weights["norm.running_mean"], net.norm.running_mean)


def test_a_parameter_that_is_unfrozen_joins_at_the_next_epoch() -> None:
    class Unfreezes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.linear.bias.requires_grad_(False)

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.SGD([self.linear.weight, self.linear.bias], lr=0.1)], []

        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            self.linear.bias.requires_grad_(epoch >= 1)

    net = Unfreezes()
    ema = EMA(net, 0.5)
    seen: list[torch.Tensor] = []

    class Look(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            seen.append(net.linear.bias.detach().clone())

    train(net, callbacks=[ema, Look()], epochs=2)
    expected = torch.lerp(torch.lerp(torch.zeros(1), seen[2], 0.5), seen[3], 0.5)
    assert torch.equal(ema.weights()["linear.bias"], expected)


def test_half_precision_is_averaged_in_float32() -> None:
    """In bfloat16 a thousandth of a small difference is lost, so the average would not move."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    part = nn.Module()
    part.weight = weight
    ema = EMA(part, 0.999)
    ema.on_end_train_step(1)
    weight.data.fill_(1.25)
    for step in range(2, 1002):
        ema.on_end_train_step(step)
    average = ema.state_dict()["average"]["weight"]
    assert average.dtype is torch.float32
    torch.testing.assert_close(average, torch.full((3,), 1.25 - 0.25 * 0.999**1000), atol=1e-4, rtol=0)
    assert ema.weights()["weight"].dtype is torch.bfloat16


def test_skipped_steps_do_not_count() -> None:
    net = Net(rows=64, scales={3: math.nan})
    ema, third = EMA(net, 0.9), EMA(net, 0.9, every_n_steps=3)
    outcome = train(net, callbacks=[ema, third], non_finite="skip")
    assert len(outcome.of(StepSkipped)) == 1
    assert (outcome.result.global_step, ema.steps, third.steps) == (7, 7, 2)
    assert all(tensor.isfinite().all() for tensor in ema.weights().values())


def test_buffers_may_be_averaged_too() -> None:
    net = Rich()
    net.scale = nn.Parameter(torch.ones(4))  # torch's own takes one type only
    ema, reference = EMA(net, 0.9, buffers=True), Reference(net, 0.9, use_buffers=True)
    train(net, callbacks=[ema, reference], epochs=2)
    ours, theirs = ema.weights(), reference.averaged.module.state_dict()
    assert torch.equal(ours["norm.running_mean"], theirs["norm.running_mean"])
    assert not torch.equal(ours["norm.running_mean"], net.norm.running_mean)
    assert ours["norm.num_batches_tracked"] == net.norm.num_batches_tracked == 8
    assert ours["norm.num_batches_tracked"].dtype is torch.int64


def test_a_part_of_a_module_may_be_averaged() -> None:
    net = Net()
    ema = EMA(net.linear, 0.5)
    train(net, callbacks=[ema])
    assert list(ema.weights()) == ["weight", "bias"]


# ------------------------------------------------------------------------------------------------ what it gives


def test_applied_restores_the_weights_after_the_block() -> None:
    net = Net(test_data=Net.batches)
    ema = EMA(net, 0.5)
    trainer = make_trainer(net, callbacks=[ema], epochs=2)
    trainer.train()
    own, data = copy.deepcopy(net.state_dict()), net.linear.weight.data_ptr()
    plain = trainer.test()["default"][0]
    fresh = Net(test_data=Net.batches)
    ema.copy_to(fresh)
    with ema.applied():
        averaged = trainer.test()["default"][0]
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert same(net.state_dict(), own)
    assert net.linear.weight.data_ptr() == data
    assert not torch.equal(plain, averaged)
    assert torch.equal(averaged, make_trainer(fresh).test()["default"][0])
    assert torch.equal(plain, trainer.test()["default"][0])


def test_weights_returns_a_copy() -> None:
    net = Rich()
    ema = EMA(net, 0.5)
    trainer = make_trainer(net, callbacks=[ema])
    trainer.train()
    weights = ema.weights()
    before = copy.deepcopy(weights)
    assert not any(tensor.requires_grad for tensor in weights.values())
    trainer.train()
    assert same(weights, before)
    assert not same(ema.weights(), before)


def test_a_fenced_hook_may_evaluate_the_averages() -> None:
    class Evaluates(Net):
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            if self.ema is not None:
                with self.ema.applied(), torch.no_grad():
                    self.log("averaged_loss", self.forward_loss((self.x, self.y))[0])

    nets = []
    for averages in (False, True):
        net = Evaluates()
        object.__setattr__(net, "ema", EMA(net, 0.5) if averages else None)
        result = train(net, callbacks=[net.ema] if averages else [], epochs=2).result
        assert ("averaged_loss" in result.metrics) == averages
        nets.append(net)
    assert same(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
def test_compiled_steps_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModuleInterface, "log", ModuleInterface.log)
    torch._dynamo.reset()
    averages = []
    for options in ({}, {"compile": True, "compile_options": {"backend": "eager"}}):
        net = Net()
        ema = EMA(net, 0.5)
        train(net, callbacks=[ema], epochs=2, **options)
        averages.append(ema.weights())
    torch._dynamo.reset()
    assert same(*averages)


# -------------------------------------------------------------------------------------- validation of the average


def by_hand(net: Rich, decay: float, epochs: int) -> list[float]:
    """Train as the trainer does, with an average in float32; return the loss of each validation of the average."""
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr)
    average: dict[str, torch.Tensor] = {}
    losses = []
    for _ in range(epochs):
        for batch in net.batches(8):
            net.forward_loss(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, weight in net.named_parameters():
                if weight.requires_grad:
                    average[name] = torch.lerp(average.get(name, weight.float()), weight.float(), 1 - decay).detach()
        evaluated = copy.deepcopy(net).eval()
        with torch.no_grad():
            for name, weight in evaluated.named_parameters():
                weight.copy_(average.get(name, weight))
            losses.append(sum(float(evaluated.forward_loss(batch)[0]) for batch in net.batches(8)) / 4)
    return losses


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
def test_a_validated_average_is_that_of_a_loop_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And training does not depend on it: the module's own weights are back, also in compiled steps."""
    expected, reference = by_hand(hand := Rich(), 0.9, 3), [*hand.parameters()]
    monkeypatch.setattr(ModuleInterface, "log", ModuleInterface.log)
    torch._dynamo.reset()
    for options in ({}, {"compile": True, "compile_options": {"backend": "eager"}}):
        torch._dynamo.utils.counters.clear()
        net = Rich()
        outcome = train(net, callbacks=[EMA(net, 0.9, validate=True)], epochs=3, val_interval_steps=4, **options)
        losses = [event.loss for event in outcome.of(ValEpochEnded)]
        assert losses == pytest.approx(expected, rel=1e-5)
        assert all(map(torch.equal, net.parameters(), reference))
        frames = torch._dynamo.utils.counters["frames"]["ok"]
        assert not options or 0 < frames <= 4  # a training and a validation step; nothing was compiled again
    torch._dynamo.reset()
    plain = train(net := Rich(), callbacks=[EMA(net, 0.9)], epochs=3)
    assert [event.loss for event in plain.of(ValEpochEnded)] != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ending", ["error", "cancelled", "hook"])
def test_a_validation_that_ends_early_leaves_the_trained_weights(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[dict[str, torch.Tensor]] = []
    failed = threading.Event()
    fail = Control.fail
    monkeypatch.setattr(Control, "fail", lambda *args: (fail(*args), failed.set()))

    class Ends(Rich):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            trained.append(copy.deepcopy(self.state_dict()))

        def on_begin_val_epoch(self, global_step: int, key: str) -> None:
            if ending == "hook":
                raise Crash

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            assert not torch.equal(self.linear.weight, trained[-1]["linear.weight"])
            if ending == "error":
                raise Crash
            assert failed.wait(20)
            return super().val_step(global_step, batch, device)

    net = Ends()
    trainer = make_trainer(net, callbacks=[EMA(net, 0.9, validate=True)])

    async def cancelled() -> None:
        with anyio.CancelScope() as scope:
            async with trainer.run() as run:
                async for _ in run.events(types=[ValEpochStarted]):
                    scope.cancel()

    if ending == "cancelled":
        anyio.run(cancelled)
    else:
        with pytest.raises(Crash):
            trainer.train()
    assert len(trained) == 4
    assert same(net.state_dict(), trained[-1])


def manual_step(net: Any, global_step: int, batch: Any) -> None:
    for _ in range(2):
        net.optimize(net.forward_loss(batch)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        {"precision": "float16", "gpu_batch_size_limit": 4},
        {"optimizers": lambda net: ([torch.optim.LBFGS(net.parameters(), max_iter=3)], [])},
        {"train_step": manual_step},
    ],
    ids=["bfloat16", "float16", "closures", "manual"],
)
def test_every_kind_of_step_validates_the_average_of_its_weights(options: dict[str, Any]) -> None:
    own = {name: options[name] for name in ("optimizers", "train_step") if name in options}
    arguments = {name: value for name, value in options.items() if name not in own}
    net = type("Steps", (Net,), {"manual_optimization": "train_step" in own})(rows=32, **own)
    weights: list[torch.Tensor] = []

    class Reference(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            now = net.linear.weight.detach()
            weights.append(torch.lerp(weights[-1], now, 1 - 0.5) if weights else now.clone())

    ema = EMA(net, 0.5, validate=True)
    result = train(net, callbacks=[ema, Reference()], epochs=2, **arguments).result
    assert torch.equal(ema.weights()["linear.weight"], weights[-1])
    plain = make_trainer(net, **arguments).validate()["val_loss"]
    with ema.applied():
        assert make_trainer(net, **arguments).validate()["val_loss"] == result.metrics["val_loss"]
    assert plain != result.metrics["val_loss"]


def test_two_validated_averages_are_refused() -> None:
    net = Net()
    with pytest.raises(ArgumentsError, match="EMA and EMA have validate=True"):
        make_trainer(net, callbacks=[EMA(net, validate=True), EMA(net, 0.9, validate=True)])


def test_a_schedule_free_optimizer_and_a_validated_average_are_refused() -> None:
    class Free(torch.optim.SGD):
        def eval(self) -> None: ...
        def train(self) -> None: ...

    def run(**options: Any) -> Any:
        net = Net(optimizers=lambda net: ([Free(net.parameters(), lr=0.1)], []))
        return train(net, callbacks=[EMA(net, **options)]).error

    assert run() is None
    assert "Free averages the weights itself and validates its average, so that EMA(validate=True) cannot" in str(
        run(validate=True)
    )


def test_parameters_that_come_and_go_are_named(caplog: Any) -> None:
    class Grows(Net):
        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            if epoch == 1:
                self.linear.extra = nn.Parameter(torch.ones(3))
                self.linear.bias = None
                self.linear.weight = nn.Parameter(torch.zeros(1, 4))

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.SGD(self.linear.parameters(), lr=0.1)], []

    net = Grows()
    ema = EMA(net, 0.5, validate=True)
    assert train(net, callbacks=[ema], epochs=2).error is None
    assert "EMA averages linear.extra only from here on, added or unfrozen since it began" in caplog.text
    assert "EMA drops the average of linear.bias" in caplog.text
    assert list(ema.state_dict()["average"]) == ["linear.weight", "linear.extra"]


def test_an_evaluation_or_export_uses_the_average_that_the_run_has_validated(
    stagecast: Stagecast, tmp_path: Path
) -> None:
    """Of the attached callback, or of the checkpoint; ``validate=False`` and a run without one use the trained ones."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(best="val_loss", keep_last=9)}

    def fresh(**options: Any) -> Any:
        net = Rich(test_data=Net.batches)
        return make_trainer(net, callbacks=[EMA(net, 0.9, **options)] if options else (), **own), net

    own: dict[str, Any] = {}
    trainer, net = fresh(validate=True)
    trainer = make_trainer(net, callbacks=[ema := EMA(net, 0.9, validate=True)], epochs=2, **run)
    result = trainer.train()
    trained = copy.deepcopy(net.state_dict())
    averaged = result.metrics["val_loss"]
    assert result.best_metric == pytest.approx(averaged)
    assert trainer.validate()["val_loss"] == averaged
    assert same(net.state_dict(), trained)
    with ema.applied():
        own = {}
        assert make_trainer(net).validate()["val_loss"] == averaged
        assert trainer.validate()["val_loss"] == averaged
    plain = make_trainer(net).validate()["val_loss"]
    assert plain != pytest.approx(averaged, rel=1e-4)
    for own in ({"resume": tmp_path / "run"}, {"resume": result.best_checkpoint}, {"init_from": tmp_path / "run"}):
        for options, loss in (({}, averaged), ({"validate": True}, averaged), ({"validate": False}, plain)):
            if "init_from" not in own or options != {"validate": False}:
                assert fresh(**options)[0].validate()["val_loss"] == loss, (own, options)
    own = {"resume": tmp_path / "run"}
    with ema.applied():
        expected = make_trainer(net).test()["default"][1]
    assert torch.equal(fresh()[0].test()["default"][1], expected)
    best = str(tmp_path / "best.safetensors")
    code, out, err = stagecast("checkpoints", "export", tmp_path / "run", best, "--best", "--every-name")
    assert (code, err) == (0, "")
    assert "averaged by EMA(module=Rich, decay=0.9, validate=True) (val_loss " in out
    for file in (tmp_path / "run/weights.safetensors", best):
        assert net.load_state_dict(load_file(file), strict=file == best)
        assert same(net.state_dict(), ema.weights())
    assert (
        stagecast("checkpoints", "export", tmp_path / "run", best, "--no-averaged", "--force", "--every-name").code == 0
    )
    assert same(load_file(best), trained)
    saved = train(net, callbacks=[EMA(net)], run_dir=tmp_path / "plain", checkpoints=True).result.checkpoint
    code, _, err = stagecast("checkpoints", "export", saved, best, "--force", "--every-name")
    assert (code, "it also holds the weights averaged by EMA(module=Rich): --averaged exports those" in err) == (
        0,
        True,
    )
    train(net, run_dir=tmp_path / "none", checkpoints=True)
    code, _, err = stagecast("checkpoints", "export", tmp_path / "none", best, "--force", "--averaged")
    assert (code, "holds no averaged weights; train with EMA or SWA" in err) == (1, True)


def test_a_checkpoint_in_a_validation_holds_the_trained_weights(tmp_path: Path) -> None:
    """The run resumes exactly, and has validated the same."""

    def attempt(stops: bool, **options: Any) -> Any:
        class Stops(Rich):
            def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
                self.seen = [*getattr(self, "seen", []), self.linear.weight.detach().clone()]
                if stops and len(self.seen) == 6:
                    os.kill(os.getpid(), signal.SIGINT)
                return super().val_step(global_step, batch, device)

        net = Stops()
        run = {"run_dir": tmp_path / options.pop("folder"), "run_id": "r", "checkpoints": EACH_STEP}
        return net, train(net, callbacks=[EMA(net, 0.9, validate=True)], epochs=3, **run, **options)

    whole, outcome = attempt(False, folder="whole")
    stopped, _ = attempt(True, folder="run")
    assert not torch.equal(stopped.seen[-1], stopped.linear.weight)
    folder = tmp_path / "run/checkpoints"
    newest = max(folder.glob("step-8*"), key=lambda one: one.name)
    tensors = load_file(newest / "tensors.safetensors")
    assert torch.equal(tensors["module.linear.weight"], stopped.linear.weight)
    assert torch.equal(tensors["averaged.module.linear.weight"], stopped.seen[-1])
    resumed, again = attempt(False, folder="run", resume="auto")
    assert same(resumed.state_dict(), whole.state_dict())
    assert [event.loss for event in again.of(ValEpochEnded)] == [e.loss for e in outcome.of(ValEpochEnded)][1:]


# -------------------------------------------------------------------------------------------------- checkpoints


class Crash(Exception):
    """Stands for the death of the process."""


def crashing(at: int | None) -> Rich:
    """Return a module whose step of this number raises `Crash`."""

    def act(step: int) -> None:
        if step == at:
            raise Crash

    return Rich(act=act)


@pytest.mark.parametrize("at", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("options", [{}, {"buffers": True, "every_n_steps": 2}])
def test_a_resumed_average_is_that_of_an_uninterrupted_run(tmp_path: Path, at: int, options: dict[str, Any]) -> None:
    def attempt(crash: int | None, **run: Any) -> Any:
        net = crashing(crash)
        ema = EMA(net, 0.9, **options)
        return ema, train(net, callbacks=[ema], epochs=2, **run)

    whole, outcome = attempt(None)
    assert outcome.result.global_step == 8
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": EACH_STEP}
    _, outcome = attempt(at, **run)
    assert isinstance(outcome.error, Crash)
    resumed, outcome = attempt(None, resume="auto", **run)
    assert outcome.result.global_step == 8
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert (ours["steps"], set(ours["average"])) == (theirs["steps"], set(theirs["average"]))
    assert same(ours["average"], theirs["average"])
    assert same(resumed.weights(), whole.weights())


def test_an_average_can_start_in_a_resumed_run(tmp_path: Path, caplog: Any) -> None:
    """It starts with the next step, within the epoch, with a warning."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": EACH_STEP}
    train(crashing(3), **run)
    net = crashing(None)
    ema = EMA(net, 0.5)
    train(net, callbacks=[ema], resume="auto", **run)
    assert ema.steps == 2
    assert "has no state for the callback EMA" in caplog.text
