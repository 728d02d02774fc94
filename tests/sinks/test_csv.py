"""The table of numbers: exact after disks that fill up, processes that die and runs that go on."""

from __future__ import annotations

import csv
import errno
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events.errors import SinkMisconfigured
from events.messages import Event, MetricsLogged, RunStarted, TextLogged, TrainStepEnded, UnknownEvent, ValEpochEnded
from events.metrics import METRIC_TYPES, metrics_of
from events.sink import RunInfo, delivery_of
from sinks import CSV, Memory
from sinks.files.csv import COLUMNS
from trainer import Trainer, TrainerArguments

NAMES = ["a/b c", 'say "x"', "one,two", "two\nlines", "carriage\rreturn", "größe 📈", "n" * 3_000, "", " "]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows(events: list[Event]) -> list[tuple[Any, ...]]:
    """What the table must say of these events."""
    return [
        (e.run_id, e.attempt, e.seq, e.time, e.global_step, e.epoch, e.stage or "", name, repr(float(value)))
        for e in events
        for name, value in metrics_of(e)
    ]


def told(path: Path) -> list[tuple[Any, ...]]:
    """What it says."""
    return [
        (
            row["run_id"],
            int(row["attempt"]),
            int(row["seq"]),
            float(row["time"]),
            int(row["global_step"]),
            int(row["epoch"]),
            row["stage"],
            row["name"],
            repr(float(row["value"])),
        )
        for row in read(path)
    ]


def write_all(path: Path, events: list[Event], **run: Any) -> None:
    writer = CSV(path=str(path)).open(RunInfo("demo", **run))
    writer.write(events)
    writer.close()


# ------------------------------------------------------------------------------------------- what goes wrong


def test_a_full_disk_raises_and_leaves_nothing_of_the_batch(story: Any, tmp_path: Path, full_at: Any) -> None:
    """The batch comes again when there is room, whole and once."""
    path = tmp_path / "metrics.csv"
    writer = CSV(path=str(path)).open(RunInfo("demo"))
    first, second = story.steps(50), story.steps(50)
    writer.write(first)
    before = path.read_bytes()
    for _ in range(2):
        with full_at(len(before) + 1_234), pytest.raises(OSError, match="File too large") as caught:
            writer.write(second)
        assert caught.value.errno == errno.EFBIG
        assert path.read_bytes() == before
    writer.write(second)
    writer.close()
    assert told(path) == rows([*first, *second])


def test_a_second_run_of_the_same_name_is_appended(
    story: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its events have the same numbers but later times; there is one warning."""
    path, events = tmp_path / "metrics.csv", story.steps(20)
    anew = [msgspec.structs.replace(event, time=event.time + 60) for event in events]
    write_all(path, events)
    for begin in (0, 5):  # the second time, the end of it comes again
        write_all(path, anew[begin:])
        assert told(path) == rows([*events, *anew])
    assert caplog.text.count("which contains an earlier run of the same name, 'demo'") == 1


def test_wherever_a_write_was_cut_off_the_table_is_continued_exactly(story: Any, tmp_path: Path) -> None:
    """A process can die after any byte: within the header, a quoted name, a number, or between an event's rows."""
    events = [
        *story.steps(1),
        story(MetricsLogged, metrics={"größe": 0.25, 'a "b",\nc': math.nan, "x": -1e-300}),
        story(MetricsLogged, metrics={"y": 1.0}),
    ]
    path = tmp_path / "metrics.csv"
    write_all(path, events)
    whole = path.read_bytes()
    assert told(path) == rows(events)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        write_all(path, events)
        assert path.read_bytes() == whole, whole[:size]


def test_what_was_cut_off_and_never_comes_again_leaves_no_garbage(story: Any, tmp_path: Path) -> None:
    """A row is there whole, or not at all."""
    first, second = story.steps(1), story.steps(1)
    path = tmp_path / "metrics.csv"
    write_all(path, first)
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:size])
        write_all(path, second)
        found = told(path)
        kept = len(found) - len(rows(second))
        assert found == [*rows(first)[:kept], *rows(second)]


@pytest.mark.parametrize("name", ["train_loss", 'a\n,"'])
def test_a_large_table_is_continued_as_exactly(name: str, story: Any, tmp_path: Path) -> None:
    """Only its end is read, where a line need not be a row: a quoted name may have several."""
    path = tmp_path / "metrics.csv"
    events = [story(MetricsLogged, metrics={name: float(i), "b": 0.5}) for i in range(20_000)]
    write_all(path, events[:-1])
    whole = path.stat().st_size
    assert whole > 1.5 * 2**20
    with open(path, "r+b") as file:
        file.truncate(whole - 30)
    write_all(path, events[-3:])
    assert told(path) == rows(events)


