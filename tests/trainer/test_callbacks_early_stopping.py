"""`EarlyStopping`, and `should_stop`, by which any callback can stop a run after a validation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from events.messages import (
    CheckpointStaged,
    CommandTaken,
    MetricsLogged,
    ObserverFailed,
    RunEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    ValEpochEnded,
)
from events.sink import CALLBACK_DELIVERY
from trainer import CallbackInterface, Checkpoints, fenced
from trainer.callbacks import EarlyStopping
from trainer.errors import ArgumentsError, MetricNotFound

ONLY_ON_DEMAND = Checkpoints(every_minutes=None, at_end=False, weights=False)


def scripted(kit: Any, curve: list[float], **keys: list[float]) -> Any:
    """A module whose n-th step is followed by the n-th loss of this curve; of one curve for each other dataloader."""

    class Scripted(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return {"default": ["default"], **{key: [key] for key in keys}}

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return torch.tensor((keys | {"default": curve})[batch][global_step - 1])

    return Scripted(rows=16)  # two steps an epoch


def trained(kit: Any, curve: list[float], callback: Any, **options: Any) -> Any:
    """Validate after each step, for as many steps as the curve has."""
    options = {"epochs": len(curve) // 2, "val_interval_steps": 1} | options
    return kit.train(scripted(kit, curve), callbacks=[callback], **options)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"monitor": ""}, "monitor must be a metric's name, not ''"),
        ({"monitor": None}, "monitor must be a metric's name, not None"),
        ({"monitor": "train_loss"}, "follow 'train_epoch_loss'"),
        ({"mode": "smallest"}, "mode must be 'min' or 'max', not 'smallest'"),
        ({"patience": 0}, "patience must be an integer >= 1, not 0"),
        ({"patience": 2.0}, "patience must be an integer >= 1, not 2.0"),
        ({"patience": True}, "patience must be an integer"),
        ({"min_delta": -0.1}, "min_delta must be a number from 0, not -0.1"),
        ({"min_delta": math.nan}, "min_delta must be a number from 0, not nan"),
        ({"check_finite": 1}, "check_finite must be True or False, not 1"),
        ({"target": "low"}, "target must be a number or None, not 'low'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], problem: str) -> None:
    """When it is made, not in the hundredth step."""
    with pytest.raises(ArgumentsError, match=r"^EarlyStopping: ") as caught:
        EarlyStopping(**arguments)
    assert problem in str(caught.value)


def test_all_wrong_arguments_are_named_at_once() -> None:
    """Not one after the other."""
    with pytest.raises(ArgumentsError, match=r"mode must be .*; patience must be "):
        EarlyStopping(mode="up", patience=-1)  # type: ignore[arg-type]


def test_a_metric_that_is_never_logged_ends_the_run_and_names_the_others(kit: Any) -> None:
    """A misspelt name would be a run that never stops."""
    outcome = trained(kit, [1.0] * 4, EarlyStopping("acuracy"))
    assert isinstance(outcome.error, MetricNotFound)
    assert "EarlyStopping follows 'acuracy'" in str(outcome.error)
    assert "available: val_loss" in str(outcome.error)
    assert outcome.error.__notes__[0] == "raised by EarlyStopping.should_stop at global_step 1"


def test_a_failure_may_only_disable_it(kit: Any) -> None:
    """As its policy says; it is not asked again."""
    delivery = kit.replace(CALLBACK_DELIVERY, on_error="disable")
    outcome = trained(kit, [1.0] * 10, (EarlyStopping("acuracy"), delivery))
    assert (outcome.result.status, outcome.result.global_step) == ("finished", 10)
    assert [(event.during, event.action) for event in outcome.of(ObserverFailed)] == [("should_stop", "disabled")]


@pytest.mark.parametrize("answer", [True, False, 1.0])
def test_an_answer_that_is_not_a_reason_is_an_error(kit: Any, answer: Any) -> None:
    """A callback of the user's that returns whether to stop would stop with False, too."""

    class Own(CallbackInterface):
        def should_stop(self, global_step: int, metrics: Any) -> Any:
            return answer

    outcome = trained(kit, [1.0] * 4, Own())
    assert isinstance(outcome.error, TypeError)
    assert f"a string, or None, not {answer!r}" in str(outcome.error)


