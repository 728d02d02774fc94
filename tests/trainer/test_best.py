"""The best checkpoints: which are taken and kept, what the result names, and resuming from the best one."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from support import training
from support.training import Outcome, Scored

from events.checkpoint.manifest import CheckpointName
from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointNotFound
from events.messages import CheckpointFailed, CheckpointRejected, RunResumed, WeightsSaved
from sinks.checkpoints.writer import CheckpointWriter
from trainer import Checkpoints
from trainer.callbacks import EMA
from trainer.loop.checkpointing import Checkpointing

EXAMPLES = 200 if os.environ.get("STAGECAST_FAULTS") == "full" else 25
VALUES = st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, math.inf])
OFF: dict[str, Any] = {"every_minutes": None, "weights": False}


def train(folder: Path, scores: list[float], act: Callable[[int], object] | None = None, **options: Any) -> Outcome:
    """Train one step per epoch; each validation logs the next ``score``."""
    options = {"epochs": len(scores), "run_id": "r", "run_dir": folder} | options
    return training.train(Scored(*scores, act=act), **options)


class Trouble:
    """Lets the checkpoints of some steps fail at the end or be skipped; training waits for each."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: set[int], skipped: set[int]) -> None:
        written = threading.Semaphore(0)
        take, wait = Checkpointing.take, Checkpointing._wait_for_slab
        save, commit = CheckpointWriter._save, CheckpointStore.commit

        def taken(self: Any, *args: Any, **more: Any) -> Any:
            before = self._last
            fence = take(self, *args, **more)
            if self._last is not before:
                assert written.acquire(timeout=20)
            return fence

        def saved(self: Any, *args: Any) -> None:
            save(self, *args)
            written.release()

        def committed(self: Any, manifest: Any) -> Path:
            if manifest.global_step in failing:
                raise OSError("no room")
            return commit(self, manifest)

        def waited(self: Any, pool: Any, wants: bool) -> Any:
            return None if self._attempt.origin.global_step in skipped else wait(self, pool, wants)

        patch.setattr(Checkpointing, "take", taken)
        patch.setattr(Checkpointing, "_wait_for_slab", waited)
        patch.setattr(CheckpointWriter, "_save", saved)
        patch.setattr(CheckpointStore, "commit", committed)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the scores, the attempts, the failures and the retention of a run."""
    scores = draw(st.lists(VALUES, min_size=3, max_size=7))
    steps = st.sets(st.integers(1, len(scores)), max_size=2)
    return {
        "scores": scores,
        "ends": [*sorted(draw(st.sets(st.integers(1, len(scores)), max_size=2))), len(scores)],
        "failing": draw(steps),
        "skipped": draw(steps),
        "keep_best": draw(st.sampled_from([2, 3, 5, 1, 0, 9])),
        "keep_last": draw(st.sampled_from([1, 2, None])),
        "best_mode": draw(st.sampled_from(["min", "max"])),
        "at_end": draw(st.booleans()),
        "uploads": draw(st.booleans()),
    }


def plan(scores: list[float], **more: Any) -> dict[str, Any]:
    """Return a plan without trouble."""
    quiet = {"failing": set(), "skipped": set(), "keep_last": 1, "best_mode": "min", "at_end": False, "uploads": False}
    return {"scores": scores, "ends": [len(scores)], **quiet, **more}


def expected(plan: dict[str, Any]) -> tuple[list[tuple[int, float]], set[int]]:
    """Compute with a plain list all durable checkpoints, and the steps of those that stay."""
    k, sign = plan["keep_best"], 1 if plan["best_mode"] == "max" else -1
    taken: list[tuple[int, float]] = []

    def best() -> list[tuple[float, int]]:
        return sorted(((sign * value, step) for step, value in taken if math.isfinite(value)), reverse=True)[:k]

    for end in plan["ends"]:
        begin = taken[-1][0] if taken else 0
        for step in range(begin + 1, end + 1):
            value = plan["scores"][step - 1]
            enters = math.isfinite(value) and k > 0 and (len(best()) < k or sign * value > best()[-1][0])
            wanted = enters or (plan["at_end"] and step == end)
            if wanted and step not in plan["failing"] | plan["skipped"]:
                taken.append((step, value))
    last = taken if plan["keep_last"] is None else taken[-plan["keep_last"] :]
    return taken, {step for step, _ in last} | {step for _, step in best()}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
@example(plan([0.4, 0.3, 0.2, 0.1], keep_best=4, best_mode="max"))  # fewer than k, and a bad one is the newest
@example(plan([0.1, 0.4, 0.3, 0.2], keep_best=2))  # a score that is not a record enters
@example(plan([0.2, 0.4, 0.2, 0.3, 0.1], keep_best=2, ends=[2, 5], uploads=True))
def test_a_checkpoint_is_taken_whenever_its_metric_enters_the_best_k_and_the_best_k_stay(plan: dict[str, Any]) -> None:
    """With ties, NaN, failures, skips, restarts and uploads; the result names the best checkpoint that stays."""
    folder = Path(tempfile.mkdtemp())
    names = ("keep_best", "keep_last", "best_mode", "at_end")
    upload = (folder / "there").as_uri() if plan["uploads"] else None
    checkpoints = Checkpoints(
        best="score", max_failures=99, upload=upload, **OFF, **{name: plan[name] for name in names}
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            Trouble(patch, plan["failing"], plan["skipped"])
            for end in plan["ends"]:
                outcome = train(folder / "run", plan["scores"][:end], checkpoints=checkpoints, resume="auto")
                result = outcome.result
        taken, stay = expected(plan)
        assert {name.step for name in CheckpointStore(folder / "run" / "checkpoints").names()} == stay
        if upload is not None:
            assert {name.step for name in RemoteStore(f"{upload}/r").names()} == stay
        sign = 1 if plan["best_mode"] == "max" else -1
        scores = [(sign * value, step) for step, value in taken if step in stay and math.isfinite(value)]
        if scores:
            value, step = max(scores)
            assert (result.best_metric, Path(result.best_checkpoint).name.partition(".")[0]) == (
                sign * value,
                f"step-{step}",
            )
        else:
            assert (result.best_metric, result.best_checkpoint) == (None, None)
    finally:
        shutil.rmtree(folder)


def test_a_score_behind_a_pending_checkpoint_counts_again_when_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint fails after the third was judged, so the first is still the best."""
    judged, written = threading.Event(), threading.Semaphore(0)
    commit, save = CheckpointStore.commit, CheckpointWriter._save

    def committed(self: Any, manifest: Any) -> Path:
        if manifest.global_step == 2:
            assert judged.wait(20)
            raise OSError("no room")
        return commit(self, manifest)

    def saved(self: Any, *args: Any) -> None:
        save(self, *args)
        written.release()

    monkeypatch.setattr(CheckpointStore, "commit", committed)
    monkeypatch.setattr(CheckpointWriter, "_save", saved)

    def act(step: int) -> None:
        if step == 4:
            judged.set()
        if step in (2, 4):
            assert written.acquire(timeout=20)

    checkpoints = Checkpoints(best="score", keep_best=1, at_end=False, **OFF)
    train(tmp_path, [0.5, 0.3, 0.4, 0.6], act, checkpoints=checkpoints)
    assert [str(name) for name in CheckpointStore(tmp_path / "checkpoints").names()] == ["step-1.a1"]


