"""`log(..., reduce=...)` and `log_dict`."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from support.training import Net, logging_net, make_trainer, train

from events.messages import MetricsLogged
from trainer import Histogram

VALUES = [3.0, 5.0, 1.0]
ROWS = [8, 8, 4]
EXPECTED = {"mean": (3 * 8 + 5 * 8 + 1 * 4) / 20, "last": 1.0, "max": 5.0, "sum": 9.0}


def number(value: float, kind: str, call: int) -> Any:
    as_tensor = kind == "tensors" or (kind == "both" and call % 2)
    return torch.tensor(value, requires_grad=True) if as_tensor else value


@pytest.mark.parametrize("kind", ["numbers", "tensors", "both"])
def test_the_batches_of_a_validation_become_one_number(kind: str) -> None:
    class Logs(Net):
        calls = 0

        def val_step(self, global_step: int, batch: Any, device: Any) -> None:
            value = number(VALUES[self.calls], kind, self.calls)
            self.calls += 1
            for reduce in EXPECTED:
                self.log(f"{reduce}_value", value, reduce=reduce)  # type: ignore[arg-type]

    metrics = make_trainer(Logs(rows=20, val_data=lambda net, size: net.batches(8))).validate()
    assert {name: metrics[f"{name}_value"] for name in EXPECTED} == pytest.approx(EXPECTED)


def test_the_micro_batches_of_a_step_become_one_number() -> None:
    def step(net: Any, global_step: int, batch: Any) -> Any:
        net.log_dict({"largest": batch[0].max(), "rows": len(batch[0])}, reduce="sum")
        return net.forward_loss(batch)

    outcome = train(Net(rows=16, train_step=step), epochs=1, gpu_batch_size_limit=4)
    logged = [one.metrics for one in outcome.of(MetricsLogged)]
    assert [one["rows"] for one in logged] == [8, 8]
    x = Net(rows=16).x
    assert logged[0]["largest"] == pytest.approx(float(x[:4].max() + x[4:8].max()))


@pytest.mark.parametrize(("reduce", "expected"), [("max", math.nan), ("sum", math.nan), ("last", 2.0)])
@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_nan_is_not_hidden(reduce: Any, expected: float, kind: str) -> None:
    values = iter([1.0, math.nan, 2.0])

    class Logs(Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> None:
            self.log("value", number(next(values), kind, 0), reduce=reduce)

    metrics = make_trainer(Logs(rows=24, val_data=lambda net, size: net.batches(8))).validate()
    assert metrics["value"] == pytest.approx(expected, nan_ok=True)


def test_batches_without_weight_do_not_count() -> None:
    class Logs(Net):
        def batch_weight(self, batch: Any) -> float:
            return float(batch[0] is not self.first)

        def val_step(self, global_step: int, batch: Any, device: Any) -> None:
            self.log("largest", 100.0 if batch[0] is self.first else 1.0, reduce="max")
            self.log("rows", 1.0, reduce="sum")

        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            batches = self.batches(8)
            self.first = batches[0][0]
            return batches

    assert {"largest": 1.0, "rows": 2.0}.items() <= make_trainer(Logs(rows=24)).validate().items()


@pytest.mark.parametrize(
    ("reduce", "says"),
    [
        ("median", "reduce='median'; it must be one of mean, last, max, sum"),
        (None, "=None"),
        (["max"], "=["),
    ],
)
def test_an_unknown_reduction_is_named_with_the_known_ones(reduce: Any, says: str) -> None:
    def step(net: Any, global_step: int, batch: Any) -> Any:
        net.log("value", 1.0, reduce=reduce)

    error = train(Net(train_step=step)).error
    assert isinstance(error, ValueError)
    assert says in str(error)


def test_a_name_has_one_reduction() -> None:
    def step(net: Any, global_step: int, batch: Any) -> Any:
        net.log("value", 1.0, reduce="max")
        net.log("value", 1.0)

    error = train(Net(train_step=step)).error
    assert isinstance(error, ValueError)
    assert "log('value') got reduce='mean' here and 'max' before" in str(error)


def test_nothing_is_logged_outside_of_a_run() -> None:
    Net().log_dict({"value": 1.0}, reduce="max")


@pytest.mark.parametrize(
    ("log", "error", "says"),
    [
        (
            lambda net: net.log_dict([("a", 1)]),
            TypeError,
            r"log_dict\(\) takes a dict of names and values, not \[\('a'",
        ),
        (lambda net: net.log_dict(None), TypeError, "takes a dict of names and values, not None"),
        (lambda net: net.log_dict({"a": {"b": 1}}), TypeError, r"log\('a'\) takes a number"),
        (lambda net: net.log("a", Histogram(net.x), reduce="max"), ValueError, "for something that is not a number"),
        (lambda net: net.log("a", "text", reduce="last"), ValueError, "reduce='last' for something that is not a numb"),
    ],
)
def test_values_without_names_or_numbers_are_refused(log: Any, error: type[Exception], says: str) -> None:
    outcome = train(logging_net(lambda net, *_: log(net)))
    assert isinstance(outcome.error, error)
    assert re.search(says, str(outcome.error))