def test_a_method_that_is_async_is_refused(kit: Any) -> None:
    """The loop could not wait for it."""

    class Own(CallbackInterface):
        async def should_stop(self, global_step: int, metrics: Any) -> str | None:
            return None

    with pytest.raises(ArgumentsError, match=r"Own\.should_stop is async"):
        kit.make_trainer(kit.Net(), callbacks=[Own()]).train()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_stops_at_once(kit: Any, bad: float) -> None:
    """There is nothing to wait for."""
    result = trained(kit, [3.0, 2.0, bad, 1.0], EarlyStopping(patience=3)).result
    assert (result.status, result.global_step) == ("stopped", 3)
    assert result.reason == f"val_loss is {bad} at step 3 (check_finite); its best value was 2 at step 2"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_is_not_finite_may_pass_for_no_improvement(kit: Any, mode: Any) -> None:
    """It is never the best one, and reaches no target."""
    curve = [math.nan, math.inf, -math.inf, 2.0, math.nan, -math.inf, math.inf, 5.0]
    callback = EarlyStopping(mode=mode, patience=4, check_finite=False, target=0.0 if mode == "min" else 9.0)
    result = trained(kit, curve, callback).result
    # Three that are none, then the first that is one, and again three; the last is no improvement for "min" alone.
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
    kit: Any, tmp_path: Path, curve: list[float], arguments: dict[str, Any], step: int, checkpoints: bool
) -> None:
    """With or without checkpoints, right after the validation: not one more step is trained."""
    own = {"checkpoints": ONLY_ON_DEMAND, "run_dir": tmp_path / "run"} if checkpoints else {}
    result = trained(kit, curve, EarlyStopping(**arguments), **own).result
    assert (result.status, result.global_step) == ("stopped", step)
    assert (result.checkpoint is not None) == checkpoints


def test_the_reason_tells_metric_best_value_and_patience(kit: Any) -> None:
    """In the result, in the event of the end, and where the stop was taken."""
    outcome = trained(kit, [5.0, 4.25, 4.5, 4.75], EarlyStopping(patience=2))
    reason = "val_loss has not improved for 2 evaluations (patience): it is 4.75, its best value was 4.25 at step 2"
    assert outcome.result.reason == reason
    assert outcome.of(RunEnded)[0].reason == reason
    taken = outcome.of(CommandTaken)
    assert [(event.command, event.command_id, event.reason) for event in taken] == [
        ("stop", "callback-EarlyStopping", reason)
    ]


def test_a_target_names_itself(kit: Any) -> None:
    """And what reached it."""
    result = trained(kit, [5.0, 4.0, 3.0, 2.0], EarlyStopping(target=3.5)).result
    assert result.reason == "val_loss is 3 at step 3, which reaches the target of 3.5"


def test_a_stop_between_two_epochs_begins_no_other(kit: Any) -> None:
    """The epoch is finished, with its hooks; the module is not even asked for another one's data."""
    asked: list[int] = []

    class Net(type(scripted(kit, []))):  # type: ignore[misc]
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            asked.append(1)
            return super().get_train_dataloader(sampler, batch_size)

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return torch.tensor(1.0)

    diary = kit.Diary()
    outcome = kit.train(Net(), callbacks=[diary, EarlyStopping(patience=1)], epochs=9)
    result = outcome.result
    assert (result.status, result.global_step, result.epochs) == ("stopped", 4, 2)
    assert len(outcome.of(TrainEpochStarted)) == len(outcome.of(TrainEpochEnded)) == len(asked) == 2
    assert diary.names[-3:] == ["on_end_val_epoch", "on_end_train_epoch", "on_end_train"]


