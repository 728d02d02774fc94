"""The view of a run, built from its events alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live.kit import Story, Told

from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointStaged,
    CheckpointUploaded,
    CheckpointUploading,
    CommandTaken,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    NonFiniteLoss,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    RankReported,
    RunEnded,
    StallLedger,
    TextLogged,
    TrainEpochEnded,
    UnknownEvent,
    ValEpochEnded,
    WarningLogged,
)
from events.run.state import MAX_CHECKPOINTS
from events.run.summary import UploadState
from events.table.entry import EntryReader
from sinks.live.frames import encode
from sinks.live.series import MOST_SERIES
from sinks.live.stored import STORE_NAME, read_view, write_view
from sinks.live.view import MAX_LINES, MAX_MEDIA, MAX_STEPS_OF_A_HISTOGRAM, Changes, RunView


def view_of(*events: Any, changes: Changes | None = None) -> RunView:
    view = RunView()
    view.add(list(events), changes)
    return view


def shown(view: RunView) -> dict[str, Any]:
    return decoded(view.snapshot())


def decoded(message: dict[str, object]) -> dict[str, Any]:
    """Return a message as a client receives it."""
    found: dict[str, Any] = msgspec.json.decode(encode(message))
    return found


def test_values_that_cannot_be_encoded_do_not_end_the_server(story: Story) -> None:
    """Lone surrogates in a name, objects among the arguments."""
    view = view_of(story.started(arguments={"a\ud800": object, "deep": {1: {2}}}), story.metrics(**{"x\ud800": 1.0}))
    series = shown(view)["series"]
    assert [one["mean"] for one in series.values()] == [[1.0]]


def test_numbers_that_are_not_finite_are_sent_by_name(story: Story) -> None:
    changes = Changes()
    view = view_of(story.started(), story.step(math.nan), story.step(-math.inf), changes=changes)
    assert changes.points["train_loss"] == ([1, 2], ["nan", "-inf"])
    assert shown(view)["run"]["latest"]["train_loss"] == "-inf"
    assert shown(view)["series"]["train_loss"]["mean"] == [None, None]


def test_events_of_a_later_version_move_only_the_cursor(story: Story) -> None:
    view = view_of(story.started(), story(UnknownEvent, unknown_type="Later", raw=b"{}"))
    assert view.cursor == 2


def test_everything_is_bounded(story: Story) -> None:
    """Of a run that logs and fails for ever."""
    view = view_of(story.started())
    for index in range(1_200):
        image = story(ImageLogged, name="i", path=f"media/{index}.png")
        histogram = story(HistogramLogged, name="h", counts=[1.0])
        failure = story(ObserverFailed, observer=f"o{index}", error="E", action="disabled")
        saved = story(CheckpointSaved, checkpoint=f"step-{index}.a1", path="p")
        view.add([image, histogram, failure, saved])
    assert len(view.log) == MAX_LINES
    assert len(view.media) == MAX_MEDIA
    kept = view.histograms["h"]
    assert (len(kept), sum(1 + row.skipped for row in kept)) == (MAX_STEPS_OF_A_HISTOGRAM, 1_200)
    assert len(view.checkpoints) == MAX_CHECKPOINTS
    assert view.checkpoints["step-1199.a1"].state == "durable"


def test_the_states_of_a_checkpoint(story: Story) -> None:
    """Staged, durable, uploading, uploaded, deleted here; or failed."""
    view, name = RunView(), "step-1.a1"

    def after(event: Any) -> Any:
        changes = Changes()
        view.add([event], changes)
        return changes.checkpoints[name]

    assert after(story(CheckpointStaged, checkpoint=name, reasons=["steps"], nbytes=10)).state == "staged"
    assert after(story(CheckpointSaved, checkpoint=name, path="p", nbytes=10)).state == "durable"
    going = story(CheckpointUploading, checkpoint=name, url="s3://b", done_bytes=5, total_bytes=10)
    assert after(going).upload == UploadState("uploading", 5, 10)
    assert after(story(CheckpointFailed, checkpoint=name, error="E", during="upload")).upload.state == "failed"
    assert view.checkpoints[name].state == "durable"
    assert after(story(CheckpointUploaded, checkpoint=name, url="s3://b", nbytes=10)).upload.state == "uploaded"
    here = after(story(CheckpointDeleted, checkpoint=name))
    assert (here.state, here.upload.state) == ("deleted", "uploaded")
    there = after(story(CheckpointDeleted, checkpoint=name, where="remote"))
    assert (there.state, there.upload.state) == ("deleted", "deleted")
    view.add([story(CheckpointFailed, checkpoint="step-2.a1", error="full", during="write")])
    assert (view.checkpoints["step-2.a1"].state, view.checkpoints["step-2.a1"].error) == ("failed", "full")


def test_the_states_of_an_observer(story: Story) -> None:
    view = view_of(story(ObserverFailed, observer="s", error="E", action="retrying"))
    assert view.observers["s"].state == "failing"
    view.add([story(ObserverRecovered, observer="s"), story(ObserverDropped, observer="s", dropped=3, conflated=2)])
    one = view.observers["s"]
    assert (one.state, one.failures, one.dropped, one.conflated) == ("ok", 1, 3, 2)
    view.add([story(ObserverFailed, observer="s", error="E2", action="fatal")])
    assert (view.observers["s"].state, view.observers["s"].error) == ("disabled", "E2")


def test_the_ranks_and_those_that_a_round_marks_are_in_the_frames(story: Story) -> None:
    def a_round(*before_s: float) -> list[Any]:
        named = {"ranks": len(before_s), "host": "h", "phase": "data", "steps": 1, "step_s": 1.0}
        rest = {"ledger": StallLedger(data_s=0.1), "memory_bytes": 5, "device_memory_bytes": None}
        return [
            story(RankReported, reported_rank=rank, before_exchange_s=seconds, **named, **rest)
            for rank, seconds in enumerate(before_s)
        ]

    view = view_of(*a_round(0.1, 0.8, 0.1))
    changes = Changes()
    view.add(a_round(0.1, 0.8, 0.1)[:1], changes)
    assert [one["rank"] for one in decoded(changes.members())["ranks"]] == [0]
    changes = Changes()
    view.add(a_round(0.1, 0.8, 0.1)[1:], changes)
    rows = decoded(changes.members())["ranks"]
    assert [(one["rank"], one["is_slow"]) for one in rows] == [(1, True), (0, False), (2, False)]
    assert rows[0]["data_s"] == 0.1
    assert [one["rank"] for one in shown(view)["ranks"]] == [0, 1, 2]
    assert changes.log[-1].text.startswith("warning: rank 1 on h holds up the others")


def test_a_pause_media_and_the_end_are_shown(story: Story) -> None:
    view, changes = RunView(), Changes()
    view.add([story.started(device="cuda:0", versions={"torch": "2"}), *story.steps(3)])
    view.add([story(CommandTaken, command="pause", command_id="1"), story(TextLogged, name="t", text="hi")], changes)
    assert changes.run["paused"] is True
    assert changes.media[0].text == "hi"
    assert view.versions == {"torch": "2"}
    view.add([story.ended("failed")])
    assert (view.run.status, view.run.paused, view.run.global_step) == ("failed", False, 3)
    assert [line.kind for line in view.log] == ["RunStarted", "CommandTaken", "RunEnded"]
    assert view.log[-1].level == "error"


def test_problems_are_in_the_snapshot_and_once_in_a_frame(story: Story) -> None:
    changes = Changes()
    view = view_of(
        story.started(), *story.steps(3), story(NonFiniteLoss, loss=math.nan, action="warned"), changes=changes
    )
    assert changes.run["problems"] == ["the loss was NaN or infinite in 1 step, first at step 3"]
    quiet = Changes()
    view.add(story.steps(3), quiet)
    assert "problems" not in quiet.run
    view.add([story.ended()])
    assert shown(view)["run"]["problems"] == view.health.problems == changes.run["problems"]


def test_later_events_do_not_move_the_end_of_a_run(story: Story) -> None:
    """Such as an upload; another attempt has not ended."""
    view = view_of(story.started(best="score", best_mode="max"), *story.steps(3), story.ended())
    ended = story.time
    view.add([story(CheckpointUploaded, checkpoint="step-3.a1", url="s3://b")])
    assert (view.run.ended, view.run.updated > ended) == (ended, True)
    assert (view.run.best, view.run.best_mode) == ("score", "max")
    view.add(story.resumed(3, story.seq))
    assert (view.run.status, view.run.ended) == ("running", None)


def test_the_traceback_of_a_failed_run_is_with_its_line_in_the_log(story: Story) -> None:
    view = view_of(
        story.started(), story(RunEnded, status="failed", reason="E: x", traceback="Trace <b>", phase="val_step")
    )
    details = {line.text: line.detail for line in view.log}
    assert [text for text, detail in details.items() if detail == "Trace <b>"] == [view.log[-1].text]
    assert view.run.problems == ["the run failed in val_step after step 0: E: x"]


def test_a_warning_has_its_line_and_its_traceback(story: Story) -> None:
    """A failed run's traceback has no further lines."""
    view = RunView()
    warning = story(WarningLogged, level="warning", message="the batch is small", exception="Trace of it")
    failed = story(RunEnded, status="failed", reason="E: x", traceback="File a.py\n  boom()\nE: x")
    view.add([story.started(), story(NonFiniteLoss, loss=math.nan, action="warned"), warning, failed])
    [line] = [line for line in view.log if line.kind == "WarningLogged"]
    assert (line.level, line.detail) == ("warning", "Trace of it")
    assert "the batch is small" in line.text
    assert [one.text for one in view.log if one.detail is not None] == [line.text, view.log[-1].text]
    assert not [line for line in view.log if "boom()" in line.text]


