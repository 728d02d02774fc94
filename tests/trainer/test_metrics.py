"""Logged values: their conversion, and the place in the run with which they are published."""

from __future__ import annotations

import fractions
import logging
import math
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support.threads import WAIT_S
from support.training import LANES, Net, hooked, logging_net, make_trainer, train

from events.checkpoint.settings import Checkpoints
from events.messages import MetricsLogged, RunEnded, TrainEpochEnded, TrainStepEnded
from sinks import Memory
from trainer import CallbackInterface
from trainer.errors import ArgumentsError
from trainer.hooks.readback import DeviceReadback
from trainer.hooks.reductions import weighted_mean


def logged(outcome: Any) -> list[dict[str, float]]:
    assert outcome.result.status == "finished"
    return [event.metrics for event in outcome.of(MetricsLogged)]


def test_a_name_that_cannot_be_printed_is_recorded_as_its_escapes(caplog: pytest.LogCaptureFixture) -> None:
    recorded = {
        "a\udc80b": "a\\udc80b",
        "a\0\nb": "a\\x00\\nb",
        "\x1b[31mred": "\\x1b[31mred",
        "a\u202eb": "a\\u202eb",
        "n" * 100_000: "n" * 238 + "...f318a926",
        "good \u00e4": "good \u00e4",
    }

    def val_step(net: Net, step: int, batch: Any) -> Any:
        for name in (*recorded, "score"):
            net.log(name, 1.0)
        return net.forward_loss(batch)

    checkpoints = Checkpoints(best="score", every_epochs=1)
    outcome = train(Net(val_step=val_step), checkpoints=checkpoints, journal=True, run_dir="run", epochs=1)
    assert logged(outcome) == [dict.fromkeys([*recorded.values(), "score"], 1.0)]
    assert outcome.result.checkpoint is not None
    assert {*recorded.values()} <= {*outcome.result.metrics}
    for name in [*recorded.values()][:5]:
        assert caplog.text.count(f"is recorded as {name!r}; use printable names") == 1


@pytest.mark.parametrize("name", ["a\udc80b", "a\nb", "n" * 251])
def test_names_of_monitors_and_runs_must_be_printable(name: str) -> None:
    with pytest.raises(ValueError, match=r"^Checkpoints\(best=.*\): the name has|holds"):
        Checkpoints(best=name)
    with pytest.raises(ArgumentsError, match=r"run_id=.* (has 251|holds) characters"):
        make_trainer(Net(), run_id=name)


# -------------------------------------------------------------------------------------- what is not published


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("", 1.0, ValueError, "empty name"),
        (3, 1.0, TypeError, "not 3"),
        ("acc", object(), TypeError, "log('acc')"),
        ("acc", torch.zeros(2), ValueError, "reduce it first"),
        ("acc", torch.zeros((), dtype=torch.complex64), TypeError, "complex64"),
    ],
)
def test_an_invalid_metric_ends_the_run_where_it_was_logged(
    name: Any, value: Any, error: type[Exception], says: str
) -> None:
    outcome = train(logging_net(lambda net, *_: (net.log("fine", 1.0), net.log(name, value))))
    assert type(outcome.error) is error
    assert says in str(outcome.error)
    assert outcome.of(MetricsLogged) == []


def test_metrics_of_a_skipped_step_are_dropped() -> None:
    calls: list[int] = []

    def log(net: Net, step: int, batch: Any) -> None:
        calls.append(len(calls) + 1)
        net.log("call", calls[-1])
        net.log("tensor", torch.tensor(float(calls[-1])))

    after = hooked("on_end_backward", lambda self, step, loss: self.log("backward", calls[-1]))
    net = logging_net(log, rows=32, scales={2: math.nan})

    outcome = train(net, callbacks=[after()], non_finite="skip", val_interval_epochs=0)
    assert logged(outcome) == [{"call": n, "tensor": n, "backward": n} for n in (1, 3, 4)]
    assert [event.global_step for event in outcome.of(MetricsLogged)] == [1, 2, 3]


