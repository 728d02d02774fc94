"""A run that was interrupted anywhere, and resumed, is bit for bit the run that never was; so is its history."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from events.checkpoint.store import CheckpointStore
from events.messages import CommandTaken, RunResumed
from events.run.run import Run
from sinks import Memory
from trainer import CallbackInterface, Checkpoints, inline

INJECTIONS = {"test_a_run_that_uses_anything_goes_on_exactly_wherever_it_was_interrupted": (0, 300)}
WAIT_S = 20.0

# Of a process with threads, which the workers of dataloaders are forked from: they import nothing and take no locks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

CHOSEN: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int]] = {
    # What the run uses, where it is interrupted, and every how many steps it takes a checkpoint.
    "a stop in mid-epoch, with a scheduler per step": ({}, [{"step": 9}], 100),
    "a crash, so that steps are redone, with a scaler and accumulation": (
        {"precision": "float16", "accumulation": 2, "scheduler": "plateau"},
        [{"step": 10, "batch": 1, "what": "crash"}],
        3,
    ),
    "a stop in the first step": (
        {"augment": True, "seed": None, "scheduler": "plateau-train", "val_steps": 9},
        [{"step": 1}],
        100,
    ),
    "a stop in the last step of an epoch": ({"scheduler": "epoch", "precision": "bfloat16"}, [{"step": 6}], 100),
    "a stop while data is waited for": ({"data": "kept", "augment": True}, [{"step": 8, "place": "data"}], 100),
    "a stop in the second validation of two": (
        {"val_steps": 4, "scheduler": "plateau"},
        [{"step": 4}, {"step": 8, "place": "val", "key": "b", "batch": 2}],
        100,
    ),
    "a crash after the end of an epoch, with a loader for all epochs": (
        {"data": "kept", "scheduler": "plateau-train"},
        [{"step": 7, "what": "crash"}],
        6,
    ),
    "a loader that knows its place, between two epochs": (
        {"data": "stateful"},
        [{"step": 7, "what": "crash"}, {"step": 12, "place": "val"}],
        6,
    ),
    "augmentation in workers": (
        {"workers": 2, "augment": True, "resume_data": "replay"},
        [{"step": 4}, {"step": 9, "what": "crash"}],
        3,
    ),
    "a stop, then a crash before the next checkpoint, then another": (
        {"data": "stream", "max_steps_per_epoch": 4, "optimizers": "two"},
        [{"step": 3}, {"step": 5, "what": "crash"}, {"step": 9, "what": "crash"}],
        100,
    ),
    "a stop before the first step": ({"optimizers": "two"}, [{"step": 1, "place": "set-up"}], 100),
    "a stop in the last step of all": ({"clip": True}, [{"step": 18}], 100),
    "a stop in the first validation": ({}, [{"step": 6, "place": "val", "batch": 1}], 100),
    "a crash in a validation": (
        {"val_steps": 4, "data": "iterable"},
        [{"step": 12, "place": "val", "key": "b", "batch": 1, "what": "crash"}],
        4,
    ),
    "a crash after a checkpoint that was asked for in a validation": (
        {"val_steps": 4, "clip": True},
        [{"step": 8, "place": "val", "key": "a", "batch": 1, "what": "save"}],
        100,
    ),
    "a stop in the last step of an epoch that a limit ends, with a loader for all epochs": (
        {"data": "kept", "max_steps_per_epoch": 4},
        [{"step": 4}, {"step": 8}],
        100,
    ),
    "a stop in the last step of an epoch, with a scheduler that follows what was logged before": (
        {"scheduler": "plateau-logged"},
        [{"step": 6}, {"step": 12}],
        100,
    ),
    "a loader that knows its place": ({"data": "stateful", "augment": True}, [{"step": 5}, {"step": 14}], 100),
    "a loader that knows its place, in a last step after which it was asked for more": (
        {"data": "stateful", "accumulation": 2, "val_steps": 6},
        [{"step": 6}, {"step": 12, "place": "val"}],
        100,
    ),
    "float32 moments of bfloat16 weights, some frozen": ({"optimizers": "moments"}, [{"step": 4}, {"step": 8}], 100),
}
# The first of them, where not all faults are injected.
STORIES = list(CHOSEN) if os.environ.get("STAGECAST_FAULTS") == "full" else list(CHOSEN)[:8]


@pytest.mark.parametrize("story", STORIES)
def test_a_run_goes_on_exactly_after(runs: Any, tmp_path: Path, story: str) -> None:
    """Losses, weights, optimizers, callbacks, metrics and history are those of a run that was never interrupted."""
    uses, places, every_steps = CHOSEN[story]
    case = runs.Case(**uses)
    last = runs.run_story(case, [runs.At(**place) for place in places], every_steps, tmp_path)
    runs.assert_continues(last, tmp_path, runs.straight(case))


@pytest.mark.timeout(180)
def test_a_run_that_uses_anything_goes_on_exactly_wherever_it_was_interrupted(
    runs: Any, tmp_path: Path, injection: int
) -> None:
    """Random runs, with 0, 2 and 4 workers, stopped and crashed one to three times at random steps."""
    case, places, every_steps = runs.random_story(injection)
    last = runs.run_story(case, places, every_steps, tmp_path)
    runs.assert_continues(last, tmp_path, runs.straight(case))


def test_data_that_cannot_be_skipped_is_read_and_discarded_with_a_warning(
    runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An IterableDataset has no sampler: it goes on at its place all the same, and the log says at what price."""
    case = runs.Case(data="iterable", augment=True)
    with caplog.at_level(logging.WARNING, "stagecast"):
        runs.attempt(case, tmp_path, at=runs.At(4))
        assert "read and discarded" not in caplog.text
        last = runs.attempt(case, tmp_path, resume="auto")
    assert "data that cannot be skipped: 4 batches are read and discarded" in caplog.text
    runs.assert_continues(last, tmp_path, runs.straight(case))