def test_the_log_has_the_results_of_a_validation_in_the_middle_of_an_epoch(story: Story) -> None:
    """Those at the epoch's end do not replace them."""
    view = RunView()
    middle = [story.started(), *story.steps(5), story(ValEpochEnded, loss=0.5), *story.steps(5)]
    view.add([*middle, story(ValEpochEnded, loss=0.25), story(TrainEpochEnded, loss=1.0, duration_s=2.0)])
    assert [line.text for line in view.log[1:]] == [
        "step 5  val_loss 0.5000",
        "epoch 1/3  train_loss 1.0000  val_loss 0.2500  2.0 s",
    ]


def test_frames_add_up_to_the_snapshot(story: Story) -> None:
    """However the events are divided into batches."""
    view = RunView()
    points: list[Any] = []
    run: dict[str, Any] = {}
    events = [story.started(), *story.steps(500), story.ended()]
    for begin in range(0, len(events), 7):
        changes = Changes()
        view.add(events[begin : begin + 7], changes)
        points += zip(*changes.points.get("train_loss", ([], [])), strict=True)
        run |= changes.run
    series = view.curves.series["train_loss"]
    assert points == list(zip(series.step, series.mean, strict=True))
    now = shown(view)["run"]
    assert {name: now[name] for name in run} == run


