"""What is unhealthy about a run: one sentence per problem, and none for what has recovered or is usual."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest

from events.health import Health
from events.messages import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    CheckpointUploaded,
    Event,
    JournalGap,
    MonitorMissing,
    NonFiniteLoss,
    ObserverDropped,
    ObserverFailed,
    ObserverHealth,
    ObserverRecovered,
    ObserversReported,
    RunEnded,
    RunStarted,
    StepSkipped,
    TestEpochEnded,
    TrainStepEnded,
    ValEpochEnded,
    WarningLogged,
)


def at(step: int, kind: type[Event], *fields: Any, attempt: int = 1) -> Any:
    return kind("run", attempt, 0, 0.0, 0, step, 0, None, *fields)


def problems(*events: Event) -> list[str]:
    health = Health()
    for event in events:
        health.add(event)
    return health.problems


def reported(**state: Any) -> Any:
    return at(9, ObserversReported, [ObserverHealth("csv", **state)])


FAILED = at(0, ObserverFailed, "csv", "OSError: no such folder", "open", "disabled")
RETRYING = at(1, ObserverFailed, "csv", "OSError: busy", "write", "retrying")
WRITE_FAILED = at(5, CheckpointFailed, "step-5.a1", "OSError: full", "write", 2)
UPLOAD_FAILED = at(5, CheckpointFailed, "step-5.a1", "refused", "upload")
FINISHED = at(9, RunEnded, "finished")


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (
            [at(3, NonFiniteLoss, math.nan, "warned", 1)],
            "the loss was NaN or infinite in 1 step, first at step 3",
        ),
        (
            [at(step, NonFiniteLoss, math.nan, "warned", row) for step, row in [(3, 1), (4, 2), (6, 4), (9, 1)]],
            "the loss was NaN or infinite in at least 5 steps, first at step 3",
        ),
        (
            [at(5, ValEpochEnded, "b", 1, 1, 0.0, math.inf), at(6, ValEpochEnded, "b", 1, 1, 0.0, math.nan)],
            "the validation loss of b was NaN or infinite 2 times, first at step 5",
        ),
        (
            [at(5, TestEpochEnded, "default", 1, 1, 0.0, math.nan)],
            "the test loss was NaN or infinite once, first at step 5",
        ),
        (
            [at(2, StepSkipped, "non_finite_loss"), at(2, StepSkipped, "non_finite_loss")],
            "2 steps skipped (the loss was not finite), first after step 2",
        ),
        (
            [at(2, MonitorMissing, "acuracy", "Checkpoints(best=)", ["accuracy", "val_loss"])] * 2,
            "Checkpoints(best=) did not find the metric 'acuracy' 2 times, first at step 2 (there: accuracy, val_loss)",
        ),
        ([FAILED], "csv failed in open and is disabled: OSError: no such folder"),
        ([RETRYING], "csv failed in write and has not recovered: OSError: busy"),
        (
            [
                FAILED,
                at(1, ObserverFailed, "csv", "OSError: busy", "write", "disabled", 9),
                reported(dropped=7, queued=2),
                FINISHED,
            ],
            "csv failed 9 times in write and is disabled (9 events not delivered): OSError: busy",
        ),
        ([reported(state="disabled")], "csv is disabled"),
        (
            [at(1, ObserverDropped, "csv", 3, 9), at(2, ObserverDropped, "csv", 4)],
            "csv missed 7 events, which its queue had no room for",
        ),
        ([reported(dropped=7), reported(dropped=7)], "csv missed 7 events, which its queue had no room for"),
        ([FINISHED, reported(queued=2)], "csv did not get the last 2 events"),
        ([at(7, JournalGap, 1, 4, 4, "disk full")], "the journal lacks 4 events: disk full"),
        ([WRITE_FAILED], "checkpoint step-5.a1 could not be written, 2 in a row: OSError: full"),
        (
            [UPLOAD_FAILED, at(6, CheckpointSaved, "step-6.a1", "/x")],
            "checkpoint step-5.a1 could not be uploaded: refused",
        ),
        (
            [at(6, CheckpointFailed, "weights.safetensors", "full", "stage"), at(6, CheckpointSaved, "step-6.a1", "/")],
            "weights.safetensors could not be taken: full",
        ),
        (
            [at(0, CheckpointRejected, "step-5.a1", "torn")],
            "checkpoint step-5.a1 is not valid and was not resumed from: torn",
        ),
        ([at(1, WarningLogged, "error", "nothing is uploaded any more")], "nothing is uploaded any more"),
        (
            [at(4, RunEnded, "failed", "ValueError: boom", "Traceback...", "train_step")],
            "the run failed in train_step after step 4: ValueError: boom",
        ),
    ],
)
def test_each_problem_is_one_sentence_with_its_reason_and_its_count(events: list[Event], expected: str) -> None:
    """Whoever reads only the end of a run sees what went wrong in it, how often and since when."""
    assert problems(*events) == [expected]


@pytest.mark.parametrize(
    "events",
    [
        [at(0, RunStarted, "m", 1), at(1, TrainStepEnded, 0.5), FINISHED],
        [RETRYING, at(2, ObserverRecovered, "csv", 1, 0.1), FINISHED],
        [RETRYING, reported()],
        [WRITE_FAILED, at(6, CheckpointSaved, "step-6.a1", "/x")],
        [UPLOAD_FAILED, at(6, CheckpointUploaded, "step-6.a1", "s3://x")],
        [at(1, StepSkipped, "gradient_overflow")],
        [at(1, ObserverDropped, "console", 0, 90), at(1, ObserverDropped, "run.events", 4)],
        [at(1, WarningLogged, "warning", "the batch is small")],
        [reported(queued=5), FINISHED, reported()],
        [at(9, ValEpochEnded, "default", 1, 1, 0.0, 0.5), at(9, RunEnded, "stopped", "asked for")],
    ],
)
def test_what_has_recovered_or_is_usual_is_no_problem(events: list[Event]) -> None:
    """A list that cries wolf is not read."""
    assert problems(*events) == []


def test_a_new_attempt_begins_healthy_and_keeps_what_failed_before_it_had_started() -> None:
    """A sink may fail to open before the loop publishes that the attempt has started."""
    failed = at(0, ObserverFailed, "csv", "OSError", "open", attempt=2)
    late = at(5, NonFiniteLoss, math.nan, "warned")
    events = at(5, NonFiniteLoss, math.nan, "warned"), failed, at(0, RunStarted, "m", 1, attempt=2), late
    assert problems(*events) == ["csv failed in open and is disabled: OSError"]


def test_a_new_attempt_without_any_problem_is_healthy() -> None:
    """The failure of the attempt before is not its own."""
    failed = at(4, RunEnded, "failed", "ValueError: boom")
    assert problems(failed, at(4, RunStarted, "m", 1, attempt=2)) == []


def test_strangers_names_do_not_fill_the_memory() -> None:
    """An observer's name, a checkpoint's and a key are text from elsewhere."""
    health = Health()
    for number in range(2_000):
        health.add(at(1, ObserverFailed, f"o{number}", "E"))
        health.add(at(1, CheckpointFailed, f"weights-{number}", "E"))
        health.add(at(1, CheckpointRejected, f"step-{number}.a1", "E"))
        health.add(at(1, WarningLogged, "error", f"{number}"))
        health.add(at(1, ValEpochEnded, f"{number}", 1, 1, 0.0, math.nan))
    assert len(health.problems) < 200


def test_long_texts_of_strangers_do_not_fill_the_memory() -> None:
    """Each is kept as far as its sentence shows it."""
    health = Health()
    tracemalloc.start()
    try:
        for number in range(16):
            long = chr(97 + number) * 1_000_000
            health.add(at(1, ObserverFailed, f"o{number}", long))
            health.add(at(1, CheckpointFailed, f"weights-{long}", long))
            health.add(at(1, CheckpointRejected, f"step-{long}.a1", long))
            health.add(at(1, WarningLogged, "error", long))
            health.add(at(1, ValEpochEnded, long, 1, 1, 0.0, math.nan))
            health.add(at(1, MonitorMissing, long, long, [long]))
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
    finally:
        tracemalloc.stop()
    assert len(health.problems) == 96
