"""Metric objects such as torchmetrics' in `log` and `log_dict`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics as tm
from support.training import Batch, Net, hooked, logging_net, make_trainer, train
from torch import nn

from events.messages import MonitorMissing
from trainer import Checkpoints, RunTerminated, Schedule
from trainer.callbacks import EarlyStopping

pytestmark = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save")

OFTEN = Checkpoints(every_steps=1, every_minutes=None, keep_last=None, when_busy="wait", weights=False)


class Scores(Net):
    """Logs metrics of every kind of state: sums, lists, wrapped ones, shared ones, tensors beside the states."""

    def __init__(self, calls: bool = False, stop_at: tuple[str, int] | None = None, **options: Any) -> None:
        super().__init__(rows=32, **options)
        self.calls_metric, self.stop_at, self.steps = calls, stop_at, 0
        self.mse, self.val_mse = tm.MeanSquaredError(), tm.MeanSquaredError()
        self.ranks, self.val_ranks = tm.SpearmanCorrCoef(), tm.SpearmanCorrCoef()
        self.recent = tm.wrappers.Running(tm.SumMetric(), window=3)
        self.range = tm.wrappers.MinMaxMetric(tm.MeanAbsoluteError())
        many = tm.MetricCollection({"below": tm.Precision("binary"), "above": tm.Recall("binary")}, prefix="val_")
        self.many, self.train_many = many, many.clone(prefix="train_")
        self.only_in_hook = tm.MeanMetric()

    def maybe_stop(self, where: str) -> None:
        self.steps += 1
        if self.stop_at == (where, self.steps):
            signal.raise_signal(signal.SIGTERM)

    def train_step(self, global_step: int, batch: Batch, device: Any) -> Any:
        self.maybe_stop("train")
        loss, predicted = self.forward_loss(batch)
        predicted, y = predicted.detach(), batch[1]
        if self.calls_metric:
            self.log("mse_step", self.mse(predicted, y))
        else:
            self.mse.update(predicted, y)
        self.log("mse", self.mse)
        self.ranks.update(predicted.flatten(), y.flatten())
        self.log("ranks", self.ranks)
        self.recent.update(loss.detach())
        self.log("recent", self.recent)
        self.range.update(predicted, y)
        self.log_dict(self.range)
        self.train_many.update((predicted > 0).flatten(), (y > 0).flatten().int())
        self.log_dict(self.train_many)
        self.only_in_hook.update(loss.detach())
        return loss

    def on_end_train_epoch(self, global_step: int) -> None:
        self.log("only_in_hook", self.only_in_hook)

    def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
        self.maybe_stop("val")
        loss, predicted = self.forward_loss(batch)
        self.val_mse.update(predicted, batch[1])
        self.log("val_mse", self.val_mse)
        self.val_ranks.update(predicted.flatten(), batch[1].flatten())
        self.many.update((predicted > 0).flatten(), (batch[1] > 0).flatten().int())
        self.log_dict(self.many)
        return loss

    def on_end_val_epoch(self, global_step: int, key: str = "default") -> None:
        self.log("val_ranks", self.val_ranks)


@pytest.mark.parametrize("calls", [False, True])
def test_each_epoch_and_each_validation_has_its_value(calls: bool) -> None:
    outcome = train(Scores(calls), epochs=2)
    logged = outcome.logged()
    assert outcome.error is None
    losses = [event.loss for event in outcome.events if type(event).__name__ == "TrainStepEnded"]
    per_epoch = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    for name in ("mse", "only_in_hook"):
        assert [value for _, value in logged[name]] == pytest.approx(per_epoch)
    assert [value for _, value in logged["recent"]] == pytest.approx([sum(losses[1:4]), sum(losses[5:])])
    assert [step for step, _ in logged["mse"]] == [4, 8]
    validated = [event.loss for event in outcome.events if type(event).__name__ == "ValEpochEnded"]
    assert [value for _, value in logged["val_mse"]] == pytest.approx(validated)
    assert {
        "val_below",
        "val_above",
        "train_below",
        "train_above",
        "raw",
        "min",
        "max",
    } <= outcome.result.metrics.keys()
    # The value of a step is logged as any number is.
    if calls:
        assert [value for _, value in logged["mse_step"]] == pytest.approx(losses)


def everything(outcome: Any) -> Any:
    """All that was logged, by name and step."""
    return {name: dict(values) for name, values in outcome.logged().items()}


@pytest.mark.parametrize(
    ("at", "new"), [(("train", 3), True), (("train", 11), False), (("val", 6), True), (("val", 14), False)]
)
def test_an_interrupted_run_logs_the_values_of_the_uninterrupted_one(
    at: tuple[str, int], new: bool, tmp_path: Path
) -> None:
    """The validation at the end of an epoch comes after its last step: what training has logged is in the state."""
    options: dict[str, Any] = {"epochs": 2, "run_id": "r", "run_dir": tmp_path, "checkpoints": OFTEN}
    whole = everything(train(Scores(), epochs=2))
    module = Scores(stop_at=at)
    first = train(module, **options)
    assert isinstance(first.error, RunTerminated)
    assert module.mse.update_count == 0, "a run resets what it has logged, also where it is stopped"
    second = train(Scores() if new else module, resume="auto", **options)
    assert second.error is None
    parts = everything(first), everything(second)
    assert {name: parts[0].get(name, {}) | parts[1].get(name, {}) for name in whole} == whole


def test_an_object_over_several_dataloaders_resumes_within_the_second(tmp_path: Path) -> None:
    class Both(Scores):
        def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            return {"a": self.batches(8), "b": self.batches(16)}

        def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            self.maybe_stop("val")
            self.val_mse.update(self.linear(batch[0]), batch[1])

        def on_end_val_epoch(self, global_step: int, key: str = "default") -> None:
            if key == "b":
                self.log("both", self.val_mse)

    options: dict[str, Any] = {"epochs": 1, "run_id": "r", "run_dir": tmp_path, "checkpoints": OFTEN}
    whole = train(Both(), epochs=1).logged()["both"]
    assert isinstance(train(Both(stop_at=("val", 9)), **options).error, RunTerminated)
    assert train(Both(), resume="auto", **options).logged()["both"] == whole


def test_one_object_for_all_dataloaders_has_a_value_for_each() -> None:
    class Several(Net):
        def __init__(self) -> None:
            super().__init__(val_data=lambda net, size: {"a": net.batches(8)[:1], "b": net.batches(8)[1:]})
            self.shared = tm.MeanSquaredError()
            self.own = nn.ModuleDict({"a": tm.MeanAbsoluteError(), "b": tm.MeanAbsoluteError()})

        def on_begin_val_epoch(self, global_step: int, key: str) -> None:
            self.key = key

        def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            loss, predicted = self.forward_loss(batch)
            self.shared.update(predicted, batch[1])
            own: Any = self.own[self.key]
            own.update(predicted, batch[1])
            self.log("mse", self.shared)
            self.log("mae", own)
            return loss

    module = Several()
    metrics = make_trainer(module).validate()
    for key, batch in zip("ab", module.batches(8), strict=True):
        predicted = module.linear(batch[0])
        assert metrics[f"mse/{key}"] == pytest.approx(metrics[f"val_loss/{key}"])
        assert metrics[f"mae/{key}"] == pytest.approx(nn.functional.l1_loss(predicted, batch[1]).item())


def test_hooks_of_the_end_still_see_the_state(caplog: pytest.LogCaptureFixture) -> None:
    class Looks(Net):
        def __init__(self) -> None:
            super().__init__(test_data=lambda net, size: net.batches(8))
            self.metric, self.seen = tm.MeanMetric(), []

        def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            self.metric.update(batch[1].sum())
            self.log("sums", self.metric)

        def on_end_val_epoch(self, global_step: int, key: str = "default") -> None:
            self.seen.append(float(self.metric.compute()))

        def on_end_test_epoch(self, global_step: int, key: str) -> None:
            self.log("again", self.metric)

    module = Looks()
    sums = float(module.y.sum()) / 2
    assert make_trainer(module).validate() == pytest.approx({"sums": sums})
    assert module.seen == pytest.approx([sums])
    assert module.metric.update_count == 0
    make_trainer(module).test()
    assert module.metric.update_count == 0
    assert not caplog.messages


class Mean:
    """A metric of nobody's library, whose value is a plain number."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def update(self, value: float) -> None:
        self.values.append(value)

    def compute(self) -> float:
        return sum(self.values) / len(self.values)

    def reset(self) -> None:
        self.values = []


