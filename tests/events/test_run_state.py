"""The state of a run, folded from its events alone: whatever was missed, repeated or made up."""

from __future__ import annotations

from typing import Any

import pytest

from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CommandTaken,
    Event,
    LedgerReported,
    MetricsLogged,
    ObserverFailed,
    ObserverHealth,
    ObserverRecovered,
    ObserversReported,
    RunEnded,
    RunResumed,
    RunStarted,
    StallLedger,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
    ValStepEnded,
)
from events.run.state import RunState
from events.run.summary import Summary


class Tape:
    """Builds events in their order; ``time`` is that of the next one."""

    def __init__(self) -> None:
        self.time, self.attempt, self.step, self.epoch, self.seq = 1_000.0, 1, 0, 0, 0

    def __call__(self, kind: type[Event], **fields: Any) -> Any:
        self.seq += 1
        place = {"global_step": self.step, "epoch": self.epoch} | {
            name: fields.pop(name) for name in ("global_step", "epoch") if name in fields
        }
        return kind(
            run_id="r", attempt=self.attempt, seq=self.seq, time=self.time, rank=0, stage=None, **place, **fields
        )

    def started(self, **fields: Any) -> Any:
        return self(RunStarted, **({"module": "Net", "epochs": 2, "steps_per_epoch": 10} | fields))

    def steps(self, count: int, step_s: float = 1.0, loss: float = 1.0, rows: int | None = None) -> list[Any]:
        found = []
        for _ in range(count):
            self.time += step_s
            self.step += 1
            in_epoch = self.step - 10 * self.epoch
            found.append(self(TrainStepEnded, loss=loss, step_in_epoch=in_epoch, step_s=step_s, rows=rows))
        return found

    def saved(self, step: int, metric: float | None = None) -> Any:
        name = f"step-{step}.a{self.attempt}"
        return self(CheckpointSaved, checkpoint=name, path=f"/c/{name}", metric=metric, global_step=step)


@pytest.fixture
def tape() -> Tape:
    return Tape()


@pytest.fixture
def state() -> RunState:
    return RunState()


def test_time_left_counts_validation_and_not_pauses(tape: Tape, state: RunState) -> None:
    """The rate is that of training alone; the run's rest is estimated at its mean speed with validation."""
    state.add([tape.started(), tape(TrainEpochStarted, steps=10), *tape.steps(5)])
    assert (state.pace.rate, state.epoch_left_s, state.run_left_s) == (1.0, 5.0, 15.0)
    paused = tape(CommandTaken, command="pause", command_id="1")
    tape.time += 1_000.0
    state.add([paused, tape(CommandTaken, command="resume", command_id="2"), *tape.steps(2)])
    assert (state.pace.rate, state.run_left_s) == (1.0, 13.0)
    begun = tape(ValEpochStarted, steps=4)
    tape.time += 9.0
    state.add([begun, tape(ValEpochEnded), *tape.steps(3), tape(TrainEpochEnded)])
    assert (state.pace.rate, state.run_left_s) == (1.0, 20.0)
    tape.epoch = 1
    state.add([tape(TrainEpochStarted, steps=10), *tape.steps(2)])
    assert (state.pace.rate, state.epoch_left_s) == (1.0, 8.0)


def test_time_left_follows_epochs_whose_steps_are_fewer_and_slower(tape: Tape, state: RunState) -> None:
    """The batch size has grown: the estimate is that of the larger steps."""
    state.add([tape.started(epochs=3, total_steps=20), tape(TrainEpochStarted, steps=10, total_steps=20)])
    state.add(tape.steps(10))
    assert (state.total_steps, state.run_left_s) == (20, 10.0)
    tape.epoch = 1
    state.add([tape(TrainEpochStarted, steps=5, total_steps=20), *tape.steps(1, step_s=2.0)])
    assert (state.steps, state.total_steps, state.run_left_s) == (5, 20, None)
    state.add(tape.steps(1, step_s=2.0))
    assert state.run_left_s == 16.0


def test_time_left_follows_steps_whose_rows_grow_within_an_epoch(tape: Tape, state: RunState) -> None:
    state.add([tape.started(total_steps=20), tape(TrainEpochStarted, steps=20, total_steps=20)])
    state.add([*tape.steps(9, rows=8), *tape.steps(1, rows=4)])
    state.add(tape.steps(1, step_s=2.0, rows=16))
    state.add([*tape.steps(1, step_s=2.0, rows=16), *tape.steps(1, step_s=2.0, rows=4)])
    assert state.run_left_s == 14.0


def test_missed_steps_and_a_clock_that_was_set_back_change_no_rate(tape: Tape, state: RunState) -> None:
    """Step events are conflated: one in fifty tells the same as all of them. Negative durations do not exist."""
    state.add([tape.started(), *tape.steps(100, step_s=0.5)[9::45]])
    assert (state.pace.rate, state.run.global_step, state.step_in_epoch) == (2.0, 100, 100)
    tape.time -= 3_600.0
    state.add(tape.steps(1))
    assert (state.pace.rate, state.pace.elapsed_s) == (2.0, 50.0)


