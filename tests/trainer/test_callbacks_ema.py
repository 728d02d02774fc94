"""`EMA`: its averages, its results, and an exact resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from events.errors import CheckpointMismatch, StagecastError
from events.messages import StepSkipped
from trainer import CallbackInterface, Checkpoints, ModuleInterface, inline
from trainer.callbacks import EMA
from trainer.errors import ArgumentsError, ContractError

EACH_STEP = Checkpoints(every_minutes=None, every_steps=1, when_busy="wait")


class Reference(CallbackInterface):
    """Averages with torch's own class, which copies the whole module."""

    def __init__(self, module: nn.Module, decay: float, **options: Any) -> None:
        self.averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), **options)
        self.module = module

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.averaged.update_parameters(self.module)


def rich_net(kit: Any) -> Any:
    """A frozen parameter, a shared one, a batch norm, and one in half precision."""

    class Rich(kit.Net):
        def __init__(self) -> None:
            super().__init__(rows=32)
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

    return Rich()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the last bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_module_that_the_run_does_not_train_is_refused(kit: Any) -> None:
    """Before the first step; a part of it that is trained, or is yet to be, is not."""
    error = kit.train(kit.Net(), callbacks=[EMA(kit.Net())]).error
    assert isinstance(error, ContractError)
    assert "EMA has a Net of which this run trains no parameter" in str(error)
    net = rich_net(kit)
    assert kit.train(net, callbacks=[EMA(net.first), EMA(net.frozen)]).error is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"module": "net"}, "module must be an instance of a torch module, not 'net'"),
        ({"module": nn.Linear}, "module must be an instance of a torch module"),
        ({"decay": 1.0}, "decay must be a number from 0 to less than 1, not 1.0"),
        ({"decay": -0.1}, "decay must be a number from 0 to less than 1, not -0.1"),
        ({"decay": "0.9"}, "decay must be a number from 0 to less than 1, not '0.9'"),
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1, not 0"),
        ({"buffers": None}, "buffers must be True or False, not None"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], problem: str) -> None:
    """When it is made."""
    with pytest.raises(ArgumentsError, match=r"^EMA: ") as caught:
        EMA(**{"module": nn.Linear(1, 1)} | arguments)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "use", [EMA.weights, lambda ema: ema.applied().__enter__(), lambda ema: ema.copy_to(nn.Linear(1, 1))]
)
def test_there_is_no_average_before_the_first_step(use: Any) -> None:
    """It does not pass the weights off as one."""
    with pytest.raises(StagecastError, match="has not averaged any step"):
        use(EMA(nn.Linear(1, 1)))


