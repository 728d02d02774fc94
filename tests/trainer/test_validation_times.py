"""When the trainer validates and stops by itself: fractions of an epoch, the start of a run, a limit of time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from support.training import Net, train

from events.messages import CheckpointSaved, RunEnded, TrainEpochEnded, ValEpochEnded, WarningLogged
from trainer import Checkpoints, TrainerArguments
from trainer.errors import ArgumentsError, DataLoaderError


def validating(**options: Any) -> Net:
    return Net(val_data=lambda net, batch_size: net.batches(batch_size), **options)


@pytest.mark.parametrize(
    ("every", "rows", "epochs", "steps"),
    [
        (0.25, 64, 2, [2, 4, 6, 8, 10, 12, 14, 16]),
        (0.25, 80, 1, [3, 5, 8, 10]),
        (0.5, 24, 2, [2, 3, 5, 6]),
        (0.3, 80, 1, [3, 6, 9, 10]),
        (0.1, 80, 1, [*range(1, 11)]),
        (0.1, 24, 1, [1, 2, 3]),
        (0.9, 8, 2, [1, 2]),
        (1.0, 24, 2, [3, 6]),
        (2, 24, 3, [6, 9]),
    ],
)
def test_a_fraction_of_an_epoch_validates_within_it_and_at_its_end(
    every: float, rows: int, epochs: int, steps: list[int]
) -> None:
    outcome = train(validating(rows=rows), epochs=epochs, val_interval_epochs=every)
    assert outcome.error is None
    assert [one.global_step for one in outcome.of(ValEpochEnded)] == steps


@pytest.mark.parametrize("value", [1.5, 2.25, -0.5, float("nan")])
def test_a_fraction_beyond_an_epoch_is_refused(value: float) -> None:
    with pytest.raises(ArgumentsError, match="val_interval_epochs"):
        TrainerArguments(val_interval_epochs=value)


def test_steps_and_parts_of_an_epoch_do_not_mix() -> None:
    with pytest.raises(ArgumentsError, match="val_interval_steps = 3 is set, too; set one of them"):
        TrainerArguments(val_interval_epochs=0.5, val_interval_steps=3)


def test_a_part_of_an_epoch_that_is_shorter_than_a_step_is_a_warning() -> None:
    for every, count in ((0.1, 1), (0.5, 0)):
        warned = train(validating(rows=24), val_interval_epochs=every, epochs=2).of(WarningLogged)
        assert [one.message.partition(":")[0] for one in warned] == [f"val_interval_epochs={every}"] * count


def test_a_fraction_of_an_epoch_of_unknown_length_is_an_error() -> None:
    def endless(net: Net, batch_size: int) -> Iterator[Any]:
        return iter(net.batches(batch_size))

    outcome = train(validating(train_data=endless), val_interval_epochs=0.5)
    assert isinstance(outcome.error, DataLoaderError)
    assert "val_interval_epochs=0.5 needs the number of steps" in str(outcome.error)
    limited = train(validating(train_data=endless, rows=32), val_interval_epochs=0.5, max_train_steps_per_epoch=4)
    assert [one.global_step for one in limited.of(ValEpochEnded)] == [2, 4]


def test_a_resumed_epoch_keeps_its_validations(tmp_path: Any) -> None:
    def fail_at(global_step: int) -> None:
        if global_step == 4:
            raise InterruptedError

    options: dict[str, Any] = {"epochs": 1, "val_interval_epochs": 0.25, "run_dir": tmp_path / "run", "run_id": "one"}
    options["checkpoints"] = Checkpoints(every_steps=1)
    train(validating(rows=64, act=fail_at), **options)
    resumed = train(validating(rows=64), resume="auto", **options)
    steps = [one.global_step for one in resumed.of(ValEpochEnded)]
    assert steps[-3:] == [4, 6, 8]


def test_a_run_validates_before_its_first_step_if_wanted() -> None:
    """With the metrics and hooks of any validation, and without an effect on training."""
    plain = train(validating(), epochs=2)
    outcome = train(validating(), epochs=2, validate_at_start=True)
    at_start, *others = outcome.of(ValEpochEnded)
    assert at_start.global_step == 0
    assert at_start.loss is not None
    assert at_start.loss > others[0].loss
    assert [one.loss for one in others] == [one.loss for one in plain.of(ValEpochEnded)]
    assert "ValEpochStarted" in outcome.names()[:3]


def test_a_resumed_run_does_not_validate_at_its_start(tmp_path: Any) -> None:
    options: dict[str, Any] = {"run_dir": tmp_path / "run", "run_id": "one", "validate_at_start": True}
    options["checkpoints"] = Checkpoints(every_epochs=1)
    train(validating(), epochs=1, **options)
    resumed = train(validating(), epochs=2, resume="auto", **options)
    assert [one.global_step for one in resumed.of(ValEpochEnded)] == [4]


def test_the_validation_at_the_start_can_be_the_best(tmp_path: Any) -> None:
    """The numbers that it logs are judged as those of any validation."""

    class Worse(Net):
        scores = iter([0.9, 0.5, 0.4])

        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            self.log("accuracy", next(self.scores))

    outcome = train(
        Worse(val_data=lambda net, batch_size: net.batches(batch_size)),
        epochs=2,
        validate_at_start=True,
        run_dir=tmp_path / "run",
        checkpoints=Checkpoints(best="accuracy", best_mode="max"),
    )
    assert outcome.error is None
    assert outcome.result.best_metric == 0.9


def test_a_validation_has_the_memory_of_the_last_step_to_itself() -> None:
    """Neither its batch nor its outputs are kept, within an epoch and at its end."""

    class Watched(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, predicted = super().train_step(global_step, (batch[0] + 0, batch[1]), device)
            self.predicted = weakref.ref(predicted)
            return loss, predicted

        def on_end_train_step(self, global_step: int, *outputs: Any) -> None: ...

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            alive.append(self.predicted() is not None)
            return super().val_step(global_step, batch, device)

    alive: list[bool] = []
    train(Watched(rows=32, val_data=lambda net, batch_size: net.batches(32)), epochs=2, val_interval_epochs=0.5)
    assert alive == [False] * 4


def test_a_run_whose_time_is_over_stops_with_a_checkpoint(tmp_path: Any) -> None:
    outcome = train(
        validating(rows=8, act=lambda step: time.sleep(0.02)),
        epochs=100_000,
        max_time_s=0.3,
        run_dir=tmp_path / "run",
        checkpoints=Checkpoints(every_epochs=None),
    )
    assert outcome.result.status == "stopped"
    assert outcome.result.reason == "max_time_s=0.3 is over"
    saved = outcome.of(CheckpointSaved)
    assert saved[-1].global_step == outcome.result.global_step
    assert 0 < outcome.result.global_step <= 20
    assert outcome.of(RunEnded)[0].status == "stopped"


def test_a_limit_of_time_that_is_not_reached_changes_nothing() -> None:
    outcome = train(validating(), epochs=1, max_time_s=1e9)
    assert outcome.result.status == "finished"
    assert len(outcome.of(TrainEpochEnded)) == 1