def test_only_a_resume_or_a_stop_ends_a_pause(tape: Tape, state: RunState) -> None:
    """A checkpoint that is requested meanwhile does not."""
    for command, paused in (("pause", True), ("checkpoint", True), ("resume", False), ("pause", True), ("stop", False)):
        state.add([tape(CommandTaken, command=command, command_id="id")])
        assert state.run.paused is paused


def test_the_goal_is_the_nearest_limit_and_unknown_once_exceeded(tape: Tape, state: RunState) -> None:
    state.add([tape.started(max_steps=14), *tape.steps(10)])
    assert (state.steps, state.total_steps) == (10, 14)
    tape.epoch = 1
    state.add([tape(TrainEpochStarted, steps=10), *tape.steps(4)])
    assert (state.steps, state.total_steps) == (4, 14)
    state.add(tape.steps(1))
    assert state.total_steps is None
    state.add([tape.started(epochs=1), *tape.steps(6)])
    assert (state.steps, state.total_steps) == (None, None)


def test_a_reader_that_joins_late_knows_the_position_and_nothing_of_the_plan(tape: Tape, state: RunState) -> None:
    tape.epoch = 3
    state.add([*tape.steps(3), tape(ValStepEnded, key="big", step=7)])
    assert (state.run.status, state.run.global_step, state.run.epoch) == ("running", 3, 3)
    assert (state.steps, state.total_steps, state.run_left_s, state.began) == (None, None, None, None)
    assert state.evaluation is not None
    assert (state.evaluation.stage, state.evaluation.key, state.evaluation.step) == ("val", "big", 7)


def test_an_event_about_an_earlier_step_does_not_move_the_position(tape: Tape, state: RunState) -> None:
    state.add([tape.started(), *tape.steps(9), tape.saved(4)])
    assert (state.run.global_step, state.checkpoints["step-4.a1"].global_step) == (9, 4)


def test_a_new_attempt_starts_over_and_keeps_the_checkpoints(tape: Tape, state: RunState) -> None:
    ledger = StallLedger(wall_s=5.0)
    state.add([tape.started(), *tape.steps(9), tape.saved(4), tape(ValEpochStarted)])
    state.add([tape(LedgerReported, scope="run", ledger=ledger), tape(RunEnded, status="failed", reason="E")])
    assert (state.has_ended, state.ledger.wall_s, state.epochs_done) == (True, 5.0, 0)
    first, tape.attempt, tape.step, tape.time = state.run.started, 2, 4, 2_000.0
    state.add([tape.started()])
    assert (state.has_ended, state.run.status, state.run.reason, state.run.started) == (False, "running", None, first)
    assert (state.ledger.wall_s, state.pace.rate, state.pace.elapsed_s, state.evaluation) == (0.0, None, 0.0, None)
    assert (state.began, list(state.checkpoints)) == (2_000.0, ["step-4.a1"])


@pytest.mark.parametrize("first", ["step", "other"])
def test_an_attempt_whose_start_was_missed_is_running(tape: Tape, state: RunState, first: str) -> None:
    """As of its first event that is there, of whatever type; the end of an earlier attempt does not count."""
    state.add([tape.started(), *tape.steps(9), tape(RunEnded, status="failed", reason="E")])
    tape.attempt, tape.time = 2, 2_000.0
    state.add(tape.steps(1) if first == "step" else [tape(MetricsLogged, metrics={"a": 1.0})])
    assert (state.run.attempt, state.run.status, state.run.reason, state.has_ended) == (2, "running", None, False)
    assert (state.run.module, state.pace.rate, state.began) == ("Net", None, None)
    state.add([tape(RunEnded, status="finished")])
    assert (state.run.status, state.has_ended) == ("finished", True)


@pytest.mark.parametrize(
    ("status", "attempt", "damage", "held", "not_held"),
    [
        ("finished", 1, "torn", "finished", "finished"),
        ("failed", 1, None, "failed", "failed"),
        ("running", 1, None, "running", "lost"),
        ("running", 1, "torn", "running", "damaged"),
        ("unknown", 1, None, "running", "lost"),
        ("lost", 1, None, "running", "lost"),
        ("damaged", 1, "torn", "running", "damaged"),
        ("damaged", 1, None, "running", "lost"),
        ("unknown", 0, None, "unknown", "unknown"),
        ("unknown", 0, "torn", "damaged", "damaged"),
    ],
)
def test_a_run_that_has_not_ended_is_running_while_its_folder_is_held_otherwise_lost_or_damaged(
    status: Any, attempt: int, damage: str | None, held: str, not_held: str
) -> None:
    for is_held, expected in ((True, held), (False, not_held)):
        run = Summary(status=status, attempt=attempt, damage=damage)
        run.settle(is_held=is_held)
        assert run.status == expected