def test_metrics_of_a_validation_have_their_stage(story: Story) -> None:
    """In the snapshot, and once in a frame."""
    view, changes = RunView(), Changes()
    worst = story(MetricsLogged, stage="val", metrics={"worst": 1.0}, key="default")
    hard = story(MetricsLogged, stage="val", metrics={"worst": 2.0}, key="hard set")
    tested = story(MetricsLogged, stage="test", metrics={"best": 3.0}, key="default")
    view.add([story.started(), story.metrics(gauge=1.0), worst, hard, tested], changes)
    assert changes.members()["stages"] == {"worst": "val", "worst/hard set": "val", "best": "test"}
    assert shown(view)["stages"] == changes.stages
    again = Changes()
    view.add([story(MetricsLogged, stage="val", metrics={"worst": 0.5}, key="default")], again)
    assert "stages" not in again.members()


def test_stages_are_bounded_as_curves_are(story: Story) -> None:
    """With another name at each validation; values under the other names are counted, in frames too."""
    names = [f"m{index}" for index in range(MOST_SERIES + 50)]
    view = view_of(*(story(MetricsLogged, stage="val", metrics={name: 1.0}, key="default") for name in names))
    assert view.stages.keys() == view.curves.series.keys()
    assert shown(view)["left_out"] == 50
    for name, left_out in ((names[-1], 51), (names[0], None)):
        changes = Changes()
        view.add([story(MetricsLogged, stage="val", metrics={name: 1.0}, key="default")], changes)
        assert changes.members().get("left_out") == left_out


def test_superseded_steps_are_not_read(told: Told) -> None:
    """The view of a journal with three attempts has each step once."""
    tell = told.story
    told.start(30)
    told.write(*tell.resumed(20, tell.seq - 10), *tell.steps(30))
    told.write(*tell.resumed(40, tell.seq - 10), *tell.steps(5))
    view, stored = read_view(told.path)
    assert (view.curves.series["train_loss"].step, stored) == (list(range(1, 46)), 0)
    assert (view.run.attempt, view.cursor) == (3, tell.seq)


def test_a_stored_view_continues_with_the_events_after_it(told: Told) -> None:
    """It equals a view of the complete journal."""
    tell = told.story
    told.start(5_000)
    write_view(told.path, read_view(told.path)[0])
    told.write(*tell.steps(5_000), tell.ended())
    again, stored = read_view(told.path)
    (told.path / STORE_NAME).unlink()
    whole, _ = read_view(told.path)
    assert stored == 5_001
    assert again.curves == whole.curves
    assert again.run == whole.run
    assert [line.text for line in again.log][:-1] == [line.text for line in whole.log][:-1]


