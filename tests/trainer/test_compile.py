"""`torch.compile` as an option: the same numbers, few compilations, and a module that is unchanged afterwards."""

from __future__ import annotations

import copy
import inspect
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchmetrics
from support.training import Diary, Net, failing, hooked, train

from events.messages import MetricsLogged, TrainStepEnded, ValEpochEnded
from trainer import CallbackInterface, ModuleInterface, inline

STEPS = ("train_step", "val_step", "test_step")

# Dynamo itself looks at .grad where a graph breaks, and hides the warning in a way that pytest's filter undoes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it loads its compiler
]


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin and end with nothing compiled; the mark that keeps log out of graphs is for good, so put log back."""
    for name in ("log", "log_dict"):
        monkeypatch.setattr(ModuleInterface, name, getattr(ModuleInterface, name))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Logs(Net):
    """Logs a tensor and numbers, one with a new value each time, in the middle of its steps."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x, y = batch
        predicted = self.linear(x)
        self.log("mean", predicted.mean())
        self.log("step", global_step)
        return torch.nn.functional.mse_loss(predicted, y), predicted

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        loss, predicted = self.forward_loss(batch)
        self.log("val mean", predicted.mean())
        return loss, predicted


# ------------------------------------------------------------------------------------------------- bad input


def test_an_unknown_backend_ends_the_run_with_torchs_own_error() -> None:
    net = Net()
    outcome = train(net, compile=True, compile_options={"backend": "nonsense"})
    assert outcome.error is not None
    assert "nonsense" in str(outcome.error)
    assert not [name for name in STEPS if name in vars(net)]


def test_an_exception_in_a_compiled_step_propagates_and_restores_the_module() -> None:

    net = failing(KeyError("mine"))
    outcome = train(net, compile=True, compile_options={"backend": "eager"})
    assert isinstance(outcome.error, KeyError)
    assert not [name for name in STEPS if name in vars(net)]


# ---------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_hundred_steps_that_log_are_those_of_the_plain_run_and_compile_a_few_times(backend: str) -> None:
    graphs: list[int] = []

    class Counts(CallbackInterface):
        @inline
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            graphs.append(compiled_graphs())

    plain, net = Logs(rows=36), Logs(rows=36)
    expected = train(plain, epochs=20)
    options = {"backend": backend}
    outcome = train(net, epochs=20, compile=True, compile_options=options, callbacks=[Counts()])

    assert outcome.result.global_step == 100
    assert {event.rows for event in outcome.of(TrainStepEnded)} == {8, 4}
    for kind, field in ((TrainStepEnded, "loss"), (ValEpochEnded, "loss")):
        losses = [getattr(event, field) for event in expected.of(kind)]
        assert [getattr(event, field) for event in outcome.of(kind)] == pytest.approx(losses, rel=1e-4)
    metrics = [event.metrics for event in outcome.of(MetricsLogged)]
    assert len(metrics) == 120
    for one, other in zip(metrics, [event.metrics for event in expected.of(MetricsLogged)], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert [one["step"] for one in metrics if "step" in one] == list(range(1, 101))
    assert list(inspect.signature(ModuleInterface.log).parameters) == ["self", "name", "value", "reduce"]
    assert 0 < graphs[-1] <= 12
    assert graphs[1] == graphs[-1], "something was compiled again and again"


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="there is no C compiler")
def test_the_default_backend_trains_to_the_same_losses() -> None:
    def step(net: Net, global_step: int, batch: Any) -> Any:
        loss, _ = net.forward_loss(batch)
        net.log("loss", loss)
        return loss

    expected = train(Net(train_step=step), epochs=5, val_interval_epochs=0).of(TrainStepEnded)
    outcome = train(Net(train_step=step), epochs=5, val_interval_epochs=0, compile=True)
    steps, metrics = outcome.of(TrainStepEnded), outcome.of(MetricsLogged)
    assert [event.loss for event in steps] == pytest.approx([event.loss for event in expected], rel=1e-4)
    assert [event.metrics["loss"] for event in metrics] == [event.loss for event in steps]
    assert 0 < compiled_graphs() <= 2