def test_after_the_last_epoch_there_is_nothing_to_stop(kit: Any) -> None:
    """The run is finished."""
    result = trained(kit, [1.0] * 4, EarlyStopping(patience=1), epochs=2, val_interval_steps=None).result
    assert (result.status, result.reason) == ("finished", None)


def test_other_dataloaders_have_their_key_in_the_name(kit: Any) -> None:
    """As in the result."""
    net = scripted(kit, [5.0, 4.0, 3.0, 2.0], b=[1.0, 1.0, 1.0, 1.0])
    result = kit.train(net, callbacks=[EarlyStopping("val_loss/b", patience=2)], val_interval_steps=1, epochs=2).result
    assert (result.status, result.global_step) == ("stopped", 3)
    assert result.reason is not None
    assert result.reason.startswith("val_loss/b has not improved")


def test_it_is_asked_once_for_all_dataloaders(kit: Any) -> None:
    """A validation counts once, however many there are; and the outputs of none are kept for it."""
    net = scripted(kit, [5.0, 5.0, 5.0, 5.0], b=[1.0] * 4, c=[1.0] * 4)
    callback = EarlyStopping(patience=9)
    kit.train(net, callbacks=[callback], val_interval_steps=1, epochs=2, epoch_outputs_limit_bytes=1)
    assert (callback.best_step, callback.waited) == (1, 3)


@pytest.mark.parametrize("where", ["val_step", "module", "fenced"])
def test_what_was_logged_by_the_end_of_the_validation_can_be_followed(kit: Any, where: str) -> None:
    """By its steps, by the module's own hook, by a callback for which the loop waits."""

    class Net(kit.Net):
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

    net = Net()
    options = {"val_interval_steps": 1, "epochs": 4}
    result = kit.train(net, callbacks=[Scores(), EarlyStopping("score", "max", target=5)], **options).result
    assert (result.status, result.global_step) == ("stopped", 5)


def test_a_run_that_does_not_validate_is_judged_by_the_epoch(kit: Any) -> None:
    """By what its steps have logged."""

    class Net(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.log("constant", 1.0)
            return self.forward_loss(batch)

    result = kit.train(Net(), callbacks=[EarlyStopping("constant", patience=2)], val_interval_epochs=0, epochs=9).result
    assert (result.status, result.epochs, result.global_step) == ("stopped", 3, 6)


def test_any_callback_can_stop_a_run(kit: Any) -> None:
    """It needs no more than the method; the first that asks gives the reason."""

    class Own(CallbackInterface):
        def should_stop(self, global_step: int, metrics: Any) -> str | None:
            return f"enough: {sorted(metrics)}" if global_step == 3 else None

    result = trained(kit, [1.0] * 8, Own()).result
    assert (result.status, result.global_step, result.reason) == ("stopped", 3, "enough: ['val_loss']")


def test_a_modules_method_of_that_name_is_its_own(kit: Any) -> None:
    """The user's module may have methods of any name."""

    class Net(kit.Net):
        def should_stop(self) -> bool:
            raise AssertionError

        bind_optimizers = should_stop

    assert kit.train(Net()).result.status == "finished"


@pytest.mark.anyio
async def test_it_stops_a_run_within_an_event_loop(kit: Any) -> None:
    """At the same step as `train`."""
    callback = EarlyStopping(patience=2)
    trainer = kit.make_trainer(
        scripted(kit, [2.0, 1.0] + [1.0] * 8), callbacks=[callback], epochs=5, val_interval_steps=1
    )
    async with trainer.run() as run:
        result = await run.result()
    assert (result.status, result.global_step) == ("stopped", 4)


# -------------------------------------------------------------------------------------------------- checkpoints


class Crash(Exception):
    """The process might as well have died."""


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
    kit: Any, tmp_path: Path, at: int, every: dict[str, int], patience: int, curve: list[float], expected: int
) -> None:
    """Wherever it was interrupted, with the same reason; no validation counts twice."""

    def attempt(callback: EarlyStopping, crash: int | None = None, **options: Any) -> Any:
        class Net(type(scripted(kit, curve))):  # type: ignore[misc]
            def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
                if global_step == crash:
                    raise Crash
                return super().train_step(global_step, batch, device)

        return kit.train(Net(), callbacks=[callback], epochs=5, **every, **options)

    whole, first, second = (EarlyStopping(patience=patience) for _ in range(3))
    result = attempt(whole).result
    assert (result.status, result.global_step) == ("stopped", expected)
    each_step = Checkpoints(every_minutes=None, every_steps=1, when_busy="wait")
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": each_step}
    assert isinstance(attempt(first, crash=at, **run).error, Crash)
    again = attempt(second, resume="auto", **run).result
    assert (again.status, again.global_step, again.reason) == ("stopped", expected, result.reason)
    assert second.state_dict() == whole.state_dict()