def test_any_object_with_update_compute_and_reset_is_a_metric(caplog: pytest.LogCaptureFixture) -> None:
    mean = Mean()

    def log(net: Any, global_step: int, batch: Batch) -> None:
        mean.update(float(global_step))
        net.log("steps", mean)

    outcome = train(logging_net(log), epochs=2)
    assert outcome.logged()["steps"] == [(2, 1.5), (4, 3.5)]
    (text,) = [text for text in caplog.messages if "steps" in text]
    assert "log('steps') got a Mean that is not registered in Net, so neither moved to the device nor part of" in text


def test_a_metric_without_update_has_no_value_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Forgets(Net):
        def __init__(self) -> None:
            super().__init__()
            self.metric = tm.MeanMetric()

        def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            if global_step == 2:
                self.metric.update(1.0)
            self.log("value", self.metric)

    outcome = train(Forgets(), epochs=2, checkpoints=Checkpoints(best="value", best_mode="max"), run_dir=tmp_path)
    assert outcome.logged()["value"] == [(2, 1.0)]
    assert [event.monitor for event in outcome.of(MonitorMissing)] == ["value"]
    assert len([text for text in caplog.messages if "log('value') got a MeanMetric without any update()" in text]) == 1


def test_schedulers_callbacks_and_best_checkpoints_follow_a_metric(tmp_path: Path) -> None:
    values = [1.0, 3.0, 2.0, 2.5, 9.0]

    class Followed(Net):
        def __init__(self) -> None:
            super().__init__(rows=8)
            self.metric = tm.MeanMetric()

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0, factor=0.5)
            return [optimizer], [Schedule(plateau, monitor="score")]

        def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            self.metric.update(values[global_step - 1])
            self.log("score", self.metric)

    best = Checkpoints(best="score", best_mode="max", every_minutes=None, weights=False)
    stopping = EarlyStopping("score", mode="max", patience=2)
    outcome = train(Followed(), epochs=5, run_dir=tmp_path, run_id="r", checkpoints=best, callbacks=[stopping])
    assert outcome.error is None
    assert outcome.result.global_step == 4
    assert outcome.result.best_metric == 3.0
    rates = [event.lr for event in outcome.events if type(event).__name__ == "TrainStepEnded"]
    assert rates == [0.1, 0.1, 0.1, 0.05]


