"""Tables of runs: entries, columns, conditions, and the plain frames that notebooks read."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live.kit import Told

import events
from events.errors import ArgumentsError, RunFolderError
from events.messages import (
    CheckpointFailed,
    LedgerReported,
    MetricsLogged,
    NonFiniteLoss,
    ObserverFailed,
    StallLedger,
    ValEpochEnded,
)
from events.table.columns import Columns, ordered
from events.table.conditions import MAX_DEPTH, condition, select
from events.table.entry import EntryReader, MetricSummary, RunEntry, flattened
from events.table.notes import NOTES_NAME, Notes
from events.table.table import STORE_NAME, RunTable


def finish(told: Told, *losses: float, **fields: Any) -> None:
    """Tell a run of one step per epoch, with a validation after each, that has ended."""
    told.write(told.story.started(**fields))
    for epoch, loss in enumerate(losses):
        told.story.epoch = epoch
        told.write(told.story.step(2 * loss), told.story(ValEpochEnded, loss=loss))
    told.write(told.story.ended())
    told.let_go()


def test_an_entry_has_what_a_run_was_asked_and_came_to(tmp_path: Path) -> None:
    """Also of one that resumed: steps that were repeated do not count."""
    told = Told(tmp_path, "demo")
    tell = told.story
    told.write(tell.started(config={"lr": 0.1, "net": {"width": 8, "sizes": [1, 2]}}, git_commit="abc", max_steps=9))
    told.write(tell.step(4.0), tell(MetricsLogged, metrics={"accuracy": 0.9}), *tell.steps(3))
    reader = EntryReader(tmp_path)
    assert reader.read().metrics["accuracy"].best == 0.9
    after = tell.seq - 4  # behind the first step
    told.write(*tell.resumed(1, after))
    told.write(tell.step(3.0), tell(MetricsLogged, metrics={"accuracy": 0.7}), tell(ValEpochEnded, loss=2.5))
    told.write(tell.step(math.nan), tell(MetricsLogged, metrics={"accuracy": 0.5}), tell.step(math.nan))
    for entry in (reader.read(), EntryReader(tmp_path).read()):
        accuracy, loss = entry.metrics["accuracy"], entry.metrics["train_loss"]
        assert (accuracy.last, accuracy.best, accuracy.best_step, accuracy.low) == (0.5, 0.7, 2, 0.5)
        assert (loss.best, loss.best_step, loss.high, loss.bad_since) == (3.0, 2, 4.0, 3)
        assert math.isnan(loss.last)
        assert entry.health == ["train_loss NaN since step 3"]
        assert (entry.run.status, entry.run.global_step, entry.run.attempt) == ("running", 4, 2)
    assert EntryReader(tmp_path).read().config == {}  # of the newest attempt
    told.let_go()


def test_health_names_in_a_few_words_what_is_wrong(tmp_path: Path) -> None:
    told = Told(tmp_path, "demo")
    tell = told.story
    told.write(tell.started(), tell(ValEpochEnded, loss=1.0, key="web"))
    for epoch in range(1, 4):
        tell.epoch = epoch
        told.write(tell(ValEpochEnded, loss=1.0 + epoch, key="web"))
    told.write(
        tell(NonFiniteLoss, loss=math.nan, action="warned"),
        tell(ObserverFailed, observer="csv", error="disk full", action="retrying"),
        tell(CheckpointFailed, checkpoint="step-1.a1", error="disk full"),
        tell(LedgerReported, scope="interval", ledger=StallLedger(wall_s=10.0, device_idle_s=4.0)),
    )
    entry = EntryReader(tmp_path).read()
    assert entry.health == [
        "csv failing",
        "checkpoint failing",
        "val_loss/web not improved for 3 epochs",
        "device idle 40%",
    ]
    assert len(entry.run.problems) == 3
    told.let_go()


def test_runs_are_found_at_any_depth_and_told_apart(tmp_path: Path) -> None:
    """Hidden folders and those of a run are not searched; two runs of one id name each other."""
    for place in ("one", "sweep/a/one", "sweep/b/two", ".hidden/three", "one/checkpoints/four"):
        finish(Told(tmp_path / place, place.rpartition("/")[2]), 1.0)
    table = RunTable(tmp_path)
    found = {entry.name: (entry.folder, entry.run.problems) for entry in table.look()}
    assert found == {
        "one": ("one", ["the folder 'sweep/a/one' has a run of the same run_id"]),
        "one (sweep:a)": ("sweep/a/one", ["the folder 'one' has a run of the same run_id"]),
        "two": ("sweep/b/two", []),
    }
    assert table.found["one (sweep:a)"] == (tmp_path / "sweep/a/one", "one")
    assert [entry.folder for entry in RunTable(tmp_path / "one").look()] == ["."]


def test_a_long_journal_of_a_run_that_is_over_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it changes, by any process: its entry is stored beside it."""
    told = Told(tmp_path / "long", "long")
    told.start(600)
    finish(told, 0.5)
    first = RunTable(tmp_path).look()
    assert (tmp_path / "long" / STORE_NAME).exists()
    with monkeypatch.context() as patch:
        patch.setattr(EntryReader, "read", lambda *given: pytest.fail("it was read again"))
        assert RunTable(tmp_path).look() == first
    (tmp_path / "long" / STORE_NAME).write_bytes(b"\x80")
    assert RunTable(tmp_path).look() == first
    told.write(told.story(MetricsLogged, metrics={"late": 1.0}))
    assert RunTable(tmp_path).look()[0].metrics["late"].last == 1.0


