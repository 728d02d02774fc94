"""The loop's thread reads no number from a tensor: on a device each read would wait for all enqueued work.

Reads are detected by name, on the CPU, on the loop's thread alone: calls from Python that turn a tensor into a host
value, and the operators underneath, from any caller.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.reads import watching_reads
from support.training import Diary, Net, Outcome, train

from events.messages import Event, MetricsLogged, TrainStepEnded, ValEpochEnded
from events.sink import Delivery
from trainer import Histogram, inline


class Watching:
    """A sink that formats every number of every event, as soon as it can."""

    delivery = Delivery(latency_s=0.001)

    def __init__(self) -> None:
        self.text: list[str] = []

    def open(self, run: Any) -> Watching:
        return self

    def write(self, events: Sequence[Event]) -> None:
        self.text += [f"{event}" for event in events]

    def close(self) -> None: ...


def reads_of(net: Net, **options: Any) -> tuple[list[str], Outcome]:
    """Return the reads of a run on the loop's thread, which is this one: from Python, then of operators."""
    found: list[str] = []
    with watching_reads(found):
        outcome = train(net, **({"seed": 0, "epochs": 2} | options))
    assert outcome.result.status == "finished"
    return found, outcome


class Busy(Net):
    """Logs numbers and tensors wherever it can, and validates two dataloaders."""

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        return {"default": self.batches(batch_size), "b": self.batches(batch_size)}

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        loss, predicted = self.forward_loss(batch)
        self.log("tensor", predicted.mean())
        self.log("histogram", Histogram(predicted))
        self.log("number", 1.0)
        return loss, predicted

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        loss, predicted = self.forward_loss(batch)
        self.log("val tensor", predicted.mean())
        return loss, predicted

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        self.log("backward", loss_tensor)

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.log("inline", outputs[0].mean())


# ---------------------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("expression", ["item()", "tolist()", "cpu()", "__float__()", "numpy()", "__format__('')"])
def test_a_step_that_reads_its_loss_is_noticed(expression: str) -> None:
    """The other tests rely on it."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        loss, predicted = net.forward_loss(batch)
        eval(f"loss.detach().{expression}")
        return loss, predicted

    assert reads_of(Net(train_step=step))[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gpu_batch_size_limit": 2},
        {"clip_grads": True},
        {"clip_grads": True, "max_grad_norm": float("inf"), "val_interval_steps": 1},
        {"precision": "bfloat16"},
        {"journal": True, "ledger_interval_s": 1e-9},
    ],
    ids=["plain", "accumulating", "clipping", "norm", "bfloat16", "journal"],
)
def test_the_loop_reads_nothing(options: dict[str, Any]) -> None:
    """With metrics from everywhere, a sink that looks at every number, callbacks with outputs, and validation."""
    watching = Watching()
    found, outcome = reads_of(Busy(rows=28), sinks=[watching], callbacks=[Diary()], **options)
    assert found == []
    steps = outcome.of(TrainStepEnded)
    assert len(steps) == 8
    assert all(type(event.loss) is float and type(event.lr) is float for event in steps)
    assert all((type(event.grad_norm) is float) == options.get("clip_grads", False) for event in steps)
    assert all(type(event.loss) is float for event in outcome.of(ValEpochEnded))
    logged = {name for event in outcome.of(MetricsLogged) for name in event.metrics}
    assert logged == {"tensor", "number", "val tensor", "backward", "inline"}
    assert len(watching.text) >= len(outcome.events) - 1


@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_skipping_reads_once_a_step(micro_batch: int, policy: str) -> None:
    """Loss and gradients in one read for all micro-batches; on the CPU "stop" reads, too, which waits for no device."""
    options = {"non_finite": policy, "gpu_batch_size_limit": micro_batch, "clip_grads": policy == "skip"}
    found, outcome = reads_of(Busy(rows=32), callbacks=[Diary()], **options)
    assert outcome.result.global_step == 8
    assert found == ["Tensor.tolist"] * 8


def test_float16_reads_one_number_per_step() -> None:
    """Whether its gradients have overflowed, over all optimizers, in the same read as the loss."""

    def two(net: Net) -> Any:
        return [torch.optim.SGD([one], lr=0.01) for one in net.parameters()], []

    found, outcome = reads_of(Net(rows=32, optimizers=two), precision="float16", val_interval_epochs=0)
    assert outcome.result.ledger.steps == 8
    # Torch's own unscaling reads no number; a skipped step reads as much as any other.
    assert found == ["Tensor.tolist"] * 8


def test_a_scheduler_with_a_metric_reads_one_number_per_validation() -> None:
    def follows(net: Net) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]

    found, _ = reads_of(Net(rows=32, optimizers=follows), epochs=3)
    assert found.count("Tensor.__float__") == 3
    assert found.count("aten._local_scalar_dense") == 3


def test_numbers_are_read_on_the_event_loops_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once: far fewer reads than there are numbers."""
    threads: list[str] = []
    tolist = torch.Tensor.tolist

    def seen(self: torch.Tensor) -> Any:
        threads.append(threading.current_thread().name)
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", seen)
    outcome = train(Busy(rows=800), val_interval_epochs=0)
    numbers = 4 * len(outcome.of(TrainStepEnded))
    assert numbers == 400
    assert set(threads) == {"stagecast-events"}
    assert len(threads) < numbers / 4
