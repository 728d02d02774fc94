"""`EarlyStopping`, and `should_stop`, by which any callback can stop a run after a validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import Diary, Net, make_trainer, train

from events.messages import (
    CheckpointStaged,
    CommandTaken,
    MetricsLogged,
    RunEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    ValEpochEnded,
)
from trainer import CallbackInterface, Checkpoints, fenced
from trainer.callbacks import EarlyStopping
from trainer.errors import ArgumentsError, MetricNotFound

ONLY_ON_DEMAND = Checkpoints(every_minutes=None, at_end=False, weights=False)


def scripted(curve: list[float], act: Callable[[int], object] | None = None, **keys: list[float]) -> Net:
    """Return a module whose n-th step is followed by the n-th loss of this curve; ``keys``: of other dataloaders."""
    curves = keys | {"default": curve}
    return Net(  # two steps an epoch
        act=act,
        val_data=lambda net, batch_size: {key: [key] for key in ("default", *keys)},
        val_step=lambda net, step, key: torch.tensor(curves[key][step - 1]),
    )


def trained(curve: list[float], callback: Any, **options: Any) -> Any:
    """Validate after each step, for as many steps as the curve has."""
    options = {"epochs": len(curve) // 2, "val_interval_steps": 1} | options
    return train(scripted(curve), callbacks=[callback], **options)


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_metric_that_is_never_logged_ends_the_run_and_names_the_others() -> None:
    outcome = trained([1.0] * 4, EarlyStopping("acuracy"))
    assert isinstance(outcome.error, MetricNotFound)
    assert "EarlyStopping follows 'acuracy'" in str(outcome.error)
    assert "available: val_loss" in str(outcome.error)
    assert outcome.error.__notes__[0] == "raised by EarlyStopping.should_stop at global_step 1"


@pytest.mark.parametrize("answer", [True, False, 1.0])
def test_an_answer_that_is_not_a_reason_is_an_error(answer: Any) -> None:
    class Own(CallbackInterface):
        def should_stop(self, global_step: int, metrics: Any) -> Any:
            return answer

    outcome = trained([1.0] * 4, Own())
    assert isinstance(outcome.error, TypeError)
    assert f"a string, or None, not {answer!r}" in str(outcome.error)


def test_a_method_that_is_async_is_refused() -> None:
    class Own(CallbackInterface):
        async def should_stop(self, global_step: int, metrics: Any) -> str | None:
            return None

    with pytest.raises(ArgumentsError, match=r"Own\.should_stop is async"):
        make_trainer(Net(), callbacks=[Own()]).train()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_without_check_finite_a_metric_that_is_not_finite_is_no_improvement(mode: Any) -> None:
    curve = [math.nan, math.inf, -math.inf, 2.0, math.nan, -math.inf, math.inf, 5.0]
    callback = EarlyStopping(mode=mode, patience=4, check_finite=False, target=0.0 if mode == "min" else 9.0)
    result = trained(curve, callback).result
    # Three values that are not finite, the first finite one, three again; the last one improves only with "max".
    assert callback.best == (2.0 if mode == "min" else 5.0)
    assert (result.status, result.global_step) == ("stopped" if mode == "min" else "finished", 8)


# ------------------------------------------------------------------------------------------------ when it stops


@pytest.mark.parametrize(
    ("curve", "arguments", "step"),
    [
        ([5.0, 4.0, 4.0, 4.5, 4.1, 1.0], {"patience": 3}, 5),
        ([5.0, 4.0, 4.0, 3.9, 4.0, 4.0, 4.0, 1.0], {"patience": 3}, 7),
        ([5.0, 5.0, 1.0, 1.0], {"patience": 1}, 2),
        ([1.0, 2.0, 2.0, 3.0, 2.5, 9.0], {"mode": "max", "patience": 1}, 3),
        ([5.0, 4.5, 4.1, 3.6, 1.0, 1.0], {"min_delta": 1.0, "patience": 2}, 3),
        ([5.0, 4.0, 4.0, 4.0], {"min_delta": 1.0, "patience": 2}, 3),
        ([1.0, 1.5, 3.0, 3.5, 3.9, 9.0], {"mode": "max", "min_delta": 1.0, "patience": 2}, 5),
        ([5.0, 4.0, 3.0, 2.0], {"target": 3.0}, 3),
        ([5.0, 4.0, 3.0, 2.0], {"target": 3.5}, 3),
        ([1.0, 2.0, 3.0, 4.0], {"target": 3, "mode": "max"}, 3),
    ],
)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_it_stops_at_the_step_that_the_curve_says(
    tmp_path: Path, curve: list[float], arguments: dict[str, Any], step: int, checkpoints: bool
) -> None:
    own = {"checkpoints": ONLY_ON_DEMAND, "run_dir": tmp_path / "run"} if checkpoints else {}
    result = trained(curve, EarlyStopping(**arguments), **own).result
    assert (result.status, result.global_step) == ("stopped", step)
    assert (result.checkpoint is not None) == checkpoints


IMPROVED = "its best value was"


@pytest.mark.parametrize(
    ("curve", "arguments", "reason"),
    [
        (
            [5.0, 4.25, 4.5, 4.75],
            {"patience": 2},
            f"val_loss has not improved for 2 evaluations (patience): it is 4.75, {IMPROVED} 4.25 at step 2",
        ),
        ([5.0, 4.0, 3.0, 2.0], {"target": 3.5}, "val_loss is 3 at step 3, which reaches the target of 3.5"),
        ([3.0, 2.0, math.nan, 1.0], {}, f"val_loss is nan at step 3 (check_finite); {IMPROVED} 2 at step 2"),
        ([3.0, 2.0, math.inf, 1.0], {}, f"val_loss is inf at step 3 (check_finite); {IMPROVED} 2 at step 2"),
        ([3.0, 2.0, -math.inf, 1.0], {}, f"val_loss is -inf at step 3 (check_finite); {IMPROVED} 2 at step 2"),
    ],
)
def test_the_reason_is_in_the_result_the_events_and_the_command(
    curve: list[float], arguments: dict[str, Any], reason: str
) -> None:
    outcome = trained(curve, EarlyStopping(**arguments))
    assert (outcome.result.status, outcome.result.reason) == ("stopped", reason)
    assert outcome.of(RunEnded)[0].reason == reason
    taken = [(event.command, event.command_id, event.reason) for event in outcome.of(CommandTaken)]
    assert taken == [("stop", "callback-EarlyStopping", reason)]


def test_a_stop_between_two_epochs_starts_no_other_epoch() -> None:
    asked: list[int] = []

    def train_data(net: Net, batch_size: int) -> Any:
        asked.append(1)
        return net.batches(batch_size)

    net = Net(train_data=train_data, val_step=lambda net, step, batch: torch.tensor(1.0))
    diary = Diary()
    outcome = train(net, callbacks=[diary, EarlyStopping(patience=1)], epochs=9)
    result = outcome.result
    assert (result.status, result.global_step, result.epochs) == ("stopped", 4, 2)
    assert len(outcome.of(TrainEpochStarted)) == len(outcome.of(TrainEpochEnded)) == len(asked) == 2
    assert diary.names[-3:] == ["on_end_val_epoch", "on_end_train_epoch", "on_end_train"]


def test_after_the_last_epoch_there_is_nothing_to_stop() -> None:
    result = trained([1.0] * 4, EarlyStopping(patience=1), epochs=2, val_interval_steps=None).result
    assert (result.status, result.reason) == ("finished", None)


def test_other_dataloaders_have_their_key_in_the_name() -> None:
    net = scripted([5.0, 4.0, 3.0, 2.0], b=[1.0, 1.0, 1.0, 1.0])
    result = train(net, callbacks=[EarlyStopping("val_loss/b", patience=2)], val_interval_steps=1, epochs=2).result
    assert (result.status, result.global_step) == ("stopped", 3)
    assert result.reason is not None
    assert result.reason.startswith("val_loss/b has not improved")


def test_it_is_asked_once_for_all_dataloaders() -> None:
    """A validation counts once for all its dataloaders, and none of their outputs are kept."""
    net = scripted([5.0, 5.0, 5.0, 5.0], b=[1.0] * 4, c=[1.0] * 4)
    callback = EarlyStopping(patience=9)
    train(net, callbacks=[callback], val_interval_steps=1, epochs=2, epoch_outputs_limit_bytes=1)
    assert (callback.best_step, callback.waited) == (1, 3)


@pytest.mark.parametrize("where", ["val_step", "module", "fenced"])
def test_a_metric_logged_before_the_end_of_the_validation_can_be_followed(where: str) -> None:
    class Own(Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if where == "val_step":
                self.log("score", torch.tensor(float(global_step)))
            return self.forward_loss(batch)

        if where == "module":

            def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
                self.log("score", global_step)

    class Scores(CallbackInterface):
        @fenced
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            if where == "fenced":
                net.log("score", global_step)

    net = Own()
    options = {"val_interval_steps": 1, "epochs": 4}
    result = train(net, callbacks=[Scores(), EarlyStopping("score", "max", target=5)], **options).result
    assert (result.status, result.global_step) == ("stopped", 5)


def test_any_callback_can_stop_a_run() -> None:
    class Own(CallbackInterface):
        def should_stop(self, global_step: int, metrics: Any) -> str | None:
            return f"enough: {sorted(metrics)}" if global_step == 3 else None

    result = trained([1.0] * 8, Own()).result
    assert (result.status, result.global_step, result.reason) == ("stopped", 3, "enough: ['val_loss']")


def test_a_modules_should_stop_is_not_called() -> None:
    class Own(Net):
        def should_stop(self) -> bool:
            raise AssertionError

        bind_optimizers = should_stop

    assert train(Own()).result.status == "finished"


# -------------------------------------------------------------------------------------------------- checkpoints


class Crash(Exception):
    """Stands for the death of the process."""


@pytest.mark.parametrize("at", [3, 4, 8])
@pytest.mark.parametrize(
    ("every", "patience", "curve", "expected"),
    [
        ({"val_interval_steps": 1}, 3, [5.0, 4.0, 4.2, 3.5, 3.6, 3.4999, 3.7, 3.8, 3.9, 1.0], 9),
        ({"val_interval_steps": 2}, 2, [9.0, 4.0, 9.0, 3.5, 9.0, 3.6, 9.0, 3.6, 9.0, 1.0], 8),
        ({"val_interval_epochs": 1}, 2, [9.0, 4.0, 9.0, 3.5, 9.0, 3.6, 9.0, 3.6, 9.0, 1.0], 8),
    ],
    ids=["each step", "each second step", "epochs"],
)
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(
    tmp_path: Path, at: int, every: dict[str, int], patience: int, curve: list[float], expected: int
) -> None:
    def attempt(callback: EarlyStopping, crash: int | None = None, **options: Any) -> Any:
        def act(step: int) -> None:
            if step == crash:
                raise Crash

        return train(scripted(curve, act), callbacks=[callback], epochs=5, **every, **options)

    whole, first, second = (EarlyStopping(patience=patience) for _ in range(3))
    result = attempt(whole).result
    assert (result.status, result.global_step) == ("stopped", expected)
    each_step = Checkpoints(every_minutes=None, every_steps=1, when_busy="wait")
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": each_step}
    assert isinstance(attempt(first, crash=at, **run).error, Crash)
    again = attempt(second, resume="auto", **run).result
    assert (again.status, again.global_step, again.reason) == ("stopped", expected, result.reason)
    assert second.state_dict() == whole.state_dict()


def test_the_checkpoint_of_the_stop_contains_the_validation(tmp_path: Path) -> None:
    """A resumed run does not validate the same step again, and gets one more validation in which to improve."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": ONLY_ON_DEMAND}
    curve = [2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5, 1.5]
    outcome = trained(curve, EarlyStopping(patience=2), **run)
    assert [(event.global_step, event.reasons) for event in outcome.of(CheckpointStaged)] == [(3, ["stop"])]
    outcome = trained(curve, EarlyStopping(patience=2), resume="auto", **run)
    assert [event.global_step for event in outcome.of(ValEpochEnded)] == [4]
    assert (outcome.result.status, outcome.result.global_step) == ("stopped", 4)
    outcome = trained(curve, EarlyStopping(patience=4), resume="auto", **run)
    assert [event.global_step for event in outcome.of(ValEpochEnded)] == [5]  # it has waited for 3, and this is the 4th