def test_logging_outside_of_a_run_does_nothing() -> None:
    net = Net()
    net.log("early", 1.0)
    train(net)
    net.log("late", 1.0)
    failing = logging_net(lambda *_: 1 / 0)
    assert isinstance(train(failing).error, ZeroDivisionError)
    failing.log("late", 1.0)


# ----------------------------------------------------------------------------------------------- the values


def test_every_kind_of_number_becomes_a_float_in_the_order_of_logging() -> None:
    weight = torch.ones((), requires_grad=True)
    values: dict[str, Any] = {
        "float": 0.5,
        "scalar": torch.tensor(0.25),
        "int": 2,
        "bool": True,
        "one": torch.full((1, 1), 3.0),
        "numpy": np.float32(0.5),
        "array": np.array(4),
        "numpy int": np.int64(3),
        "fraction": fractions.Fraction(1, 4),
        "graph": weight * 5,
        "int64": torch.tensor(2**40),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        "bfloat16": torch.tensor(1.5, dtype=torch.bfloat16),
        "flag": torch.tensor(False),
        "nan": math.nan,
        "nan tensor": torch.tensor(math.nan),
        "inf": math.inf,
        "-inf": torch.tensor(-math.inf),
    }
    net = logging_net(lambda net, *_: [net.log(name, value) for name, value in values.items()], rows=8)
    outcome = train(net, val_interval_epochs=0)
    (metrics,) = logged(outcome)
    assert list(metrics) == list(values)
    assert all(type(value) is float for value in metrics.values())
    expected = {name: float(value.item() if hasattr(value, "item") else value) for name, value in values.items()}
    assert metrics == pytest.approx(expected, rel=0, nan_ok=True)
    assert outcome.result.metrics["double"] == 1 / 3
    assert math.isnan(outcome.result.metrics["nan tensor"])


def test_a_tensor_has_its_value_at_the_time_of_logging() -> None:
    def log(net: Any, global_step: int, batch: Any) -> None:
        counter = net.counter = getattr(net, "counter", torch.zeros(1))
        counter += 1
        net.log("counter", counter)
        counter.add_(100).sub_(100)
        counter[0] = global_step

    assert logged(train(logging_net(log, rows=32), val_interval_epochs=0)) == [{"counter": n} for n in (1, 2, 3, 4)]


def test_a_logged_tensor_does_not_keep_its_graph() -> None:
    """Otherwise the activations of each logged step would stay in memory."""
    saved: list[weakref.ref[Any]] = []

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            saved.append(weakref.ref(self))

    def log(net: Any, global_step: int, batch: Any) -> None:
        assert [ref() for ref in saved] == [None] * len(saved)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda one: one.tensor):
            net.log("norm", (net.linear.weight**2).sum())

    assert len(logged(train(logging_net(log, rows=32), val_interval_epochs=0))) == 4
    assert len(saved) >= 4


@pytest.mark.parametrize(
    ("group", "mean"),
    [
        ([(1.0, 3), (5.0, 1)], 2.0),
        ([(torch.tensor(1.0), 3), (torch.tensor(5.0), 1)], 2.0),
        ([(torch.tensor(1), 3), (torch.tensor(4), 1)], 1.75),
        ([(1.0, 1), (torch.tensor(5), 3)], 4.0),
        ([(torch.tensor(1.0, dtype=torch.float64), 1), (torch.tensor(2.0), 1)], 1.5),
        ([(math.inf, 1), (torch.tensor(1.0), 1)], math.inf),
    ],
)
def test_the_mean_is_weighted_whatever_its_numbers_are(group: list[Any], mean: float) -> None:
    """Integers are not divided as integers."""
    assert float(weighted_mean(group)) == mean


# ------------------------------------------------------------------------------------------ steps and loaders