def test_checkpoints_after_the_one_resumed_from_are_superseded(tape: Tape, state: RunState) -> None:
    """They are neither the newest nor the best any more, though they are on the disk."""
    state.add([tape.started(best="score"), tape.saved(2, 3.0), tape.saved(4, 2.0), tape.saved(6, 1.0)])
    tape.attempt = 2
    state.add([tape.started(best="score"), tape(RunResumed, checkpoint="step-4.a1", after_seq=3)])
    newest, best = state.newest_checkpoint, state.best_checkpoint
    assert (newest and newest.path, best and best.metric) == ("/c/step-4.a1", 2.0)
    assert (state.checkpoints["step-6.a1"].state, state.checkpoints["step-6.a1"].superseded) == ("durable", True)
    state.add([tape(CheckpointDeleted, checkpoint="step-4.a1"), tape.saved(5, 9.0)])
    newest, best = state.newest_checkpoint, state.best_checkpoint
    assert (newest and newest.name, best and best.name) == ("step-5.a2", "step-2.a1")


def test_the_best_of_very_many_checkpoints_stays(tape: Tape, state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that retention deleted make room first."""
    monkeypatch.setattr("events.run.state.MAX_CHECKPOINTS", most := 50)
    state.add([tape.started(best="score"), tape.saved(1, 0.5), tape.saved(2, 0.1), tape.saved(3, 0.7)])
    for step in range(4, most + 10):
        state.add([tape.saved(step, 1.0)])
        if step % 2:
            state.add([tape(CheckpointDeleted, checkpoint=f"step-{step}.a1")])
    assert list(state.checkpoints)[:3] == ["step-1.a1", "step-2.a1", "step-3.a1"]
    for step in range(most + 10, 3 * most):
        state.add([tape.saved(step, 1.0)])
    assert len(state.checkpoints) == most
    assert next(iter(state.checkpoints)) == "step-2.a1"
    assert state.best_checkpoint is state.checkpoints["step-2.a1"]


def test_failures_of_an_observer_are_counted_though_few_are_reported(tape: Tape, state: RunState) -> None:
    """Of failures in a row the first and the last is reported, each with how many there were."""

    def failed(failures: int, action: str) -> Any:
        return tape(ObserverFailed, observer="csv", error="E", action=action, failures=failures)

    state.add([failed(1, "retrying"), tape(ObserverRecovered, observer="csv", failures=4)])
    assert (state.observers["csv"].state, state.observers["csv"].failures) == ("ok", 4)
    state.add([failed(1, "retrying"), failed(9, "disabled")])
    assert (state.observers["csv"].state, state.observers["csv"].failures) == ("disabled", 13)


def test_made_up_names_do_not_fill_the_memory(tape: Tape, state: RunState) -> None:
    """Too long ones are not kept, and of observers those that failed stay."""
    state.add([tape(ObserverFailed, observer="bad", error="E" * 10_000_000)])
    for number in range(500):
        state.add([tape(ObserversReported, observers=[ObserverHealth(f"o{number}"), ObserverHealth("o" * 10_000)])])
        state.add([tape(CheckpointFailed, checkpoint="c" * (1_000 + number), error="E")])
    state.add([tape(CheckpointSaved, checkpoint="x", path="p" * 10_000_000, reasons=["r" * 10_000] * 1_000)])
    assert len(state.observers) <= 128
    assert "bad" in state.observers
    assert list(state.checkpoints) == ["x"]
    kept = [state.observers["bad"].error or "", state.checkpoints["x"].path, *state.checkpoints["x"].reasons]
    assert sum(map(len, kept)) < 20_000


def test_steps_are_followed_in_rows_that_only_logged_numbers_interrupt(tape: Tape, state: RunState) -> None:
    """Each other event comes when the state has it; of a row of steps the last one comes."""
    events = [*tape.steps(2), tape(MetricsLogged, metrics={"a": 1.0}), *tape.steps(3), tape(ValEpochStarted)]
    seen = [(type(event).__name__, event.global_step, state.run.global_step) for event in state.follow(events)]
    assert seen == [("MetricsLogged", 2, 0), ("TrainStepEnded", 5, 5), ("ValEpochStarted", 5, 5)]


@pytest.mark.parametrize("size", [1, 2, 7, 1_000])
def test_the_state_does_not_depend_on_how_events_are_batched(tape: Tape, size: int) -> None:
    events = [tape.started(best="score"), tape(TrainEpochStarted, steps=10)]
    for step in (3, 6, 9):
        events += [*tape.steps(3, step_s=0.5), tape(MetricsLogged, metrics={"a": 1.0}), tape.saved(step, 1.0 / step)]
        events += [tape(ValEpochStarted), tape(ValEpochEnded, loss=1.0), tape(ObserverFailed, observer="o", error="E")]
    batched, whole = RunState(), RunState()
    whole.add(events)
    for begin in range(0, len(events), size):
        batched.add(events[begin : begin + size])
    assert batched == whole
    assert batched.observers == whole.observers
    for question in ("steps", "total_steps", "run_left_s", "epochs_done", "newest_checkpoint", "best_checkpoint"):
        assert getattr(batched, question) == getattr(whole, question)
    assert (batched.pace.rate, batched.pace.loss) == (whole.pace.rate, whole.pace.loss)
