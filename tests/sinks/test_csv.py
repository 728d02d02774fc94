"""The format of the table, and tables that others have written. `test_files` tests what all sinks of files share."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from support.files import CSV_FILES, rows_of

from events.errors import SinkMisconfigured
from events.messages import MetricsLogged, RunStarted, TextLogged, UnknownEvent, ValEpochEnded
from events.metrics import METRIC_TYPES
from events.sink import RunInfo, delivery_of
from sinks import CSV
from sinks.files.csv import COLUMNS
from sinks.testing import Story

NAMES = ["a/b c", 'say "x"', "one,two", "two\nlines", "carriage\rreturn", "größe 📈", "n" * 3_000, "", " "]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", ["train_loss", 'a\n,"', "a\n\nb"])
@pytest.mark.parametrize("shape", [(200, 1), (1, 200)], ids=["events", "rows of one event"])
def test_a_table_longer_than_is_read_first_is_continued_exactly(
    name: str, shape: tuple[int, int], story: Story, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may begin within a quoted name, which has lines like rows; and one event may have more rows than that."""
    monkeypatch.setattr("sinks.files.appended._TAIL_BYTES", 2_000)
    count, width = shape
    metrics = {f"{name}-{i}": float(i) for i in range(width)} | {"b": 0.5}
    events = [*story.steps(3), *[story(MetricsLogged, metrics=metrics) for _ in range(count)]]
    CSV_FILES.write(path, events)
    for missing in (0, 30, 100):
        cut(path, path.stat().st_size - missing)
        CSV_FILES.write(path, events[-3:])
        assert rows_of(path) == CSV_FILES.wanted(events)


@pytest.mark.parametrize(
    "name",
    ["n" * 200_000, ',"' * 100_000, "a" + "\n" * 200_000, "demo,9,9," * 20_000],
    ids=["long", "quotes", "lines", "rows"],
)
def test_a_name_of_any_length_is_read_again(name: str, story: Story, path: Path) -> None:
    """`csv` refuses it unless its process-wide limit is raised, which is up to the reader."""
    events = [*story.steps(1), *[story(MetricsLogged, metrics={name: float(i), "b": 1.0}) for i in range(5)]]
    CSV_FILES.write(path, events[:-1])
    whole = path.stat().st_size
    for size in (whole, whole - 1, whole - 100_000):
        cut(path, size)
        CSV_FILES.write(path, events)
        limit = csv.field_size_limit(10**6)
        try:
            assert rows_of(path) == CSV_FILES.wanted(events)
        finally:
            csv.field_size_limit(limit)


def test_a_table_that_another_program_has_saved_is_continued(story: Story, path: Path) -> None:
    """With its own ends of lines, or with quotes around everything."""
    events = story.steps(9)
    for count, quoting in ((3, csv.QUOTE_MINIMAL), (6, csv.QUOTE_ALL)):
        CSV_FILES.write(path, events[:count])
        saved = rows_of(path)
        with open(path, "w", newline="", encoding="utf-8") as file:
            file.write(",".join(COLUMNS) + "\r\n")
            csv.writer(file, quoting=quoting).writerows(saved)
    CSV_FILES.write(path, events)
    assert rows_of(path) == CSV_FILES.wanted(events)


@pytest.mark.parametrize("content", ["a;b\n1;2\n", "step,loss\n1,0.5\n", "no line"])
def test_another_table_is_refused_and_unchanged(content: str, path: Path) -> None:
    """A wrong path must not cost the file's content."""
    path.write_text(content)
    with pytest.raises(SinkMisconfigured, match=r"cannot continue .*metrics\.csv"):
        CSV(path=str(path)).open(RunInfo("demo"))
    assert path.read_text() == content


def test_numbers_and_names_come_back_as_they_were(story: Story, path: Path) -> None:
    """To the last bit, under whatever name; lone surrogates are escaped."""
    values = [0.1, 1 / 3, math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 123456789.0]
    events = [story(MetricsLogged, metrics=dict(zip(NAMES, values, strict=True)))]
    CSV_FILES.write(path, events)
    assert rows_of(path) == CSV_FILES.wanted(events)
    CSV_FILES.write(path, [story(MetricsLogged, metrics={"a\udc80": 1.0, "b": 2.0})])
    assert [row[-2:] for row in rows_of(path)[-2:]] == [("a\\udc80", "1.0"), ("b", "2.0")]


FORMULAS = {
    "=1+1": "'=1+1",
    "+1": "'+1",
    "-1": "'-1",
    "@SUM(1)": "'@SUM(1)",
    "\t=1": "'\t'=1",
    "\r=1": "'\r'=1",
    "\n=1": "'\n'=1",
    "\uff1d1": "'\uff1d1",
    "a;=1": "a;'=1",
    "a\t=1": "a\t'=1",
    " =1": "' =1",
    "\u3000\ufeff=1": "'\u3000\ufeff=1",
    "a; \uff1d1": "a;' \uff1d1",
    "\t\x1f-1": "'\t'\x1f-1",
    "\ufe661": "'\ufe661",
} | {name: name for name in ('b"=1', "'=1", "fine-1", "loss=2", "a =1")}
"""Names, and the names in the table."""


def test_no_text_is_a_formula_and_every_number_is_a_number(path: Path) -> None:
    """A spreadsheet that opens the table computes nothing; a run of such a name is continued."""
    values = dict(zip(FORMULAS, [-0.5, math.nan, -math.inf, math.inf, *map(float, range(-5, 11))], strict=True))
    run_id = "=cmd|' /C calc'!A0"
    events = [MetricsLogged(run_id, 1, seq, 1.5, 0, step, 0, "train", values) for seq, step in ((1, 1), (2, 2))]
    for some in (events[:1], events):
        CSV_FILES.write(path, some, run_id)
    found = rows_of(path)
    assert [float(str(row[-1])) for row in found] == pytest.approx([*values.values()] * 2, nan_ok=True)
    assert {row[0] for row in found} == {f"'{run_id}"}
    assert [row[-2] for row in found] == [*FORMULAS.values()] * 2
    for separator in (",", ";", "\t"):
        with open(path, newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file, delimiter=separator) for cell in row]
        assert [cell for cell in cells if cell.strip().startswith(("=", "+", "@", "\t", "\r", "\n", "\uff1d"))] == []


def test_events_without_numbers_have_no_rows(story: Story, path: Path) -> None:
    """The sink does not subscribe to them."""
    unknown: Any = story(UnknownEvent, unknown_type="Later", raw=b"{}")
    CSV_FILES.write(path, [story.started(), unknown, story(TextLogged, name="a", text="b"), story(ValEpochEnded)])
    assert path.read_text() == ",".join(COLUMNS) + "\n"
    assert delivery_of(CSV()).types == METRIC_TYPES
    assert RunStarted not in METRIC_TYPES