def test_micro_batches_are_averaged_by_rows() -> None:
    def log(net: Any, global_step: int, batch: Any) -> None:
        mean = batch[0].mean()
        net.log("tensor", mean)
        net.log("number", mean.item())
        net.mixed = not getattr(net, "mixed", False)
        net.log("mixed", mean if net.mixed else mean.item())

    net = logging_net(log, rows=13)
    outcome = train(net, gpu_batch_size_limit=4, val_interval_epochs=0)
    events = outcome.of(MetricsLogged)
    expected = [net.x[:8].mean().item(), net.x[8:].mean().item()]
    for name in ("tensor", "number", "mixed"):
        assert [event.metrics[name] for event in events] == pytest.approx(expected, rel=1e-5)
    assert [(event.global_step, event.epoch, event.stage, event.key) for event in events] == [
        (1, 0, "train", None),
        (2, 0, "train", None),
    ]


def test_validation_is_averaged_by_rows_under_its_key() -> None:
    def val_step(net: Net, step: int, batch: Any) -> Any:
        net.log("mean", batch[0].mean())
        net.log("rows", len(batch[0]))
        return net.forward_loss(batch)

    def val_data(net: Net, batch_size: int) -> Any:
        return {"default": net.batches(batch_size), "b": net.batches(batch_size)[2:]}

    net = Net(rows=20, val_step=val_step, val_data=val_data)
    outcome = train(net, epochs=2)
    events = outcome.of(MetricsLogged)
    assert [(e.global_step, e.epoch, e.stage, e.key) for e in events] == [
        (3, 0, "val", "default"),
        (3, 0, "val", "b"),
        (6, 1, "val", "default"),
        (6, 1, "val", "b"),
    ]
    whole, part = net.x.mean().item(), net.x[16:].mean().item()
    assert [e.metrics["mean"] for e in events] == pytest.approx([whole, part] * 2, rel=1e-5)
    assert events[0].metrics["rows"] == pytest.approx((8 * 8 + 8 * 8 + 4 * 4) / 20)
    metrics = outcome.result.metrics
    assert {name for name in metrics if name.startswith(("mean", "rows"))} == {"mean", "mean/b", "rows", "rows/b"}
    assert metrics["mean/b"] == events[3].metrics["mean"]


def test_a_test_logs_under_its_stage() -> None:
    net = Net(
        rows=12,
        test_data=lambda net, size: {"t": net.batches(size)},
        val_step=lambda net, step, batch: net.log("rows", len(batch[0])),
    )

    memory = Memory()
    make_trainer(net, sinks=[memory]).test()
    (event,) = memory.of(MetricsLogged)
    assert (event.stage, event.key, event.metrics) == ("test", "t", {"rows": (64 + 16) / 12})


def test_the_result_has_the_last_value_of_each_metric() -> None:
    def log(net: Any, global_step: int, batch: Any) -> None:
        net.log("step", torch.tensor(global_step))
        if global_step == 1:
            net.log("once", 7)

    outcome = train(logging_net(log), epochs=2)
    metrics = outcome.result.metrics
    assert set(metrics) == {"step", "once", "train_loss", "train_epoch_loss", "val_loss"}
    assert (metrics["step"], metrics["once"]) == (4.0, 7.0)


# ------------------------------------------------------------------------------------------------- the hooks