def test_skipped_data_is_not_read(runs: Any, tmp_path: Path) -> None:
    """With the given sampler a resumed run reads no row twice; with resume_data="replay" it does."""
    case = runs.Case()
    runs.attempt(case, tmp_path, at=runs.At(10), checkpoints=Checkpoints(keep_last=9, at_end=False))
    reads: dict[str, int] = {}
    for how in ("skip", "replay"):
        one = runs.prepare(case, tmp_path, resume="step-10.a1", resume_data=how)
        count = iter(range(10**6))
        one.net.rows.reached = lambda count=count: next(count)
        one.trainer.train()
        reads[how] = next(count)
    assert reads == {"skip": 10 + 42, "replay": 42 + 42}  # 32 rows were used of that epoch; one more epoch follows


# --------------------------------------------------------------------------------------------------- other ways


async def check(run: Run) -> None:
    """Ask for a checkpoint, and see that it is the one that was asked for."""
    assert Path(await run.checkpoint()).name == "step-7.a1"


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["stop", "checkpoint", "checkpoint while paused"])
async def test_a_run_goes_on_exactly_from_what_a_door_asked_for(runs: Any, tmp_path: Path, how: str) -> None:
    """`Run.stop`, `Run.checkpoint` and `Run.checkpoint` of a paused run: taken between two steps, and whole."""
    case = runs.Case(scheduler="plateau", val_steps=4)
    one = runs.prepare(case, tmp_path, at=runs.At(7, what="asked"))
    reached = {"asked": threading.Event(), "stopped": threading.Event()}
    go = {"asked": threading.Event(), "stopped": threading.Event()}

    def hold(what: str) -> None:
        one.net.at = runs.At(9, what="stopped")
        reached[what].set()
        assert go[what].wait(WAIT_S)

    async def paused() -> None:
        async for event in events:
            if event.command == "pause":
                return

    one.net.act = hold
    async with one.trainer.run() as run:
        events = run.events(types=[CommandTaken])
        assert await anyio.to_thread.run_sync(reached["asked"].wait, WAIT_S)
        if how == "stop":
            run.stop("enough")
            go["asked"].set()
        elif how == "checkpoint":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(check, run)
                while not one.trainer.session.control.pending:
                    await anyio.lowlevel.checkpoint()
                go["asked"].set()
            assert await anyio.to_thread.run_sync(reached["stopped"].wait, WAIT_S)
        else:
            run.pause()
            go["asked"].set()
            await paused()
            await check(run)
        if how != "stop":
            run.stop(checkpoint=False)
            go["stopped"].set()
        await events.aclose()
        result = await run.result()
    assert (result.status, result.global_step) == ("stopped", 9 if how == "checkpoint" else 7)
    last = runs.attempt(case, tmp_path, resume="auto")
    assert last.net.losses[0][0] == 8
    runs.assert_continues(last, tmp_path, runs.straight(case))