def test_a_second_checkpoint_of_one_step_takes_no_place_among_the_best(tmp_path: Path) -> None:
    """Both have the same weights: the best two are of two steps."""

    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder)
    checkpoints = Checkpoints(best="score", keep_best=2, keep_last=1, at_end=False, **OFF)
    with pytest.MonkeyPatch.context() as patch:
        Trouble(patch, set(), set())
        take = Checkpointing.take

        def twice(self: Any, reasons: list[str], *args: Any, **more: Any) -> Any:
            fence = take(self, reasons, *args, **more)
            return take(self, ["command"]) if self._attempt.origin.global_step == 1 else fence

        patch.setattr(Checkpointing, "take", twice)
        train(tmp_path, [1.0, 2.0, 3.0], checkpoints=checkpoints)
    assert [str(name) for name in store.names()] == ["step-1.a1.2", "step-2.a1"]


def test_resume_best_names_the_checkpoints_if_none_has_the_metric(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"resume='best'.* \(it has: none\); give the path"):
        _ = train(tmp_path / "empty", [1.0], checkpoints=True, resume="best").result
    train(tmp_path / "plain", [1.0], checkpoints=Checkpoints(**OFF))
    with pytest.raises(CheckpointNotFound, match=r"'best'.* with a metric \(it has: step-1\.a1\); give the path"):
        _ = train(tmp_path / "plain", [1.0], checkpoints=True, resume="best").result
    train(tmp_path / "other", [1.5], checkpoints=Checkpoints(best="score", **OFF))
    with pytest.raises(CheckpointNotFound, match=r"with the metric 'acc' \(it has: step-1\.a1 \(score 1\.5\)\)"):
        _ = train(tmp_path / "other", [1.0], checkpoints=Checkpoints(best="acc", **OFF), resume="best").result