def test_a_stored_view_keeps_its_problems(told: Told) -> None:
    """Counts continue, although the journal is not read again."""
    tell = told.story
    started = tell.started()
    failed = tell(ObserverFailed, observer="csv", error="E", action="disabled")
    told.write(started, failed, tell(NonFiniteLoss, loss=math.nan, action="warned"), *tell.steps(3))
    write_view(told.path, read_view(told.path)[0])
    told.write(tell(NonFiniteLoss, loss=math.nan, action="warned"), tell.ended())
    view, stored = read_view(told.path)
    assert stored == 6
    assert view.run.problems == [
        "the loss was NaN or infinite in at least 2 steps, first at step 0",
        "csv failed and is disabled: E",
    ]
    assert (view.observers["csv"].state, view.observers["csv"].failures) == ("disabled", 1)


def test_a_stored_view_keeps_the_stages_of_metrics(told: Told) -> None:
    tell = told.story
    told.write(tell.started(), tell(MetricsLogged, stage="val", metrics={"worst": 1.0}, key="default"))
    write_view(told.path, read_view(told.path)[0])
    told.write(*tell.steps(3))
    view, stored = read_view(told.path)
    assert (view.stages, stored) == ({"worst": "val"}, 2)


def _another_run(told: Told) -> None:
    for file in (told.path / "journal").iterdir():
        file.unlink()
    tell = told.story
    tell.seq, tell.time, tell.global_step = 0, 1_800_000_000.0, 0
    told.start(300)


def _resumed(told: Told) -> None:
    told.write(*told.story.resumed(10, 11))


def _cut(told: Told) -> None:
    file = next((told.path / "journal").iterdir())
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:50]))


def _newer(told: Told) -> None:
    path = told.path / STORE_NAME
    stored = msgspec.msgpack.decode(path.read_bytes())
    path.write_bytes(msgspec.msgpack.encode(stored | {"version": 99, "view": "what is this"}))


def _older(told: Told) -> None:
    path = told.path / STORE_NAME
    stored = msgspec.msgpack.decode(path.read_bytes())
    del stored["view"]["stages"]
    path.write_bytes(msgspec.msgpack.encode(stored | {"version": 2}))


def _torn(told: Told) -> None:
    path = told.path / STORE_NAME
    path.write_bytes(path.read_bytes()[:-7])


def _enormous(told: Told) -> None:
    path = told.path / STORE_NAME
    stored = msgspec.msgpack.decode(path.read_bytes())
    row = {"step": 1, "low": 0.0, "high": 1.0, "counts": [1.0], "skipped": 2**63}
    stored["view"]["histograms"] = {"h": [row]}
    path.write_bytes(msgspec.msgpack.encode(stored))


def _nested(told: Told) -> None:
    (told.path / STORE_NAME).write_bytes(b"\x91" * 100_000)


@pytest.mark.parametrize("change", [_another_run, _resumed, _cut, _newer, _older, _torn, _enormous, _nested])
def test_a_stored_view_that_does_not_fit_is_not_used(told: Told, change: Any) -> None:
    """Of another run of the same name, with superseded steps, beyond the journal, of another version, torn, altered."""
    told.start(100)
    write_view(told.path, read_view(told.path)[0])
    change(told)
    view, stored = read_view(told.path)
    (told.path / STORE_NAME).unlink()
    assert stored == 0
    assert view.curves == read_view(told.path)[0].curves


def test_a_folder_that_cannot_be_written_to_is_not_changed(tmp_path: Path) -> None:
    write_view(tmp_path / "gone", RunView())
    (tmp_path / STORE_NAME).mkdir()
    write_view(tmp_path, RunView())
    assert [path.name for path in tmp_path.iterdir()] == [STORE_NAME]


def test_the_list_shows_problems_in_the_middle_of_a_long_journal(told: Told) -> None:
    """Later ones are added without reading the journal again."""
    tell = told.story
    told.write(tell.started(), *tell.steps(3_000), tell(NonFiniteLoss, loss=math.nan, action="warned"))
    told.write(*tell.steps(3_000))
    reader = EntryReader(told.path)
    assert reader.read().run.problems == ["the loss was NaN or infinite in 1 step, first at step 3,000"]
    told.write(tell(ObserverFailed, observer="csv", error="E", action="disabled"), tell.ended())
    run = reader.read().run
    assert (run.problems, run.ended) == (EntryReader(told.path).read().run.problems, tell.time)
    assert len(run.problems) == 2
