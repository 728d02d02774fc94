"""The callbacks that come with the trainer read no number in a step, and have no outputs kept for them.

What would make the loop wait for a device is looked for by name, on the CPU, in the loop's thread.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trainer.loop.boundary
from events.messages import HistogramLogged, MetricsLogged, TrainStepEnded
from trainer import CallbackInterface, inline
from trainer.callbacks import EMA, EarlyStopping, LearningRateMonitor, ModelStatistics


def mixed_net(kit: Any) -> Any:
    """Weights of two types, a batch norm, and a learning rate on the device."""

    class Mixed(kit.Net):
        def __init__(self) -> None:
            super().__init__(rows=32)
            self.norm = torch.nn.BatchNorm1d(4)
            self.scale = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=torch.tensor(0.01), foreach=True)
            return [optimizer], []

        def forward_loss(self, batch: Any) -> Any:
            x, y = batch
            predicted = self.linear(self.norm(x) * self.scale.float())
            return torch.nn.functional.mse_loss(predicted, y), predicted

    return Mixed()


def callbacks_of(net: Any) -> list[CallbackInterface]:
    return [
        EMA(net, buffers=True),
        LearningRateMonitor(net, momentum=True),
        ModelStatistics(net, 1, histograms=True, exclude=["norm.*"]),
        EarlyStopping(patience=100),
    ]


def reads_of(kit: Any, net: Any, callbacks: list[CallbackInterface], **options: Any) -> tuple[list[str], Any]:
    found: list[str] = []
    with kit.watching_reads(found):
        outcome = kit.train(net, callbacks=callbacks, epochs=2, seed=0, **options)
    assert outcome.result.global_step == 8
    return found, outcome


def test_a_read_in_a_hook_is_seen(kit: Any) -> None:
    """By what the other tests of this file look with."""

    class Reads(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            outputs[0].sum().item()

    found, _ = reads_of(kit, kit.Net(rows=32), [Reads()])
    assert found.count("Tensor.item") == 8


@pytest.mark.parametrize("options", [{}, {"gpu_batch_size_limit": 2}, {"clip_grads": True, "precision": "bfloat16"}])
def test_no_step_reads_anything(kit: Any, options: dict[str, Any]) -> None:
    """Only the validation does: the number by which a run is stopped."""
    bare, _ = reads_of(kit, mixed_net(kit), [], **options)  # what torch's optimizer does with such a learning rate
    net = mixed_net(kit)
    found, outcome = reads_of(kit, net, callbacks_of(net), **options)
    for one in bare:
        found.remove(one)
    # Each of two validations is of one number, which is seen from Python and underneath.
    assert found.count("Tensor.__float__") == 2
    assert set(found) <= {"Tensor.__float__", "aten._local_scalar_dense", "aten.item"}
    assert found.count("aten._local_scalar_dense") == 2
    names = {name for event in outcome.of(MetricsLogged) for name in event.metrics}
    assert {"lr/optimizer0/group0", "weight_norm_total", "grad_norm_total", "grad_norm/scale"} <= names
    assert len(outcome.of(HistogramLogged)) == 8 * 2 * 3


def test_no_outputs_are_kept_for_them(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be large, and would have to be put together; a hook of the user's still gets them."""
    collated: list[int] = []
    original = trainer.loop.boundary.collate_outputs

    def counted(outputs: Any, notice: Any) -> Any:
        collated.append(len(outputs))
        return original(outputs, notice)

    monkeypatch.setattr(trainer.loop.boundary, "collate_outputs", counted)
    net = kit.Net(rows=32)
    kit.train(net, callbacks=callbacks_of(net), gpu_batch_size_limit=4)
    assert collated == []

    class Own(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            assert [tuple(one.shape) for one in outputs] == [(2,), (8, 1)]

    net = kit.Net(rows=32)
    outcome = kit.train(net, callbacks=[*callbacks_of(net), Own()], gpu_batch_size_limit=4)
    assert collated == [2] * len(outcome.of(TrainStepEnded))