def test_metric_objects_are_updated_and_logged_in_compiled_steps() -> None:
    class Scored(Net):
        def __init__(self) -> None:
            super().__init__(rows=32)
            self.mse = torchmetrics.MeanSquaredError()
            self.scores = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError()])

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, predicted = self.forward_loss(batch)
            self.log("mse_step", self.mse(predicted.detach(), batch[1]))
            self.log("mse", self.mse)
            return loss

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.scores.update(self.linear(batch[0]), batch[1])
            self.log_dict(self.scores)

    expected = train(Scored(), epochs=3).logged()
    outcome = train(Scored(), epochs=3, compile=True, compile_options={"backend": "eager"})
    assert outcome.logged() == expected
    assert expected.keys() == {"mse_step", "mse", "MeanAbsoluteError"}
    assert compiled_graphs()


def test_micro_batches_and_outputs_go_through_compiled_steps() -> None:
    plain, net = Net(rows=32), Net(rows=32)
    diaries = Diary(), Diary()
    train(plain, callbacks=[diaries[0]], gpu_batch_size_limit=4)
    options = {"compile": True, "compile_options": {"backend": "aot_eager"}}
    train(net, callbacks=[diaries[1]], gpu_batch_size_limit=4, **options)
    one, other = (diary.of("on_end_train_step") for diary in diaries)
    assert len(one) == len(other) == 4
    for (_, expected), (_, outputs) in zip(one, other, strict=True):
        assert [tuple(value.shape) for value in outputs] == [(2,), (8, 1)]
        for value, reference in zip(outputs, expected, strict=True):
            assert torch.allclose(value, reference, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- in place


def test_names_in_the_state_dict_stay_and_the_methods_come_back() -> None:
    """Without the prefix _orig_mod; the user's own attribute is restored."""
    names: list[set[str]] = []
    compiled: list[set[str]] = []
    before = set(Net().state_dict())

    class Own(Net):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            names.append(set(self.state_dict()))
            compiled.append({name for name in STEPS if name in vars(self)})

    net = Own()
    mine = net.val_step
    net.val_step = mine  # type: ignore[method-assign]
    outcome = train(net, compile=True, compile_options={"backend": "eager"})
    assert outcome.result.status == "finished"
    assert names == [before, before]
    assert compiled == [{*STEPS}, {*STEPS}]
    assert set(net.state_dict()) == before
    assert [name for name in STEPS if name in vars(net)] == ["val_step"]
    assert net.val_step is mine
    assert train(net).result.status == "finished", "the module can be trained again, without compiling"


def test_a_copy_of_the_module_computes_with_its_own_weights() -> None:
    copies: list[Any] = []

    kind = hooked("on_end_train_step", lambda net, *_: copies.append(copy.deepcopy(net)), "inline", Net)

    net = kind()
    train(net, compile=True, compile_options={"backend": "eager"})
    batch = net.batches(8)[0]
    for one in copies:
        assert not [name for name in STEPS if name in vars(one)]
        with torch.no_grad():
            one.linear.weight.zero_()
            expected = torch.nn.functional.mse_loss(one.linear(batch[0]), batch[1])
        assert torch.equal(one.train_step(1, batch, "cpu")[0], expected)


class Pickled(CallbackInterface):
    """Pickles the module at the end of each step."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.sizes: list[int] = []

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        state = self.net.__getstate__()
        self.sizes.append(len(pickle.dumps({name: value for name, value in state.items() if name != "_modules"})))


def test_the_modules_state_can_be_pickled_during_a_compiled_run() -> None:
    net = Net()
    pickled = Pickled(net)
    outcome = train(net, callbacks=[pickled], compile=True, compile_options={"backend": "eager"})
    assert outcome.result.status == "finished"
    assert len(pickled.sizes) == 2