class Odd(tm.Metric):
    """A metric whose ``compute`` returns, or raises, the given value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def update(self) -> None:
        pass

    def compute(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def log_twice(net: Any) -> None:
    for one in (tm.MeanMetric(), tm.MeanMetric()):
        net.log("value", one)


@pytest.mark.parametrize(
    ("log", "kind", "says"),
    [
        (lambda net: net.log("value", net.odd(RuntimeError("boom"))), RuntimeError, "boom"),
        (
            lambda net: net.log("value", net.odd(torch.zeros(3))),
            ValueError,
            "log('value') got a Odd, whose compute() returns a tensor of shape (3,) and not one number; average it",
        ),
        (
            lambda net: net.log("value", net.odd({"a": 1.0, "b": 2.0})),
            TypeError,
            "log('value') got a Odd, whose compute() returns a dictionary (a, b); call log_dict(metric)",
        ),
        (lambda net: net.log("value", net.odd(torch.zeros((), dtype=torch.complex64))), TypeError, "complex64"),
        (lambda net: net.log_dict(net.odd(1.0)), TypeError, "returns a float and not a dictionary; call log(name"),
        (lambda net: net.log_dict(net.odd({"train_loss": 1.0})), ValueError, "the name is reserved"),
        (
            lambda net: net.log("value", tm.MetricCollection([tm.MeanMetric()])),
            TypeError,
            "log('value') got a MetricCollection, which has several metrics; call log_dict(metric)",
        ),
        (
            lambda net: net.log("value", tm.MeanMetric(), reduce="max"),
            ValueError,
            "log('value') got reduce='max' for a MeanMetric, which combines the batches itself; leave reduce out",
        ),
        (lambda net: net.log("value", tm.MeanMetric), TypeError, "a number or a tensor of one element, not <class"),
        (log_twice, ValueError, "log('value') got another MeanMetric object than before in the same epoch; create it"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_metric_that_cannot_be_logged_is_named_with_the_remedy(log: Any, kind: type[Exception], says: str) -> None:
    class Logs(Net):
        def odd(self, value: Any) -> Odd:
            self.metric = Odd(value)
            self.metric.update()
            return self.metric

        def train_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            log(self)
            return self.forward_loss(batch)

    error = train(Logs(rows=8), epochs=1).error
    assert type(error) is kind
    assert says in str(error)
    if "boom" in says:
        assert "raised by compute() of the Odd that log('value') got" in error.__notes__


def test_the_numbers_of_a_dictionary_are_recorded_without_its_vectors(caplog: pytest.LogCaptureFixture) -> None:
    class Logs(Net):
        def __init__(self) -> None:
            super().__init__(rows=8)
            self.metric = Odd({"map": torch.tensor(0.5), "classes": torch.tensor([1, 2])})

        def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            self.metric.update()
            self.log_dict(self.metric)

    assert make_trainer(Logs()).validate() == {"map": 0.5}
    assert any("log_dict() records no classes of Odd.compute()" in text for text in caplog.messages)


def test_an_object_for_training_and_validation_is_refused() -> None:
    class Shares(Net):
        def __init__(self) -> None:
            super().__init__()
            self.metric = tm.MeanMetric()

        def train_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            self.metric.update(1.0)
            self.log("mean", self.metric)
            return self.forward_loss(batch)

        def val_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            self.log("val_mean", self.metric)

    error = train(Shares()).error
    assert isinstance(error, ValueError)
    assert "log('val_mean') got the metric object of log('mean') in training, which would mix both" in str(error)


def test_callbacks_log_their_own_objects_at_the_end_of_an_epoch() -> None:
    metric = tm.MeanMetric()

    def act(self: Any, global_step: int, *outputs: Any, **more: Any) -> None:
        metric.update(outputs[0])
        self.log("of_callback", metric)

    outcome = train(Net(), callbacks=[hooked("on_end_train_epoch", act)()], epochs=2)
    assert outcome.error is None
    losses = [event.loss for event in outcome.events if type(event).__name__ == "TrainStepEnded"]
    assert [value for _, value in outcome.logged()["of_callback"]] == pytest.approx(
        [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    )
    error = train(Net(), callbacks=[hooked("on_end_train_step", act)()]).error
    assert isinstance(error, TypeError)
    assert "log('of_callback') got a MeanMetric off the loop's thread, where no epoch ends" in str(error)


def test_a_checkpoint_of_other_metrics_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Before(Net):
        def __init__(self, **metrics: Any) -> None:
            super().__init__()
            self.metrics = nn.ModuleDict(metrics)

        def train_step(self, global_step: int, batch: Batch, device: Any) -> Any:
            for name, metric in self.metrics.items():
                metric.update(torch.ones(8), torch.ones(8))
                self.log(name, metric)
            return self.forward_loss(batch)

    old = Before(changed=tm.MeanSquaredError(), gone=tm.MeanAbsoluteError())
    train(old, epochs=1, run_dir=tmp_path, run_id="r", checkpoints=OFTEN)
    new = Before(changed=tm.SpearmanCorrCoef(), added=tm.MeanAbsoluteError())
    assert train(new, epochs=1, resume=tmp_path / "checkpoints/step-1.a1").error is None
    assert any("a state for the metric metrics.changed that does not fit its Spearman" in t for t in caplog.messages)
    assert any("has the states of the metrics metrics.gone, which Before does not have" in t for t in caplog.messages)