@pytest.mark.parametrize("name", ["metric", 'a\n,"', "a\n\nb"])
def test_one_event_may_have_more_rows_than_are_looked_at_first(name: str, story: Any, tmp_path: Path) -> None:
    """How many of them are there is still known."""
    path = tmp_path / "metrics.csv"
    events = [*story.steps(3), story(MetricsLogged, metrics={f"{name}-{i}": float(i) for i in range(30_000)})]
    write_all(path, events)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)
    write_all(path, events)
    assert told(path) == rows(events)


@pytest.mark.parametrize("name", ["n" * 200_000, ',"' * 100_000, "a" + "\n" * 200_000, "demo,9,9," * 20_000])
def test_a_name_of_any_length_is_read_again(name: str, story: Any, tmp_path: Path) -> None:
    """`csv` refuses it unless its process-wide limit is raised, which is up to the reader."""
    path = tmp_path / "metrics.csv"
    events = [*story.steps(1), *[story(MetricsLogged, metrics={name: float(i), "b": 1.0}) for i in range(5)]]
    write_all(path, events[:-1])
    whole = path.stat().st_size
    for size in (whole, whole - 1, whole - 100_000):
        with open(path, "r+b") as file:
            file.truncate(size)
        write_all(path, events)
        limit = csv.field_size_limit(10**6)
        try:
            assert told(path) == rows(events)
        finally:
            csv.field_size_limit(limit)


def test_a_table_that_another_program_has_saved_is_continued(story: Any, tmp_path: Path) -> None:
    """With its own ends of lines, or with quotes around everything."""
    path = tmp_path / "metrics.csv"
    events = story.steps(9)
    for count, quoting in ((3, csv.QUOTE_MINIMAL), (6, csv.QUOTE_ALL)):
        write_all(path, events[:count])
        saved = read(path)
        with open(path, "w", newline="", encoding="utf-8") as file:
            file.write(",".join(COLUMNS) + "\r\n")
            csv.DictWriter(file, COLUMNS, quoting=quoting).writerows(saved)
    write_all(path, events)
    assert told(path) == rows(events)


@pytest.mark.parametrize("content", ["a;b\n1;2\n", "step,loss\n1,0.5\n", "no line"])
def test_another_table_is_refused_and_left_as_it_is(content: str, tmp_path: Path) -> None:
    """A wrong path must not cost the file's content."""
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(SinkMisconfigured, match=r"cannot continue .*mine\.csv"):
        CSV(path=str(path)).open(RunInfo("demo"))
    assert path.read_text() == content


def test_two_runs_at_a_time_cannot_have_one_file(story: Any, tmp_path: Path) -> None:
    """The second may only have to wait for the first, so the error is retried."""
    sink = CSV(path=str(tmp_path / "metrics.csv"))
    writer = sink.open(RunInfo("demo"))
    with pytest.raises(OSError, match="another run is writing to this file"):
        sink.open(RunInfo("other"))
    writer.close()
    sink.open(RunInfo("other")).close()


def test_a_table_that_was_deleted_is_missed(story: Any, tmp_path: Path) -> None:
    """Rows for a file without a name would be lost silently."""
    path = tmp_path / "metrics.csv"
    writer = CSV(path=str(path)).open(RunInfo("demo"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="deleted"):
        writer.write(story.steps(1))
    writer.close()


@pytest.mark.parametrize("path", ["", 3, Path("x.csv"), "a\0b"])
def test_an_invalid_path_is_refused_by_the_constructor(path: Any) -> None:
    """With what it was."""
    with pytest.raises(ValueError, match="CSV\\(path="):
        CSV(path=path)


# ------------------------------------------------------------------------------------------ what is in the table


def test_numbers_and_names_come_back_as_they_were(story: Any, tmp_path: Path) -> None:
    """To the last bit, NaN and infinities too, under whatever name."""
    path = tmp_path / "metrics.csv"
    values = [0.1, 1 / 3, math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 123456789.0]
    events = [story(MetricsLogged, metrics=dict(zip(NAMES, values, strict=True)))]
    write_all(path, events)
    assert told(path) == rows(events)


def test_no_text_is_a_formula_and_every_number_is_a_number(story: Any, tmp_path: Path) -> None:
    """A spreadsheet that opens the table computes nothing; a run of such a name is continued."""
    names = [
        "=1+1",
        "+1",
        "-1",
        "@SUM(1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "\uff1d1",
        "a;=1",
        "a\t=1",
        'b"=1',
        "'=1",
        "fine-1",
        "loss=2",
        " =1",
        "\u3000\ufeff=1",
        "a; \uff1d1",
        "\t\x1f-1",
        "\ufe661",
        "a =1",
    ]
    values = dict(zip(names, [-0.5, math.nan, -math.inf, math.inf, *map(float, range(-5, 11))], strict=True))
    run_id = "=cmd|' /C calc'!A0"
    events = [MetricsLogged(run_id, 1, seq, 1.5, 0, step, 0, "train", values) for seq, step in ((1, 1), (2, 2))]
    path = tmp_path / "metrics.csv"
    for some in (events[:1], events):
        writer = CSV(path=str(path)).open(RunInfo(run_id))
        writer.write(some)
        writer.close()
    found = read(path)
    assert [float(row["value"]) for row in found] == pytest.approx([*values.values()] * 2, nan_ok=True)
    assert {row["run_id"] for row in found} == {f"'{run_id}"}
    harmless = ["'=1+1", "'+1", "'-1", "'@SUM(1)", "'\t'=1", "'\r'=1", "'\n'=1", "'\uff1d1", "a;'=1", "a\t'=1"]
    harmless += names[10:14]
    harmless += ["' =1", "'\u3000\ufeff=1", "a;' \uff1d1", "'\t'\x1f-1", "'\ufe661", "a =1"]
    assert [row["name"] for row in found][: len(names)] == harmless
    for separator in (",", ";", "\t"):
        with open(path, newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file, delimiter=separator) for cell in row]
        assert [cell for cell in cells if cell.strip().startswith(("=", "+", "@", "\t", "\r", "\n", "\uff1d"))] == []