def test_averaged_weights_are_not_trained(kit: Any) -> None:
    """A hook that leaves them in the module would have the run go on from them."""
    net = kit.Net()
    ema = EMA(net)
    block = ema.applied()

    class Forgets(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            if global_step == 2:
                block.__enter__()

    error = kit.train(net, callbacks=[ema, Forgets()], epochs=2).error
    assert isinstance(error, StagecastError)
    assert "a step was trained inside the block" in str(error)
    assert "raised by EMA.on_end_train_step at global_step 3" in error.__notes__


def test_applying_them_twice_is_refused(kit: Any) -> None:
    """The inner block would take the averages for the module's own; the outer one still gives those back."""
    net = kit.Net()
    ema = EMA(net)
    kit.train(net, callbacks=[ema])
    own = copy.deepcopy(net.state_dict())
    with pytest.raises(StagecastError, match="is nested"), ema.applied(), ema.applied():
        pass
    assert same(net.state_dict(), own)
    with ema.applied():
        assert same(net.state_dict(), ema.weights())


def test_the_average_of_another_model_is_refused(kit: Any, tmp_path: Path) -> None:
    """With the names and shapes that do not fit."""

    class Wide(kit.Net):
        def get_state(self) -> dict[str, Any]:
            return {}

        def update_state(self, state: dict[str, Any]) -> None: ...

    class Other(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2, bias=False)

    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": EACH_STEP}
    net, other = Wide(), Other()
    kit.train(net, callbacks=[EMA(net)], **run)
    error = kit.train(
        other, callbacks=[EMA(other)], epochs=2, resume="auto", reset_optimizers_schedulers=True, **run
    ).error
    assert isinstance(error, CheckpointMismatch)
    assert "linear.bias does not exist here" in str(error)
    assert "linear.weight has the shape (1, 4) there and (2, 4) here" in str(error)


# ------------------------------------------------------------------------------------------------ what it averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("options", [{}, {"gpu_batch_size_limit": 2}, {"clip_grads": True}])
def test_it_is_torchs_average_to_the_last_bit(kit: Any, decay: float, options: dict[str, Any]) -> None:
    """Of `AveragedModel`, which copies the module and reads a number in each step."""
    net = kit.Net(rows=64)
    ema, reference = EMA(net, decay), Reference(net, decay)
    result = kit.train(net, callbacks=[ema, reference], epochs=2, **options).result
    assert ema.steps == result.global_step == 16
    assert same(ema.weights(), reference.averaged.module.state_dict())
    assert same(ema.weights(), net.state_dict()) == (decay == 0.0)


def test_nothing_but_weights_is_copied(kit: Any) -> None:
    """A module may hold its data set, which may be large, and may not be copied at all."""

    class Data(list[Any]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the data set was copied")

        __copy__ = __reduce_ex__ = __deepcopy__  # type: ignore[assignment]

    net = kit.Net()
    net.data = Data([1])
    ema = EMA(net)
    assert kit.train(net, callbacks=[ema]).result.status == "finished"
    assert list(ema.state_dict()["average"]) == ["linear.weight", "linear.bias"]


def test_frozen_parameters_are_not_averaged(kit: Any) -> None:
    """A shared parameter is averaged once, and appears under both its names."""
    net = rich_net(kit)
    ema = EMA(net, 0.5)
    kit.train(net, callbacks=[ema])
    assert set(ema.state_dict()["average"]) == {
        *("linear.weight", "linear.bias", "norm.weight", "norm.bias", "first.weight", "second.bias", "scale"),
    }
    weights = ema.weights()
    assert weights.keys() == net.state_dict().keys()
    assert torch.equal(weights["first.weight"], weights["second.weight"])
    assert not torch.equal(weights["first.weight"], net.first.weight)
    assert torch.equal(weights["frozen.weight"], net.frozen.weight)
    assert torch.equal(weights["norm.running_mean"], net.norm.running_mean)


def test_a_parameter_that_is_unfrozen_joins_at_the_next_epoch(kit: Any) -> None:
    """With the weights that it has then."""

    class Unfreezes(kit.Net):
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

    kit.train(net, callbacks=[ema, Look()], epochs=2)
    expected = torch.lerp(torch.lerp(torch.zeros(1), seen[2], 0.5), seen[3], 0.5)
    assert torch.equal(ema.weights()["linear.bias"], expected)


def test_half_precision_is_averaged_in_float32(kit: Any) -> None:
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


def test_skipped_steps_do_not_count(kit: Any) -> None:
    """Neither those that were skipped nor those between."""

    class Spikes(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, predicted = self.forward_loss(batch)
            self.calls = getattr(self, "calls", 0) + 1
            return (loss * float("nan") if self.calls == 3 else loss), predicted

    net = Spikes(rows=64)
    ema, third = EMA(net, 0.9), EMA(net, 0.9, every_n_steps=3)
    outcome = kit.train(net, callbacks=[ema, third], non_finite="skip")
    assert len(outcome.of(StepSkipped)) == 1
    assert (outcome.result.global_step, ema.steps, third.steps) == (7, 7, 2)
    assert all(tensor.isfinite().all() for tensor in ema.weights().values())


def test_buffers_may_be_averaged_too(kit: Any) -> None:
    """Those with a fraction; a count is taken as it is."""
    net = rich_net(kit)
    net.scale = nn.Parameter(torch.ones(4))  # torch's own takes one type only
    ema, reference = EMA(net, 0.9, buffers=True), Reference(net, 0.9, use_buffers=True)
    kit.train(net, callbacks=[ema, reference], epochs=2)
    ours, theirs = ema.weights(), reference.averaged.module.state_dict()
    assert torch.equal(ours["norm.running_mean"], theirs["norm.running_mean"])
    assert not torch.equal(ours["norm.running_mean"], net.norm.running_mean)
    assert ours["norm.num_batches_tracked"] == net.norm.num_batches_tracked == 8
    assert ours["norm.num_batches_tracked"].dtype is torch.int64


def test_a_part_of_a_module_may_be_averaged(kit: Any) -> None:
    """Its names are its own."""
    net = kit.Net()
    ema = EMA(net.linear, 0.5)
    kit.train(net, callbacks=[ema])
    assert list(ema.weights()) == ["weight", "bias"]


# ------------------------------------------------------------------------------------------------ what it gives


def test_applied_is_for_a_block(kit: Any) -> None:
    """Within it the module computes with the averages; afterwards it is what it was, also after an exception."""

    class Tested(kit.Net):
        def get_test_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return self.batches(batch_size)

    net = Tested()
    ema = EMA(net, 0.5)
    trainer = kit.make_trainer(net, callbacks=[ema], epochs=2)
    trainer.train()
    own, data = copy.deepcopy(net.state_dict()), net.linear.weight.data_ptr()
    plain = trainer.test()["default"][0]
    fresh = Tested()
    ema.copy_to(fresh)
    with ema.applied():
        averaged = trainer.test()["default"][0]
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert same(net.state_dict(), own)
    assert net.linear.weight.data_ptr() == data
    assert not torch.equal(plain, averaged)
    assert torch.equal(averaged, kit.make_trainer(fresh).test()["default"][0])
    assert torch.equal(plain, trainer.test()["default"][0])


def test_what_weights_returns_is_a_copy(kit: Any) -> None:
    """It does not change while training continues."""
    net = rich_net(kit)
    ema = EMA(net, 0.5)
    trainer = kit.make_trainer(net, callbacks=[ema])
    trainer.train()
    weights = ema.weights()
    before = copy.deepcopy(weights)
    assert not any(tensor.requires_grad for tensor in weights.values())
    trainer.train()
    assert same(weights, before)
    assert not same(ema.weights(), before)


def test_a_fenced_hook_may_evaluate_the_averages(kit: Any) -> None:
    """The loop waits for it; what is trained is what would be trained without it."""

    class Evaluates(kit.Net):
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            if self.ema is not None:
                with self.ema.applied(), torch.no_grad():
                    self.log("averaged_loss", self.forward_loss((self.x, self.y))[0])

    nets = []
    for averages in (False, True):
        net = Evaluates()
        object.__setattr__(net, "ema", EMA(net, 0.5) if averages else None)
        result = kit.train(net, callbacks=[net.ema] if averages else [], epochs=2).result
        assert ("averaged_loss" in result.metrics) == averages
        nets.append(net)
    assert same(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
def test_compiled_steps_change_nothing(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are changed in place, and so are followed."""
    monkeypatch.setattr(ModuleInterface, "log", ModuleInterface.log)
    torch._dynamo.reset()
    averages = []
    for options in ({}, {"compile": True, "compile_options": {"backend": "eager"}}):
        net = kit.Net()
        ema = EMA(net, 0.5)
        kit.train(net, callbacks=[ema], epochs=2, **options)
        averages.append(ema.weights())
    torch._dynamo.reset()
    assert same(*averages)


@pytest.mark.anyio
async def test_it_averages_in_a_run_within_an_event_loop(kit: Any) -> None:
    """On the loop's thread, as in `train`."""
    averages = []
    for within in (True, False):
        net = kit.Net()
        ema = EMA(net, 0.5)
        trainer = kit.make_trainer(net, callbacks=[ema], epochs=2)
        if within:
            async with trainer.run() as run:
                await run.result()
        else:
            trainer.train()
        averages.append(ema.weights())
    assert same(*averages)


# -------------------------------------------------------------------------------------------------- checkpoints


class Crash(Exception):
    """The process might as well have died."""


@pytest.fixture
def crashing(kit: Any) -> Iterator[Any]:
    """A rich module that crashes in the step of that number."""

    def make(at: int | None) -> Any:
        net = rich_net(kit)
        inner = net.train_step

        def train_step(global_step: int, batch: Any, device: Any) -> Any:
            if global_step == at:
                raise Crash
            return inner(global_step, batch, device)

        object.__setattr__(net, "train_step", train_step)
        return net

    return make


@pytest.mark.parametrize("at", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("options", [{}, {"buffers": True, "every_n_steps": 2}])
def test_a_resumed_average_is_that_of_an_uninterrupted_run(
    kit: Any, tmp_path: Path, crashing: Any, at: int, options: dict[str, Any]
) -> None:
    """To the last bit, wherever it was interrupted, in the types that it had."""

    def attempt(crash: int | None, **run: Any) -> Any:
        net = crashing(crash)
        ema = EMA(net, 0.9, **options)
        return ema, kit.train(net, callbacks=[ema], epochs=2, **run)

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


def test_an_average_can_begin_in_a_run_that_is_resumed(kit: Any, tmp_path: Path, crashing: Any, caplog: Any) -> None:
    """Its checkpoint has none: it starts with the next step, within the epoch, with a warning."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": EACH_STEP}
    kit.train(crashing(3), **run)
    net = crashing(None)
    ema = EMA(net, 0.5)
    kit.train(net, callbacks=[ema], resume="auto", **run)
    assert ema.steps == 2
    assert "has no state for the callback EMA" in caplog.text