def test_a_long_journal_is_read_in_parts(tmp_path: Path) -> None:
    """Until then the entry has the end's state, and says nothing of how long is left."""
    told = Told(tmp_path, "long", steps=5_000)
    reader = EntryReader(tmp_path)
    entry = reader.read(time.monotonic())
    assert (reader.is_behind, entry.run.global_step, entry.run.status, entry.left_s) == (True, 5_000, "running", None)
    entry = reader.read()
    assert (reader.is_behind, entry.run.global_step, entry.metrics["train_loss"].high) == (False, 5_000, 5_000.0)
    told.let_go()


def an_entry(name: str, config: dict[str, Any], **metrics: float) -> RunEntry:
    entry = RunEntry(name=name, config=config)
    for metric, value in metrics.items():
        entry.metrics[metric] = MetricSummary()
        entry.metrics[metric].add(value, 1, 0)
    return entry


@pytest.fixture
def some() -> list[RunEntry]:
    found = [
        an_entry("sweep-1", {"lr": 0.1, "opt.name": "adam"}, lr=0.0, val_loss=0.3),
        an_entry("sweep-2", {"lr": 0.01, "opt.name": "sgd"}, lr=0.0, val_loss=0.6),
        an_entry("other", {"batch size": 8, "opt.name": "adam"}, val_loss=math.nan),
    ]
    found[0].run.status, found[1].run.status = "failed", "finished"
    found[0].run.started = 1_700_000_000.0
    found[1].notes = Notes(name="the best", tags=("baseline", "keep"), note="warm-up of 100 steps")
    return found


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("lr > 0.05", "sweep-1"),
        ("lr > 0.001 and val_loss < 0.5", "sweep-1"),
        ("lr>0.05 or val_loss>=0.6", "sweep-1 sweep-2"),
        ("not lr > 0.05", "sweep-2 other"),
        ("not (lr > 0.05 or lr == none) and lr <= 1e-2", "sweep-2"),
        ("lr > 0.05 or lr < 0.05 and val_loss > 1", "sweep-1"),
        ("0.05 < config.lr", "sweep-1"),
        ("last.lr == 0", "sweep-1 sweep-2"),
        ("val_loss == nan", "other"),
        ("val_loss != 0.3", "sweep-2 other"),
        ("status = failed", "sweep-1"),
        ("status != 'failed' and opt.name == \"adam\"", "other"),
        ("opt.name ~ ^ad", "sweep-1 other"),
        ("name !~ 'sweep.[12]'", "sweep-2 other"),
        ("tags == baseline", "sweep-2"),
        ("tags == none", "sweep-1 other"),
        ("note ~ 'warm.?up'", "sweep-2"),
        ("`batch size` == 8", "other"),
        ("started > 2023-11-01", "sweep-1"),
        ("best.val_loss < lr", ""),
        ("lr > opt.name", ""),
        ("sweep", "sweep-1 sweep-2"),
        ("^(?!sweep-1)", "sweep-2 other"),
        ("the best", "sweep-2"),
        ("", "sweep-1 sweep-2 other"),
    ],
)
def test_a_condition_selects_runs(some: list[RunEntry], text: str, names: str) -> None:
    """A run without a value fulfils only ``!=`` and ``!~``; without a comparison the text is searched in the name."""
    assert [entry.name for entry in select(some, [text], Columns(some))] == names.split()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("val_los < 1", "'val_los' is not a column of these runs; did you mean val_loss?"),
        ("lr < small", "'small' is not a column of these runs; --columns=help lists them"),
        ("lr >", "the condition ends where a value is expected; write it as in lr > 0.01"),
        ("lr > > 3", "the condition has > where a value is expected; write it as in lr > 0.01"),
        ("(lr > 1", "a parenthesis of the condition is not closed; add )"),
        ("lr > 1 val_loss < 2", "'val_loss' is unexpected in the condition; join conditions with and, or"),
        ("name == 'open", '"\'open" cannot be read in the condition; put texts in quotes'),
        ("name ~ '('", "'(' is not a regular expression: missing ), unterminated subpattern at position 0"),
        ("sweep(", "'sweep(' is not a regular expression: missing ), unterminated subpattern at position 5"),
        ("not " * MAX_DEPTH + "lr > 1", f"the condition is nested more than {MAX_DEPTH} levels deep; simplify it"),
        ("lr > " + "1" * 2_000, "the condition has 2,005 characters, more than 2,000; shorten it"),
        ("__import__('os').getpid() == 1", "'__import__' is not a column of these runs; --columns=help lists them"),
    ],
)
def test_a_wrong_condition_is_explained(some: list[RunEntry], text: str, says: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        select(some, [text], Columns(some))
    assert str(caught.value) == says


def test_any_condition_is_accepted_while_there_are_no_runs() -> None:
    assert condition("lr > 3 and anything == 1", Columns([]))(RunEntry()) is False


def test_runs_are_sorted_by_several_columns(some: list[RunEntry]) -> None:
    """Runs without a value, or with NaN, are last, in either direction."""
    columns = Columns(some)
    for names, expected in {
        "val_loss": "sweep-1 sweep-2 other",
        "-val_loss": "sweep-2 sweep-1 other",
        "opt.name -name": "sweep-1 other sweep-2",
    }.items():
        assert [entry.name for entry in ordered(some, names.split(), columns)] == expected.split()
    assert columns.differing(some) == ["lr", "opt.name", "batch size"]


def test_frames_and_rows_are_plain_columns(tmp_path: Path) -> None:
    """Those of a resumed run have each step once."""
    told = Told(tmp_path / "demo", "demo")
    tell = told.story
    told.write(tell.started(config={"lr": 0.1}), tell.step(1.0), tell.step(9.0))
    told.write(*tell.resumed(1, tell.seq - 1), tell.step(2.0), tell(ValEpochEnded, loss=1.5), tell.ended("failed"))
    told.let_go()
    frame = events.frame(tmp_path / "demo", ["train_loss", "val_loss", "gone"])
    assert (frame["step"], frame["train_loss"], frame["epoch"]) == ([1, 2], [1.0, 2.0], [0, 0])
    assert [math.isnan(value) for value in frame["val_loss"] + frame["gone"]] == [True, False, True, True]
    assert {len(column) for column in events.frame(tmp_path / "demo").values()} == {2}
    (row,) = events.runs(tmp_path, where="status == failed", sort="-val_loss")
    assert {"status": "failed", "last.val_loss": 1.5, "best.train_loss": 1.0, "folder": "demo"}.items() <= row.items()
    assert events.runs(tmp_path, where=["demo", "step > 7"]) == []
    with pytest.raises(RunFolderError, match="has no journal in journal/; name the folder of a run"):
        events.frame(tmp_path)
    with pytest.raises(RunFolderError, match="is not a folder; name a run folder"):
        events.runs(tmp_path / "gone")


def test_settings_become_flat_and_bounded() -> None:
    many: dict[str, Any] = {"deep": {}}
    for number in range(3_000):
        many = {"a": many, str(number): 2**70}
    assert max(map(len, flattened(many))) == 300
    assert len(flattened(dict.fromkeys(map(str, range(3_000))))) == 2_000
    assert flattened({"a": {"b": {"c": 1}, "d": {}}, "e": [1, "x"], "f": None}) == {
        "a.b.c": 1,
        "a.d": "{}",
        "e": '[1,"x"]',
        "f": None,
    }


def test_notes_are_kept_in_the_folder_of_the_run(tmp_path: Path) -> None:
    """People edit the file, so one that is not valid is shown."""
    finish(Told(tmp_path / "demo", "demo"), 1.0)
    notes = Notes("first", ("a", "b"), "a note", "#ff0000")
    (tmp_path / "demo" / NOTES_NAME).write_bytes(msgspec.json.encode(notes))
    (entry,) = RunTable(tmp_path).look()
    assert (entry.notes, entry.name) == (notes, "demo")
    (row,) = events.runs(tmp_path, where="tags == b")
    assert (row["name"], row["id"], row["tags"]) == ("first", "demo", ["a", "b"])
    for wrong in ('{"colour": "red"}', "[", '{"tags": "a"}', '{"other": 1}'):
        (tmp_path / "demo" / NOTES_NAME).write_text(wrong)
        (entry,) = RunTable(tmp_path).look()
        assert (entry.notes, entry.health) == (Notes(), ["notes.json is not valid"])
