"""A run that was interrupted anywhere, and resumed, is bit for bit the uninterrupted run; so is its history."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from faults.injections import injected
from faults.resume_runs import (
    At,
    Case,
    assert_continues,
    attempt,
    differences,
    history_of,
    prepare,
    random_story,
    replace,
    run_story,
    straight,
    trace,
)
from support.threads import WAIT_S, stack_of, wait_until

from events.checkpoint.store import CheckpointStore
from events.messages import CommandTaken, RunResumed
from sinks import Memory
from trainer import CallbackInterface, Checkpoints, inline

# Dataloader workers are forked from a process with threads: they import nothing and take no locks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

STORIES: dict[str, tuple[Case, list[At], int]] = {
    # The features of the run, its interruptions, and the number of steps between checkpoints.
    "a stop in mid-epoch, with a scheduler per step": (Case(), [At(9)], 100),
    "a crash, after which steps are repeated, with a scaler and accumulation": (
        Case(precision="float16", accumulation=2, scheduler="plateau"),
        [At(10, batch=1, what="crash")],
        3,
    ),
    "a stop in the first step": (Case(augment=True, seed=None, scheduler="plateau-train", val_steps=9), [At(1)], 100),
    "a stop in the last step of an epoch": (Case(scheduler="epoch", precision="bfloat16"), [At(6)], 100),
    "a stop while the loop waits for data": (Case(data="kept", augment=True), [At(8, "data")], 100),
    "a stop in the second validation of two": (
        Case(val_steps=4, scheduler="plateau"),
        [At(4), At(8, "val", "b", 2)],
        100,
    ),
    "a crash after the end of an epoch, with a loader for all epochs": (
        Case(data="kept", scheduler="plateau-train"),
        [At(7, what="crash")],
        6,
    ),
    "a loader that knows its place, between two epochs": (
        Case(data="stateful"),
        [At(7, what="crash"), At(12, "val")],
        6,
    ),
    "augmentation in workers": (Case(workers=2, augment=True, resume_data="replay"), [At(4), At(9, what="crash")], 3),
    "a stop, then a crash before the next checkpoint, then another": (
        Case(data="stream", max_steps_per_epoch=4, optimizers="two"),
        [At(3), At(5, what="crash"), At(9, what="crash")],
        100,
    ),
    "a stop before the first step": (Case(optimizers="two"), [At(1, "set-up")], 100),
    "a stop in the last step of the run": (Case(clip=True), [At(18)], 100),
    "a stop in the first validation": (Case(), [At(6, "val", batch=1)], 100),
    "a crash in a validation": (Case(val_steps=4, data="iterable"), [At(12, "val", "b", 1, "crash")], 4),
    "a crash after a checkpoint that was requested in a validation": (
        Case(val_steps=4, clip=True),
        [At(8, "val", "a", 1, "save")],
        100,
    ),
    "a stop in the last step of an epoch that a limit ends, with a loader for all epochs": (
        Case(data="kept", max_steps_per_epoch=4),
        [At(4), At(8)],
        100,
    ),
    "a stop in the last step of an epoch, with a scheduler that follows what was logged before": (
        Case(scheduler="plateau-logged"),
        [At(6), At(12)],
        100,
    ),
    "a loader that knows its place": (Case(data="stateful", augment=True), [At(5), At(14)], 100),
    "a loader that knows its place, in a last step after which the loop requests more": (
        Case(data="stateful", accumulation=2, val_steps=6),
        [At(6), At(12, "val")],
        100,
    ),
    "float32 moments of bfloat16 weights, some frozen": (Case(optimizers="moments"), [At(4), At(8)], 100),
}


@injected("story", list(STORIES), 8)
def test_a_resumed_run_is_exact_after(tmp_path: Path, story: str) -> None:
    """Losses, weights, optimizers, callbacks, metrics and history are those of the uninterrupted run."""
    case, places, every_steps = STORIES[story]
    assert_continues(run_story(case, places, every_steps, tmp_path), tmp_path, straight(case))


@pytest.mark.timeout(180)
@injected("injection", range(300), 0)
def test_a_resumed_run_is_exact_whatever_it_uses_and_wherever_it_is_interrupted(tmp_path: Path, injection: int) -> None:
    """Random runs, with 0, 2 and 4 workers, stopped and crashed one to three times at random steps."""
    case, places, every_steps = random_story(injection)
    assert_continues(run_story(case, places, every_steps, tmp_path), tmp_path, straight(case))


def test_data_without_a_sampler_is_read_and_discarded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(data="iterable", augment=True)
    with caplog.at_level(logging.WARNING, "stagecast"):
        attempt(case, tmp_path, at=At(4))
        assert "read and discarded" not in caplog.text
        last = attempt(case, tmp_path, resume="auto")
    assert "data that cannot be skipped: 4 batches are read and discarded" in caplog.text
    assert_continues(last, tmp_path, straight(case))


def test_skipped_rows_are_not_read(tmp_path: Path) -> None:
    case = Case()
    attempt(case, tmp_path, at=At(10), checkpoints=Checkpoints(keep_last=9, at_end=False))
    reads: dict[str, int] = {}
    for how in ("skip", "replay"):
        one = prepare(case, tmp_path, resume="step-10.a1", resume_data=how)
        count = iter(range(10**6))
        one.net.rows.reached = lambda count=count: next(count)
        one.trainer.train()
        reads[how] = next(count)
    assert reads == {"skip": 10 + 42, "replay": 42 + 42}  # 32 rows of that epoch were used; one more epoch follows


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["stop", "checkpoint", "checkpoint while paused"])
async def test_a_run_resumes_exactly_from_a_requested_checkpoint(tmp_path: Path, how: str) -> None:
    """By `Run.stop`, `Run.checkpoint`, and `Run.checkpoint` of a paused run: taken between two steps."""
    case = Case(scheduler="plateau", val_steps=4)
    one = prepare(case, tmp_path, at=At(7, what="asked"))
    reached = {"asked": threading.Event(), "stopped": threading.Event()}
    go = {"asked": threading.Event(), "stopped": threading.Event()}

    def hold(what: str) -> None:
        one.net.at = At(9, what="stopped")
        reached[what].set()
        assert go[what].wait(WAIT_S)

    async def check() -> None:
        assert Path(await run.checkpoint()).name == "step-7.a1"

    one.net.act = hold
    async with one.trainer.run() as run:
        events = run.events(types=[CommandTaken])
        assert await anyio.to_thread.run_sync(reached["asked"].wait, WAIT_S)
        if how == "stop":
            run.stop("enough")
            go["asked"].set()
        elif how == "checkpoint":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(check)
                while not one.trainer.session.control.pending:
                    await anyio.lowlevel.checkpoint()
                go["asked"].set()
            assert await anyio.to_thread.run_sync(reached["stopped"].wait, WAIT_S)
        else:
            run.pause()
            go["asked"].set()
            while (await anext(events)).command != "pause":
                pass
            await check()
        if how != "stop":
            run.stop(checkpoint=False)
            go["stopped"].set()
        await events.aclose()
        result = await run.result()
    assert (result.status, result.global_step) == ("stopped", 9 if how == "checkpoint" else 7)
    last = attempt(case, tmp_path, resume="auto")
    assert last.net.losses[0][0] == 8
    assert_continues(last, tmp_path, straight(case))


def test_auto_follows_a_detour_to_an_older_checkpoint(tmp_path: Path) -> None:
    """The newest checkpoint is that of the newest attempt, or its source, not the one with the most steps."""
    case = Case()
    keep = Checkpoints(every_steps=2, keep_last=9, when_busy="wait")
    attempt(case, tmp_path, at=At(11), checkpoints=keep)
    store = CheckpointStore(tmp_path / "checkpoints")
    assert [str(name) for name in store.names()] == [f"step-{step}.a1" for step in (2, 4, 6, 8, 10, 11)]
    # An attempt that dies before its first checkpoint is followed to its source...
    attempt(case, tmp_path, at=At(5, what="crash"), resume="step-4.a1", checkpoints=keep)
    assert str(store.line()[0]) == "step-4.a1"
    # ...by the next attempt; the one after that resumes from a checkpoint of its own line.
    attempt(case, tmp_path, at=At(9, what="crash"), resume="auto", checkpoints=keep)
    assert [str(name) for name in store.line()] == ["step-8.a3", "step-6.a3", "step-4.a1", "step-2.a1"]
    sink = Memory()
    last = attempt(case, tmp_path, resume="auto", checkpoints=keep, sinks=[sink])
    assert [event.checkpoint for event in sink.of(RunResumed)] == ["step-8.a3"]
    assert_continues(last, tmp_path, straight(case))


def test_a_run_resumes_from_the_checkpoint_of_another(tmp_path: Path) -> None:
    """By its path, with a history that begins there; "auto" repeats that until the run has saved itself."""
    case = Case(scheduler="epoch")
    first = attempt(case, tmp_path / "one", at=At(8))
    attempt(case, tmp_path / "two", at=At(9, what="crash"), resume=first.checkpoint)
    sink = Memory()
    saves = Checkpoints(every_steps=5, when_busy="wait")
    attempt(case, tmp_path / "two", at=At(12, what="crash"), resume="auto", checkpoints=saves, sinks=[sink])
    last = attempt(case, tmp_path / "two", resume="auto", sinks=[sink])
    resumed = [(event.checkpoint, event.global_step, bool(event.after_seq)) for event in sink.of(RunResumed)]
    assert resumed == [("step-8.a1", 8, False), ("step-10.a2", 10, True)]
    expected = straight(case)
    found = trace(last, tmp_path / "two")
    logged = [event[0] == "MetricsLogged" and ("global_step", 9) in event for event in expected.history]
    begin = logged.index(True)
    assert differences(found.history, expected.history[begin:]) == []
    assert differences((found.weights, found.callbacks), (expected.weights, expected.callbacks)) == []
    assert not list((tmp_path / "one" / "checkpoints").glob("*.a2"))


def test_a_finished_run_resumes_with_more_epochs(tmp_path: Path) -> None:
    case = Case(optimizers="two", augment=True)
    attempt(replace(case, epochs=2), tmp_path)
    last = attempt(case, tmp_path, resume="auto")
    assert [step for step, _ in last.net.losses] == [13, 14, 15, 16, 17, 18]
    assert_continues(last, tmp_path, straight(case))


def test_a_finished_run_that_is_resumed_has_nothing_to_do(tmp_path: Path) -> None:
    case = Case()
    for _ in range(3):
        last = attempt(case, tmp_path, resume="auto")
    assert last.net.losses == []
    assert_continues(last, tmp_path, straight(case))


def test_new_optimizers_and_schedulers_start_with_the_weights_and_the_data_of_a_checkpoint(tmp_path: Path) -> None:
    """With reset_optimizers_schedulers=True: the next loss is the same, later ones differ."""
    case = Case(scheduler="step", optimizers="two")
    attempt(case, tmp_path, at=At(8))
    one = attempt(case, tmp_path, resume="auto", reset_optimizers_schedulers=True)
    expected = [loss for loss in straight(case).losses if loss[0] > 8]
    assert one.net.losses[0] == expected[0]
    assert one.net.losses[2:] != expected[2:]
    assert {int(state["step"]) for state in one.net.optimizers[1].state.values()} == {case.steps - 8}
    assert one.net.schedulers[0].last_epoch == case.steps - 8
    assert [event[2] for event in history_of(tmp_path)[0] if event[0] == "TrainStepEnded"] == [
        ("global_step", step) for step in range(1, case.steps + 1)
    ]


def test_hooks_of_one_callback_on_two_lanes_are_saved_at_one_step(tmp_path: Path) -> None:
    """A slow hook on its own thread, and an inline one: neither is ahead in a checkpoint."""
    loop = threading.get_ident()
    last = Case().steps

    class Torn(CallbackInterface):
        def __init__(self) -> None:
            self.inline: list[int] = []
            self.observed: list[int] = []

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            self.inline.append(global_step)

        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            # Until the loop waits for this callback, or has continued without it.
            wait_until(
                lambda: (
                    stack_of(loop) >= {"_wait_for", "wait_for_fence"}
                    or self.inline[-1] > global_step
                    or global_step == last
                )
            )
            self.observed.append(global_step)

        def state_dict(self) -> dict[str, Any]:
            return {"inline": self.inline[-1:], "observed": self.observed[-1:]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            states.append(state)

    states: list[dict[str, Any]] = []
    case = Case()
    keep = Checkpoints(every_epochs=1, keep_last=9, when_busy="wait")
    prepare(case, tmp_path, callbacks=[Torn()], checkpoints=keep).trainer.train()
    for step in (6, 12):
        torn = Torn()
        prepare(case, tmp_path, callbacks=[torn], resume=f"step-{step}.a1", checkpoints=False).trainer.train()
    assert states == [{"inline": [6], "observed": [6]}, {"inline": [12], "observed": [12]}]