def test_it_stops_at_the_best_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(every_minutes=None, at_end=False, best="val_loss")
    run = {"run_dir": tmp_path / "run", "checkpoints": checkpoints}
    outcome = trained([3.0, 2.0, 1.0, 0.5], EarlyStopping(target=1.0), **run)
    staged = outcome.of(CheckpointStaged)
    assert [event.global_step for event in staged] == [1, 2, 3]
    assert staged[-1].metric == 1.0
    assert outcome.result.checkpoint is not None
    assert Path(outcome.result.checkpoint).name == "step-3.a1"


def test_a_checkpoint_of_another_metric_resets_the_state(tmp_path: Path, caplog: Any) -> None:
    """Its best value does not apply to this one."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(every_minutes=None)}
    trained([0.5, 4.0, 3.0, 2.0], EarlyStopping(patience=9), max_steps=2, **run)
    other = EarlyStopping("val_loss", "max", patience=9)
    trained([0.5, 4.0, 3.0, 2.0], other, resume="auto", **run)
    assert "EarlyStopping starts without the checkpoint's state, which is of 'val_loss' (mode 'min')" in caplog.text
    assert (other.best, other.best_step, other.waited) == (3.0, 3, 1)


def test_the_wait_for_the_device_is_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = torch.Tensor.__float__

    def read(self: torch.Tensor) -> float:
        reads.append(1)
        return original(self)

    monkeypatch.setattr(torch.Tensor, "__float__", read)
    outcome = trained([1.0] * 8, EarlyStopping(patience=9), val_interval_steps=2)
    assert len(reads) == len(outcome.of(ValEpochEnded)) == 4
    assert outcome.result.ledger.readback_s > 0
    assert outcome.of(MetricsLogged) == []