def test_the_checkpoint_of_the_stop_knows_of_the_validation(kit: Any, tmp_path: Path) -> None:
    """A resumed run does not validate the same step again, and gets one more validation in which to improve."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": ONLY_ON_DEMAND}
    curve = [2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5, 1.5]
    outcome = trained(kit, curve, EarlyStopping(patience=2), **run)
    assert [(event.global_step, event.reasons) for event in outcome.of(CheckpointStaged)] == [(3, ["stop"])]
    outcome = trained(kit, curve, EarlyStopping(patience=2), resume="auto", **run)
    assert [event.global_step for event in outcome.of(ValEpochEnded)] == [4]
    assert (outcome.result.status, outcome.result.global_step) == ("stopped", 4)
    outcome = trained(kit, curve, EarlyStopping(patience=4), resume="auto", **run)
    assert [event.global_step for event in outcome.of(ValEpochEnded)] == [5]  # it has waited for 3, and this is the 4th


def test_it_stops_at_the_best_one(kit: Any, tmp_path: Path) -> None:
    """A target that is reached is the best so far: the checkpoint is kept as such, and is one only."""
    checkpoints = Checkpoints(every_minutes=None, at_end=False, best="val_loss")
    run = {"run_dir": tmp_path / "run", "checkpoints": checkpoints}
    outcome = trained(kit, [3.0, 2.0, 1.0, 0.5], EarlyStopping(target=1.0), **run)
    staged = outcome.of(CheckpointStaged)
    assert [event.global_step for event in staged] == [1, 2, 3]
    assert staged[-1].metric == 1.0
    assert outcome.result.checkpoint is not None
    assert Path(outcome.result.checkpoint).name == "step-3.a1"


def test_a_checkpoint_of_another_metric_resets_the_state(kit: Any, tmp_path: Path, caplog: Any) -> None:
    """Its best value does not apply to this one."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(every_minutes=None)}
    trained(kit, [0.5, 4.0, 3.0, 2.0], EarlyStopping(patience=9), max_steps=2, **run)
    other = EarlyStopping("val_loss", "max", patience=9)
    trained(kit, [0.5, 4.0, 3.0, 2.0], other, resume="auto", **run)
    assert "EarlyStopping starts without the checkpoint's state, which is of 'val_loss' (mode 'min')" in caplog.text
    assert (other.best, other.best_step, other.waited) == (3.0, 3, 1)


def test_the_wait_for_the_device_is_in_the_ledger(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number in each validation, none in a step."""
    reads: list[int] = []
    original = torch.Tensor.__float__

    def read(self: torch.Tensor) -> float:
        reads.append(1)
        return original(self)

    monkeypatch.setattr(torch.Tensor, "__float__", read)
    outcome = trained(kit, [1.0] * 8, EarlyStopping(patience=9), val_interval_steps=2)
    assert len(reads) == len(outcome.of(ValEpochEnded)) == 4
    assert outcome.result.ledger.readback_s > 0
    assert outcome.of(MetricsLogged) == []