def test_auto_follows_who_went_back_to_an_older_checkpoint(runs: Any, tmp_path: Path) -> None:
    """The newest is that of the newest attempt, or what it started from: not the one with the most steps."""
    case = runs.Case()
    keep = Checkpoints(every_steps=2, keep_last=9, when_busy="wait")
    runs.attempt(case, tmp_path, at=runs.At(11), checkpoints=keep)
    store = CheckpointStore(tmp_path / "checkpoints")
    assert [str(name) for name in store.names()] == [f"step-{step}.a1" for step in (2, 4, 6, 8, 10, 11)]
    # It dies before it has a checkpoint of its own...
    runs.attempt(case, tmp_path, at=runs.At(5, what="crash"), resume="step-4.a1", checkpoints=keep)
    assert str(store.line()[0]) == "step-4.a1"
    # ...so it is from there that the next one goes on, and the one after that from what that has saved.
    runs.attempt(case, tmp_path, at=runs.At(9, what="crash"), resume="auto", checkpoints=keep)
    assert [str(name) for name in store.line()] == ["step-8.a3", "step-6.a3", "step-4.a1", "step-2.a1"]
    sink = Memory()
    last = runs.attempt(case, tmp_path, resume="auto", checkpoints=keep, sinks=[sink])
    assert [event.checkpoint for event in sink.of(RunResumed)] == ["step-8.a3"]
    runs.assert_continues(last, tmp_path, runs.straight(case))


def test_a_run_goes_on_from_the_checkpoint_of_another(runs: Any, tmp_path: Path) -> None:
    """By its path, in a folder of its own: with the other's state, and a history that begins there.

    Should it die before it has saved anything, "auto" begins there again; after that, with its own.
    """
    case = runs.Case(scheduler="epoch")
    first = runs.attempt(case, tmp_path / "one", at=runs.At(8))
    runs.attempt(case, tmp_path / "two", at=runs.At(9, what="crash"), resume=first.checkpoint)
    sink = Memory()
    saves = Checkpoints(every_steps=5, when_busy="wait")
    runs.attempt(case, tmp_path / "two", at=runs.At(12, what="crash"), resume="auto", checkpoints=saves, sinks=[sink])
    last = runs.attempt(case, tmp_path / "two", resume="auto", sinks=[sink])
    resumed = [(event.checkpoint, event.global_step, bool(event.after_seq)) for event in sink.of(RunResumed)]
    assert resumed == [("step-8.a1", 8, False), ("step-10.a2", 10, True)]
    expected = runs.straight(case)
    found = runs.trace(last, tmp_path / "two")
    begin = next(
        at
        for at, event in enumerate(expected.history)
        if event[0] == "MetricsLogged" and dict(event[1:])["global_step"] == 9
    )
    assert runs.differences(found.history, expected.history[begin:]) == []
    assert runs.differences((found.weights, found.callbacks), (expected.weights, expected.callbacks)) == []
    assert not list((tmp_path / "one" / "checkpoints").glob("*.a2"))