@pytest.mark.parametrize("what", ["tensors.safetensors", "manifest.json"])
def test_resume_best_falls_back_to_the_next_best_with_a_warning(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(best="score", keep_last=None, keep_best=9, **OFF)
    train(tmp_path, [2.0, 1.0, 3.0], checkpoints=checkpoints)
    path = tmp_path / "checkpoints" / "step-2.a1" / what
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = train(tmp_path, [2.0, 1.0, 3.0], checkpoints=checkpoints, resume="best")
    assert [event.checkpoint for event in again.of(RunResumed)] == ["step-1.a1"]
    assert "step-2.a1" in [event.checkpoint for event in again.of(CheckpointRejected)]
    assert [
        text for text in caplog.messages if text.startswith("resume='best' skips a checkpoint") and str(path) in text
    ]


def test_best_in_place_of_a_checkpoint_is_explained(tmp_path: Path) -> None:
    train(tmp_path / "run", [1.0], checkpoints=Checkpoints(**OFF))
    for argument, path in (("resume", tmp_path / "run" / "checkpoints" / "best"), ("init_from", Path("latest"))):
        outcome = train(tmp_path / "new", [1.0], **{argument: path})
        assert isinstance(outcome.error, CheckpointNotFound)
        assert f"'{path.name}' is not a checkpoint name (expected e.g. step-500.a1)" in str(outcome.error)
        assert ("step-1.a1" in str(outcome.error)) == (argument == "resume")
        outcome = train(tmp_path / "new", [1.0], **{argument: "s3:/key:secret@bucket/step-1.a1"})
        assert isinstance(outcome.error, CheckpointNotFound)
        assert f"{argument}='s3:/...@bucket/step-1.a1'" in str(outcome.error)


BEST: dict[str, Any] = {"best": "score", "weights": "best", "every_minutes": None}


class Wrapped(Scored):
    """A module whose checkpoints hold its state dict under these keys, and more tensors."""

    def __init__(self, *scores: float, keys: tuple[str, ...] = ("model",)) -> None:
        super().__init__(*scores)
        self.keys = keys

    def get_state(self) -> dict[str, Any]:
        return {"average": torch.zeros(2), "seen": 3} | {key: self.state_dict() for key in self.keys}

    def update_state(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state[self.keys[0]])


def test_the_weights_of_the_best_checkpoint_are_written_at_the_end(tmp_path: Path) -> None:
    """They are those of a run that ends there, also for a resumed run, and a state with other names than the module."""
    expected = load_file(str(train(tmp_path / "ended", [2.0, 1.0], checkpoints=Checkpoints()).result.weights))
    scores = [2.0, 1.0, 3.0, 4.0]
    for module in (Scored(*scores), Wrapped(*scores)):
        run: dict[str, Any] = {"run_id": "r", "run_dir": tmp_path / type(module).__name__, "resume": "auto"}
        for epochs in (3, 4):
            outcome = training.train(module, epochs=epochs, checkpoints=Checkpoints(**BEST), **run)
            assert outcome.result.weights == str(run["run_dir"] / "weights.safetensors")
            assert [event.checkpoint for event in outcome.of(WeightsSaved)] == ["step-2.a1"]
            with safe_open(outcome.result.weights, "pt") as file:
                metadata = file.metadata()
            assert metadata == {
                "format": "pt",
                "checkpoint": "r/step-2.a1",
                "global_step": "2",
                "metric": "score=1.0",
            }
            found = load_file(outcome.result.weights)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_best_weights_fall_back_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To the next best checkpoint, or to the names in the checkpoint; without any metric none are written."""
    checkpoints = Checkpoints(keep_best=2, **BEST)
    train(tmp_path / "run", [1.0, 2.0], checkpoints=checkpoints)
    path = tmp_path / "run/checkpoints/step-1.a1/tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    outcome = train(tmp_path / "run", [1.0, 2.0, 3.0], checkpoints=checkpoints, resume="auto")
    assert [event.checkpoint for event in outcome.of(WeightsSaved)] == ["step-2.a1"]
    assert [text for text in caplog.messages if text.startswith(f"weights='best' skips a checkpoint: {path}")]
    run: dict[str, Any] = {"run_id": "r", "epochs": 1, "checkpoints": checkpoints}
    result = training.train(Wrapped(1.0, keys=("model", "again")), run_dir=tmp_path / "named", **run).result
    assert load_file(str(result.weights)).keys() == {"average", "model.linear.weight", "model.linear.bias"}
    assert [text for text in caplog.messages if "because get_state() is overridden" in text]
    outcome = train(tmp_path / "none", [math.nan], checkpoints=checkpoints)
    assert (outcome.result.status, outcome.result.weights) == ("finished", None)
    assert not (tmp_path / "none" / "weights.safetensors").exists()
    (event,) = outcome.of(CheckpointFailed)
    assert "has the metric 'score'; log it in a validation, or use weights='last'" in event.error


def test_the_best_weights_are_the_averaged_ones_that_were_validated(tmp_path: Path) -> None:
    module = Scored(2.0, 1.0, 3.0)
    ema = EMA(module, decay=0.5, validate=True)
    averages: list[dict[str, torch.Tensor]] = []
    module.act = lambda step: averages.append(ema.weights()) if step == 3 else None
    run: dict[str, Any] = {"epochs": 3, "run_id": "r", "run_dir": tmp_path, "checkpoints": Checkpoints(**BEST)}
    outcome = training.train(module, callbacks=[ema], **run)
    (event,) = outcome.of(WeightsSaved)
    assert event.checkpoint == "step-2.a1"
    found = load_file(event.path)
    assert found.keys() == averages[0].keys()
    assert all(torch.equal(found[name], averages[0][name]) for name in found)


@pytest.mark.parametrize(("options", "why"), [({}, "set best, such as"), ({"weights": True}, "use 'last' or 'best'")])
def test_weights_of_an_unknown_checkpoint_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Checkpoints(**{"weights": "best"} | options)


def test_a_result_over_the_network_names_the_best_one() -> None:
    """Deleted and superseded checkpoints do not count. It names the weights of its attempt, too."""
    from events.messages import CheckpointDeleted, CheckpointSaved, RunEnded, RunStarted
    from events.run.summary import CheckpointState, Summary
    from trainer.remote.result import ResultBuilder, RunSnapshot

    def header(attempt: int, step: int) -> dict[str, Any]:
        common = {"run_id": "r", "seq": 1, "time": 0.0, "rank": 0, "epoch": 0, "stage": None}
        return {"attempt": attempt, "global_step": step, **common}

    def saved(name: str, metric: float) -> CheckpointSaved:
        parsed = CheckpointName.parse(name)
        assert parsed is not None
        return CheckpointSaved(**header(parsed.attempt, parsed.step), checkpoint=name, path=f"/c/{name}", metric=metric)

    known = [
        CheckpointState("step-1.a1", state="durable", metric=5.0, path="/c/step-1.a1"),
        CheckpointState("step-2.a1", state="deleted", metric=0.1),
    ]
    story = [
        saved("step-3.a1", 2.0),
        saved("step-4.a1", 1.0),
        saved("step-5.a1", math.nan),
        RunStarted(**header(2, 3), module="m", epochs=1, best="score"),
        RunResumed(**header(2, 3), checkpoint="step-3.a1", after_seq=7),
        saved("step-4.a2", 2.0),
        saved("step-6.a2", 0.5),
        CheckpointDeleted(**header(2, 6), checkpoint="step-6.a2"),
        RunEnded(**header(2, 6), status="finished"),
        WeightsSaved(**header(2, 6), path="/c/weights.safetensors"),
    ]
    builder = ResultBuilder(RunSnapshot(0, Summary("r", 1), known))
    builder.add(story)
    assert builder.result is not None
    assert (builder.result.best_checkpoint, builder.result.best_metric) == ("/c/step-4.a2", 2.0)
    assert builder.result.weights == "/c/weights.safetensors"
    builder = ResultBuilder(RunSnapshot(0, Summary("r", 1, best="score"), known))
    builder.add([RunEnded(**header(1, 9), status="finished")])
    assert builder.result is not None
    assert (builder.result.best_checkpoint, builder.result.checkpoint) == ("/c/step-1.a1", "/c/step-1.a1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"best_mode": "max"}, "(best_mode='max') has no metric; set best"),
        ({"keep_best": 2}, "(keep_best=2) has no metric; set best"),
        ({"best": "score", "best_mode": "lowest"}, "(best_mode='lowest'): must be one of 'min', 'max'"),
        ({"weights": "newest"}, "(weights='newest'): must be one of 'last', 'best'"),
        ({"best": ["score"]}, "(best=['score']): Expected `str | null`"),
    ],
)
def test_settings_of_the_best_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Checkpoints{says}")):
        Checkpoints(**options)