def logging_callback(net: Any, lane: str, owner: type = CallbackInterface) -> Any:
    """Logs in each hook on the given lane, with the hook's name as the metric's."""

    def hook(name: str) -> Any:
        def run(self: Any, global_step: int, *outputs: Any, key: str = "none") -> None:
            target = net or self
            target.log(name, global_step)
            target.log(f"{name} tensor", torch.tensor(global_step))

        return LANES[lane](run)

    hooks = ("on_begin_train_epoch", "on_end_train_step", "on_end_val_epoch", "on_end_train_epoch")
    return type("Logging", (owner,), {name: hook(name) for name in hooks})


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("who", ["callback", "module"])
def test_hooks_of_every_lane_log_at_the_place_of_their_event(lane: str, who: str) -> None:
    if who == "module":
        outcome = train(logging_callback(None, lane, Net)(), epochs=2)
    else:
        net = Net()
        outcome = train(net, callbacks=[logging_callback(net, lane)()], epochs=2)
        assert outcome.error is None
    places: dict[str, list[Any]] = {}
    for event in outcome.of(MetricsLogged):
        for name, value in event.metrics.items():
            assert value == event.global_step
            places.setdefault(name, []).append((event.global_step, event.epoch, event.stage, event.key))
    epochs = {
        "on_begin_train_epoch": [(0, 0, "train", None), (2, 1, "train", None)],
        "on_end_train_step": [(s, (s - 1) // 2, "train", None) for s in (1, 2, 3, 4)],
        "on_end_val_epoch": [(2, 0, "val", "default"), (4, 1, "val", "default")],
        "on_end_train_epoch": [(2, 0, "train", None), (4, 1, "train", None)],
    }
    for name, seen in places.items():
        expected = epochs[name.removesuffix(" tensor")]
        # An observer's last ones may run when sinks have been drained; the result has them.
        assert seen == (expected[: len(seen)] if lane == "observer" else expected)
    names = {*epochs, *(f"{name} tensor" for name in epochs)}
    assert set(places) == names or lane == "observer"
    last = {name: value for name, value in outcome.result.metrics.items() if name in names}
    assert last == {name: 2.0 if "begin" in name else 4.0 for name in names}


def test_an_observer_that_lags_logs_at_the_step_that_it_handles() -> None:
    third = threading.Event()
    handled = threading.Event()

    class Late(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            assert third.wait(WAIT_S)
            net.log("late", global_step)
            handled.set()

    def log(net: Any, global_step: int, batch: Any) -> None:
        if global_step == 4:
            third.set()
            assert handled.wait(WAIT_S)

    net = logging_net(log, rows=32)
    outcome = train(net, callbacks=[Late()], val_interval_epochs=0)
    first = outcome.of(MetricsLogged)[0]
    assert (first.global_step, first.epoch, first.stage, first.metrics) == (1, 0, "train", {"late": 1.0})


@pytest.mark.parametrize("lane", LANES)
def test_the_last_hook_logs_too(lane: str) -> None:
    final = hooked("on_end_train", lambda self, step: self.log("final", step), lane, Net)

    assert train(final()).result.metrics.get("final") == 2.0


# ---------------------------------------------------------------------------------------------- other threads


@pytest.mark.anyio
async def test_any_thread_may_log() -> None:
    def log(net: Any, global_step: int, batch: Any) -> None:
        net.log("step", global_step)
        thread = threading.Thread(target=lambda: net.log("thread", torch.tensor(float(global_step))))
        thread.start()
        thread.join()

    memory = Memory()
    trainer = make_trainer(logging_net(log), sinks=[memory], val_interval_epochs=0)
    async with trainer.run() as run:
        pass
    events = memory.of(MetricsLogged)
    assert [(e.global_step, e.stage, e.metrics) for e in events] == [
        (0, "train", {"thread": 1.0}),
        (1, "train", {"step": 1.0}),
        (1, "train", {"thread": 2.0}),
        (2, "train", {"step": 2.0}),
    ]
    assert (await run.result()).metrics["thread"] == 2.0
    assert memory.of(RunEnded)[0].status == "finished"


@pytest.mark.anyio
async def test_many_threads_lose_nothing() -> None:
    start = threading.Barrier(4)

    def log(net: Any, global_step: int, batch: Any) -> None:
        def many(thread: int) -> None:
            start.wait(WAIT_S)
            for number in range(100):
                value = 1_000 * thread + number
                net.log(f"thread {thread}", value if number % 2 else torch.tensor(value))

        threads = [threading.Thread(target=many, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    memory = Memory()
    trainer = make_trainer(logging_net(log, rows=8), sinks=[memory], val_interval_epochs=0)
    async with trainer.run():
        pass
    for n in range(4):
        assert [value for _, value in memory.metrics(f"thread {n}")] == [1_000 * n + i for i in range(100)]


def test_an_unreadable_number_is_nan_and_does_not_affect_others(caplog: pytest.LogCaptureFixture) -> None:
    """A warning names the error, and the run continues."""
    caplog.set_level(logging.WARNING, "stagecast")

    def log(net: Net, step: int, batch: Any) -> None:
        net.log("unreadable", torch.empty((), device="meta"))
        net.log("readable", torch.tensor(float(step)))

    outcome = train(logging_net(log))
    assert outcome.result.status == "finished"
    logged = [event.metrics for event in outcome.of(MetricsLogged) if event.key is None]
    assert [metrics["readable"] for metrics in logged] == [1.0, 2.0]
    assert all(math.isnan(metrics["unreadable"]) for metrics in logged)
    assert all(event.loss is not None for event in outcome.of(TrainStepEnded))
    assert any("could not be read" in record.getMessage() for record in caplog.records)


def test_a_loss_that_cannot_be_read_does_not_hide_those_before_it() -> None:
    """The summary has the last loss that could be read, and the epoch's mean is over those."""
    readback = DeviceReadback(lambda event, consecutive: None, lambda event, consecutive: None)
    losses = [torch.tensor(2.0), torch.tensor(4.0), torch.empty((), device="meta")]
    steps = [TrainStepEnded("run", 1, 0, 0.0, 0, at, 0, "train", loss, lr=0.1) for at, loss in enumerate(losses)]
    epoch = TrainEpochEnded("run", 1, 0, 0.0, 0, 3, 0, "train", 3)
    assert readback.start([(event, None) for event in [*steps, epoch]])()
    assert [step.loss for step in steps] == [2.0, 4.0, None]
    assert readback.summary == {"train_loss": 4.0, "train_epoch_loss": 3.0}
    assert epoch.loss == 3.0


def test_an_epoch_has_no_loss_if_steps_of_it_were_dropped() -> None:
    """The mean of the others is not that of the epoch."""
    readback = DeviceReadback(lambda event, consecutive: None, lambda event, consecutive: None)

    def epoch(*losses: float) -> TrainEpochEnded:
        steps = [
            TrainStepEnded("run", 1, 0, 0.0, 0, at, 0, "train", torch.tensor(loss), lr=0.1)
            for at, loss in enumerate(losses)
        ]
        ended = TrainEpochEnded("run", 1, 0, 0.0, 0, 3, 0, "train", 3)
        assert readback.start([(event, None) for event in [*steps, ended]])()
        return ended

    assert [epoch(1.0, 2.0, 6.0).loss, epoch(1.0, 2.0).loss, epoch(2.0, 2.0, 2.0).loss] == [3.0, None, 2.0]


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["train_loss", "val_loss", "val_loss/a", "lr", "grad_norm", "step_s", "ledger/data_s"])
def test_a_reserved_name_is_refused_at_the_first_log(name: str) -> None:
    outcome = train(logging_net(lambda net, *_: net.log(name, 1.0)))
    assert isinstance(outcome.error, ValueError)
    assert repr(name) in str(outcome.error)
    assert "train_epoch_loss, val_loss" in str(outcome.error)


@pytest.mark.parametrize(
    ("logged", "val", "key", "warns"),
    [
        (("acc", 1.0), ("acc", 2.0), "default", "in training and in validation"),
        (("acc/a", 1.0), ("acc", 2.0), "a", "in training and in validation"),
        (("acc", 1.0), ("acc", 2.0), "a", None),
        (("acc", 1.0), ("acc", "text"), "default", "as a number and as a text"),
    ],
)
def test_one_name_for_two_quantities_gets_one_warning(
    caplog: pytest.LogCaptureFixture, logged: Any, val: Any, key: str, warns: str | None
) -> None:
    """They would be one series; a dataloader's key is part of the name."""

    def val_step(net: Net, step: int, batch: Any) -> Any:
        net.log(*val)
        return net.forward_loss(batch)

    net = logging_net(
        lambda net, *_: net.log(*logged), val_step=val_step, val_data=lambda net, size: {key: net.batches(size)}
    )

    train(net, epochs=2)
    found = [text for text in caplog.messages if "is logged" in text]
    assert len(found) == (warns is not None)
    assert warns is None or warns in found[0]
