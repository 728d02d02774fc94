"""Monitored metrics: only a value of the last validation counts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.threads import WAIT_S
from support.training import Net, Scored, hooked, train
from torch.optim.lr_scheduler import ReduceLROnPlateau

from events.messages import CheckpointStaged, MonitorMissing, TrainEpochEnded
from trainer import CallbackInterface, Checkpoints, fenced, observer
from trainer.callbacks import EarlyStopping
from trainer.errors import ArgumentsError, MetricNotFound

BEST = {"every_minutes": None, "at_end": False, "weights": False}


def with_plateau(net: Net) -> Any:
    """Build an optimizer and a scheduler that follows a metric."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net.plateau = ReduceLROnPlateau(optimizer, patience=99)
    return [optimizer], [net.plateau]


def scored(*scores: float | None, **options: Any) -> Net:
    return Scored(*scores, optimizers=with_plateau, val_step=lambda *_: None, **options)


def test_a_validation_without_the_metric_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Patience, scheduler and best are unchanged; an event reports each miss, a warning the first of several."""
    net, stopping = scored(3.0, None, None, 2.0, None), EarlyStopping("score", patience=1)
    checkpoints = Checkpoints(best="score", **BEST)
    outcome = train(
        net, callbacks=[stopping], epochs=5, monitor="score", run_dir=tmp_path / "run", checkpoints=checkpoints
    )
    assert outcome.result.status == "finished"
    assert (stopping.best, stopping.waited, net.plateau.last_epoch) == (2.0, 0, 2)
    assert [event.global_step for event in outcome.of(CheckpointStaged)] == [1, 4]
    missing = [(event.global_step, event.wanted_by) for event in outcome.of(MonitorMissing)]
    followers = ["ReduceLROnPlateau", "Checkpoints(best=)", "EarlyStopping"]
    assert missing == [(step, name) for step in (2, 3, 5) for name in followers]
    assert len([text for text in caplog.messages if "EarlyStopping follows 'score'" in text]) == 2


def test_a_monitor_ignores_training_metrics_in_a_run_that_validates() -> None:
    def step(net: Net, global_step: int, batch: Any) -> Any:
        net.log("score", 1.0)
        return net.forward_loss(batch)

    outcome = train(scored(None, train_step=step), monitor="score")
    assert isinstance(outcome.error, MetricNotFound)


def test_best_names_the_metrics_if_its_own_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = Net(val_data=lambda net, size: dict.fromkeys("ab", net.batches(size)))

    checkpoints = Checkpoints(best="val_loss", **BEST)
    outcome = train(net, epochs=2, run_dir=tmp_path / "run", checkpoints=checkpoints)
    assert [event.known for event in outcome.of(MonitorMissing)] == [["val_loss/a", "val_loss/b"]] * 2
    (text,) = [text for text in caplog.messages if "follows 'val_loss'" in text]
    assert "set it to 'val_loss/" in text


@pytest.mark.parametrize("validates", [True, False])
def test_the_epochs_mean_loss_can_be_followed_by_all(tmp_path: Path, validates: bool) -> None:
    seen: list[float] = []

    class Stopping(EarlyStopping):
        def should_stop(self, global_step: int, metrics: Any) -> str | None:
            seen.append(float(metrics["train_epoch_loss"]))
            return super().should_stop(global_step, metrics)

    net = Net(rows=20, optimizers=with_plateau)
    outcome = train(
        net,
        callbacks=[Stopping("train_epoch_loss")],
        epochs=2,
        monitor="train_epoch_loss",
        val_interval_epochs=int(validates),
        run_dir=tmp_path / "run",
        checkpoints=Checkpoints(best="train_epoch_loss", **BEST),
    )
    losses = [event.loss for event in outcome.of(TrainEpochEnded)]
    assert seen == pytest.approx(losses)
    assert net.plateau.last_epoch == 2
    assert [event.metric for event in outcome.of(CheckpointStaged)] == pytest.approx(losses)
    assert outcome.of(MonitorMissing) == []


@pytest.mark.parametrize(("mark", "serves"), [(fenced, True), (observer, False)])
def test_only_a_hook_that_the_loop_waits_for_serves_a_monitor(mark: Any, serves: bool) -> None:
    """A metric of another hook may come too late next time, so it never serves."""
    logged = threading.Event()

    def waits(net: Net, step: int, *outputs: Any, key: str) -> None:
        assert key == "default" or logged.wait(WAIT_S)

    net = hooked("on_end_val_epoch", waits, kind=Net)

    class Scores(CallbackInterface):
        @mark  # type: ignore[untyped-decorator]
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            if key == "default":
                self.log("score", 1.0)
                logged.set()

    outcome = train(
        net(val_data=lambda net, size: dict.fromkeys(("default", "b"), net.batches(size))),
        callbacks=[Scores(), EarlyStopping("score")],
    )
    assert isinstance(outcome.error, MetricNotFound) is not serves


def test_the_loss_of_a_step_is_not_a_monitor() -> None:
    from trainer import Schedule, TrainerArguments

    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    with pytest.raises(ArgumentsError, match="train_epoch_loss"):
        TrainerArguments(monitor="train_loss")
    with pytest.raises(ValueError, match="train_epoch_loss"):
        Checkpoints(best="train_loss")
    with pytest.raises(ArgumentsError, match="train_epoch_loss"):
        Schedule(ReduceLROnPlateau(optimizer), monitor="train_loss")