def test_a_finished_run_goes_on_with_more_epochs(runs: Any, tmp_path: Path) -> None:
    """Two epochs, and then a third: as if there had been three from the beginning."""
    case = runs.Case(optimizers="two", augment=True)
    runs.attempt(runs.replace(case, epochs=2), tmp_path)
    last = runs.attempt(case, tmp_path, resume="auto")
    assert [step for step, _ in last.net.losses] == [13, 14, 15, 16, 17, 18]
    runs.assert_continues(last, tmp_path, runs.straight(case))


def test_a_finished_run_that_is_resumed_has_nothing_to_do(runs: Any, tmp_path: Path) -> None:
    """No step is taken again, and the history stays as it was."""
    case = runs.Case()
    for _ in range(3):
        last = runs.attempt(case, tmp_path, resume="auto")
    assert last.net.losses == []
    runs.assert_continues(last, tmp_path, runs.straight(case))


def test_new_optimizers_and_schedulers_begin_anew_with_the_weights_and_the_data_of_a_checkpoint(
    runs: Any, tmp_path: Path
) -> None:
    """With reset_optimizers_schedulers=True: the next loss is the same, then the new optimizer goes its own way."""
    case = runs.Case(scheduler="step", optimizers="two")
    runs.attempt(case, tmp_path, at=runs.At(8))
    one = runs.attempt(case, tmp_path, resume="auto", reset_optimizers_schedulers=True)
    expected = [loss for loss in runs.straight(case).losses if loss[0] > 8]
    assert one.net.losses[0] == expected[0]
    assert one.net.losses[2:] != expected[2:]
    assert {int(state["step"]) for state in one.net.optimizers[1].state.values()} == {case.steps - 8}
    assert one.net.schedulers[0].last_epoch == case.steps - 8
    assert [event[2] for event in runs.history_of(tmp_path)[0] if event[0] == "TrainStepEnded"] == [
        ("global_step", step) for step in range(1, case.steps + 1)
    ]


# ---------------------------------------------------------------------------------------------------- callbacks


def test_hooks_of_one_callback_on_two_lanes_are_saved_at_one_place(runs: Any, tmp_path: Path) -> None:
    """A slow hook on its own thread, an inline one on the loop's: neither is ahead of the other in a checkpoint."""
    loop = threading.current_thread()
    last = runs.Case().steps

    class Torn(CallbackInterface):
        def __init__(self) -> None:
            self.inline: list[int] = []
            self.observed: list[int] = []

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            self.inline.append(global_step)

        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            # Until the loop waits for this callback, or has gone on without it.
            until(
                lambda: (
                    is_in(loop, "_wait_for", "wait_for_fence") or self.inline[-1] > global_step or global_step == last
                )
            )
            self.observed.append(global_step)

        def state_dict(self) -> dict[str, Any]:
            return {"inline": self.inline[-1:], "observed": self.observed[-1:]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            states.append(state)

    states: list[dict[str, Any]] = []
    case = runs.Case()
    keep = Checkpoints(every_epochs=1, keep_last=9, when_busy="wait")
    runs.prepare(case, tmp_path, callbacks=[Torn()], checkpoints=keep).trainer.train()
    for step in (6, 12):
        torn = Torn()
        runs.prepare(case, tmp_path, callbacks=[torn], resume=f"step-{step}.a1", checkpoints=False).trainer.train()
    assert states == [{"inline": [6], "observed": [6]}, {"inline": [12], "observed": [12]}]


def until(there: Any) -> None:
    """Wait for what another thread does, without a word from it."""
    for _ in range(int(WAIT_S * 1_000)):
        if there():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not happen")


def is_in(thread: threading.Thread, *places: str) -> bool:
    """Whether a thread is in functions of these names, all of them."""
    frame = sys._current_frames().get(thread.ident or 0)
    names: set[str] = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names.issuperset(places)