def test_lone_surrogates_in_a_name_are_escaped(story: Any, tmp_path: Path) -> None:
    """Losing a character is better than losing the rows of a batch."""
    path = tmp_path / "metrics.csv"
    write_all(path, [story(MetricsLogged, metrics={"a\udc80": 1.0, "b": 2.0})])
    assert [row["name"] for row in read(path)] == ["a\\udc80", "b"]


def test_events_without_numbers_have_no_rows(story: Any, tmp_path: Path) -> None:
    """Nor do those of unknown types; and it does not subscribe to them."""
    path = tmp_path / "metrics.csv"
    unknown = story(UnknownEvent, unknown_type="Later", raw=b"{}")
    write_all(path, [story.started(), unknown, story(TextLogged, name="a", text="b"), story(ValEpochEnded)])
    assert path.read_text() == ",".join(COLUMNS) + "\n"
    assert delivery_of(CSV()).types == METRIC_TYPES
    assert RunStarted not in METRIC_TYPES


def test_a_resumed_run_continues_the_table(story: Any, tmp_path: Path) -> None:
    """Also where its events are numbered from before the last one written, because the journal had lost some."""
    path = tmp_path / "metrics.csv"
    first = story.steps(10)
    write_all(path, first)
    story.attempt, story.seq, story.global_step = 2, 5, 5
    second = story.steps(10)
    write_all(path, second, attempt=2)
    write_all(path, second, attempt=2)
    assert told(path) == rows([*first, *second])


def test_runs_one_after_the_other_may_share_a_table(story: Any, tmp_path: Path) -> None:
    """Each continues its rows, even if another run's rows follow them."""
    path = tmp_path / "metrics.csv"
    steps = story.steps(6)
    other = [type(step)(*("other", *[getattr(step, name) for name in step.__struct_fields__[1:]])) for step in steps]
    write_all(path, steps[:3])
    writer = CSV(path=str(path)).open(RunInfo("other"))
    writer.write(other)
    writer.close()
    write_all(path, steps)
    assert told(path) == rows([*steps[:3], *other, *steps[3:]])


# --------------------------------------------------------------------------------------------------- with a run


def test_a_run_that_is_taken_up_again_has_one_table(tmp_path: Path, one_weight: Any) -> None:
    """Every number of both attempts, once, in the run's folder."""

    class Net(one_weight):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.log("twice", 2.0 * global_step)
            return super().train_step(global_step, batch, device)

    memory = Memory()
    for epochs in (2, 3):
        arguments = TrainerArguments(epochs=epochs, train_batch_size=2, device="cpu")
        own: Any = {"run_dir": tmp_path / "run", "run_id": "run", "resume": "auto"}
        assert Trainer(Net(), arguments, sinks=[CSV(), memory], **own).train().status == "finished"
    found = told(tmp_path / "run/metrics.csv")
    assert found == rows(memory.events)
    assert {row[1] for row in found} == {1, 2}
    assert {"train_loss", "val_loss", "twice", "train_epoch_loss"} <= {row[7] for row in found}
    assert len(memory.of(TrainStepEnded)) == 12
