"""The table of runs as a server answers it: rows, filters of strangers, and polls without news."""

from __future__ import annotations

import fcntl
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from live.kit import Serve, Story, Told, hub_of

from events.errors import RunFolderError
from events.messages import ValEpochEnded
from events.table import notes as notes_module
from events.table.columns import page_row
from events.table.entry import EntryReader
from events.table.notes import NOTES_NAME, Notes, NotesChange, read_notes, write_notes
from sinks.live import table as table_module
from sinks.live.entry import entry_of
from sinks.live.hub import Hub
from sinks.live.runs import RunsOfFolder


def tell_runs(folder: Path, count: int, **config: Any) -> list[Told]:
    """Tell runs of three steps that have ended, the newest last."""
    found = []
    for number in range(count):
        told = Told(folder / f"run-{number}", f"run-{number}")
        tell = told.story
        tell.time += 100 * number
        told.write(
            tell.started(config={"lr": 10.0**-number, **config}, git_commit="abc", best="val_loss", max_steps=3),
            *tell.steps(3),
            tell(ValEpochEnded, loss=0.5 + number),
            tell.ended(),
        )
        told.let_go()
        found.append(told)
    return found


def table(server: Any, *filters: str, since: str = "", **headers: str) -> httpx.Response:
    """Ask until the server has read all journals."""
    query = [("filter", one) for one in filters] + ([("since", since)] if since else [])
    while True:
        answer = httpx.get(f"{server.url}api/table", params=query, headers=headers)
        if answer.status_code != 200 or not answer.json()["is_behind"]:
            return answer


def test_a_row_has_all_of_a_run_as_plain_data(tmp_path: Path, serve: Serve) -> None:
    """Also what is not finite, what people noted, and where the run lies."""
    told = Told(tmp_path / "deep" / "er" / "demo", "demo")
    tell = told.story
    told.write(tell.started(config={"lr": 0.1, "huge": math.inf}, best="accuracy", best_mode="max", max_steps=4))
    told.write(tell.step(4.0), tell.metrics(accuracy=0.5, broken=math.nan), tell.step(2.0), tell.metrics(accuracy=0.25))
    (told.path / NOTES_NAME).write_text('{"name": "first", "tags": ["a"], "colour": "#ff0000"}')
    answer = table(serve(RunsOfFolder(tmp_path), commands=True)).json()
    (row,) = answer.pop("rows")
    assert (answer["total"], answer["is_behind"], answer["notes"]) == (1, False, True)
    assert abs(answer["now"] - time.time()) < 60
    expected = {
        "name": "demo",
        "folder": "deep/er/demo",
        "label": "first",
        "status": "running",
        "health": ["broken NaN since step 1"],
        "step": 2,
        "total_steps": 4,
        "progress": 0.5,
        "duration_s": pytest.approx(tell.time - 1_700_000_000.01),
        "monitored": "accuracy",
        "attempt": 1,
        "notes": {"name": "first", "tags": ["a"], "note": "", "colour": "#ff0000"},
        "config": {"lr": 0.1, "huge": "inf"},
    }
    assert {name: row[name] for name in expected} == expected
    assert row["metrics"]["accuracy"] == [0.25, 0.5, 1, 0, False]
    assert row["metrics"]["broken"] == ["nan", None, None, None, False]
    assert row["metrics"]["train_loss"] == [2.0, 2.0, 2, 0, True]
    told.let_go()


def test_filters_select_rows_and_a_wrong_one_is_explained(tmp_path: Path, serve: Serve) -> None:
    tell_runs(tmp_path, 3)
    server = serve(RunsOfFolder(tmp_path))

    def names(*filters: str) -> list[str]:
        return [row["name"] for row in table(server, *filters).json()["rows"]]

    assert names() == ["run-2", "run-1", "run-0"]
    assert names("lr > 0.05 and val_loss < 9") == ["run-1", "run-0"]
    assert names("lr < 1", "-[01]$") == ["run-1"]
    assert names(r"name ~ '^RUN|(?<=run-)2'") == ["run-2"]
    for wrong, says in {
        "val_los < 1": "'val_los' is not a column of these runs; did you mean val_loss?",
        "colr < 1 or zz < 1": "'colr' is not a column of these runs; did you mean",
        "zz < 1": "'zz' is not a column of these runs; the page lists them under Columns",
        "lr <": "the condition ends where a value is expected",
        "(": "'(' is not a regular expression: missing )",
        "(?x) a": "'(?x) a' has the flag x; write the pattern without it",
        "(a{999}){999}": "'(a{999}){999}' repeats more than 10,000 times; use smaller counts",
        "a" * 2_001: "the filters have more than 2,000 characters; shorten them",
    }.items():
        answer = table(server, wrong)
        assert (answer.status_code, answer.json()["error"][: len(says)]) == (400, says)


@pytest.mark.parametrize("text", ["(a|a)*[cd]$", "note ~ '(a|a)*[cd]$'"])
def test_a_search_without_an_end_is_refused_and_delays_no_one(
    tmp_path: Path, serve: Serve, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a name, and in a condition."""
    (told,) = tell_runs(tmp_path, 1)
    (told.path / NOTES_NAME).write_text(
        msgspec.json.encode({"name": "a" * 200 + "b", "note": "a" * 999 + "b"}).decode()
    )
    monkeypatch.setattr(table_module, "_SEARCH_S", 0.05)
    server = serve(RunsOfFolder(tmp_path))
    answer = table(server, text)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("'(a|a)*[cd]$' takes more than 0.05 s to search; write it without")
    assert table(server, "aab").json()["rows"]


def test_a_poll_without_news_is_empty_and_one_with_news_has_only_those(tmp_path: Path, serve: Serve) -> None:
    tell_runs(tmp_path, 40, padding="x" * 200)
    server = serve(RunsOfFolder(tmp_path))
    first = table(server, accept_encoding="gzip")
    whole = table(server, **{"accept-encoding": "identity"})
    assert (first.headers["content-encoding"], whole.headers.get("content-encoding")) == ("gzip", None)
    assert int(first.headers["content-length"]) < int(whole.headers["content-length"]) / 5
    assert first.json()["rows"] == whole.json()["rows"]
    etag, cursor = first.headers["etag"], first.json()["cursor"]
    again = table(server, since=cursor, **{"if-none-match": etag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    (tmp_path / "run-7" / NOTES_NAME).write_text('{"note": "new"}')
    news = table(server, since=cursor, **{"if-none-match": etag})
    assert [row["name"] for row in news.json()["rows"]] == ["run-7"]
    assert news.json()["names"] == [f"run-{number}" for number in reversed(range(40))]
    filtered = table(server, "-[12]$", since=news.json()["cursor"])
    assert (filtered.json()["names"], filtered.json()["rows"]) == (["run-2", "run-1"], [])
    for strange in ("another-5", f"{cursor.partition('-')[0]}-{'9' * 400}", "\u0663-\u0663", "-"):
        assert len(table(server, since=strange).json()["rows"]) == 40


def test_the_row_of_a_sinks_run_is_that_of_its_journal(tmp_path: Path, serve: Serve, story: Story) -> None:
    """Read from the curves in memory; a run without a folder has no notes."""
    told = Told(tmp_path / "demo", "demo")
    tell = told.story
    told.write(
        tell.started(config={"lr": 0.1, "epochs": 3}, arguments={"epochs": 2}, best="val_loss", steps_per_epoch=4),
        *tell.steps(3),
        tell(ValEpochEnded, loss=0.5),
        tell.step(0.25),
        tell.step(math.nan),
    )
    tell.epoch = 1
    told.write(tell.step(math.inf), tell(ValEpochEnded, loss=0.75), tell.metrics(broken=math.nan))
    by_journal = EntryReader(told.path).read()
    hub = Hub()
    hub.feed(told.events)
    mine, other = page_row(entry_of(hub.view)), page_row(by_journal)
    for one in (mine, other):
        assert sorted(one.pop("health")) == ["broken NaN since step 6", "train_loss NaN since step 5"]
    assert mine | {"name": "", "label": "", "folder": ""} == other
    assert mine["metrics"]["train_loss"] == ["inf", 0.25, 4, 1, True]
    (row,) = table(serve(hub_of(story, steps=3))).json()["rows"]
    assert (row["name"], row["step"], row["notes"]["name"]) == ("demo", 3, "")
    told.let_go()


def note(server: Any, run_id: str = "run-0", **change: Any) -> httpx.Response:
    return httpx.post(f"{server.url}api/runs/{run_id}/notes", json=change)


def test_notes_are_changed_field_by_field(tmp_path: Path, serve: Serve) -> None:
    """Of a run that is over, and of one that is running; the list of runs has name and colour."""
    tell_runs(tmp_path, 1)
    running = Told(tmp_path / "run-1", "run-1", steps=1)
    server = serve(RunsOfFolder(tmp_path), commands=True)
    for run_id in ("run-0", "run-1"):
        assert note(server, run_id, name=" best ", add_tags=["b", "a", "", "b"]).json() == {
            "name": "best",
            "tags": ["b", "a"],
            "note": "",
            "colour": "",
        }
        assert note(server, run_id, note="two\nlines", colour="#00ff00", remove_tags=["b"], add_tags=["c"]).json() == {
            "name": "best",
            "tags": ["a", "c"],
            "note": "two\nlines",
            "colour": "#00ff00",
        }
        assert read_notes(tmp_path / run_id) == Notes("best", ("a", "c"), "two\nlines", "#00ff00")
    assert [row["notes"]["name"] for row in table(server, "tags == c").json()["rows"]] == ["best", "best"]
    listed = httpx.get(f"{server.url}api/runs").json()["runs"]
    assert [(run["label"], run["colour"]) for run in listed] == [("best", "#00ff00")] * 2
    note(server, name="", colour="", note="", remove_tags=["a", "c"])
    assert read_notes(tmp_path / "run-0") == Notes()
    running.let_go()


def test_notes_that_cannot_be_taken_are_refused_with_a_reason(tmp_path: Path, serve: Serve) -> None:
    """The file stays as it is; one behind a link is never written."""
    tell_runs(tmp_path / "runs", 2)
    path = tmp_path / "runs" / "run-0" / NOTES_NAME
    server = serve(RunsOfFolder(tmp_path / "runs"), commands=True)
    for change, says in (
        ({"colour": "red"}, "matching regex"),
        ({"name": "x" * 5_000}, "length <= "),
        ({"tags": ["x"]}, "unknown field `tags`"),
        ({"add_tags": [f"t{number}" for number in range(30)]}, "60 tags are more than 50 per run; remove one first"),
    ):
        write_notes(path.parent, NotesChange(add_tags=tuple(map(str, range(30)))))
        answer = note(server, **change)
        assert (answer.status_code, says in answer.json()["error"]) == (400, True), answer.text
    for content in ("[", '{"colour": "red"}'):
        path.write_text(content)
        answer = note(server, name="x")
        assert (answer.status_code, path.read_text()) == (409, content)
        assert answer.json()["error"].endswith("notes.json in the run folder is not valid; repair or delete it")
    path.unlink()
    (tmp_path / "secret").write_text("{}")
    path.symlink_to(tmp_path / "secret")
    assert note(server, name="x").status_code == 409
    assert (tmp_path / "secret").read_text() == "{}"
    assert note(server, "gone", name="x").status_code == 404
    kinds = {"content-type": "text/plain"}
    assert httpx.post(f"{server.url}api/runs/run-1/notes", content=b"{}", headers=kinds).status_code == 415
    for options, status in (({}, 403), ({"commands": True}, 409)):
        folder = RunsOfFolder(tmp_path / "runs", keeps_notes=not options)
        other = serve(folder, **options)
        answer = note(other, "run-1", name="x")
        assert (answer.status_code, table(other).json()["notes"]) == (status, False)
        assert "; " in answer.json()["error"]
    assert not (tmp_path / "runs" / "run-1" / NOTES_NAME).exists()


def test_changes_of_notes_at_once_are_all_kept(tmp_path: Path) -> None:
    """Each waits for the one before."""
    with ThreadPoolExecutor(8) as threads:
        changes = [NotesChange(add_tags=(f"t{number}",)) for number in range(40)]
        list(threads.map(lambda change: write_notes(tmp_path, change), changes))
    notes = read_notes(tmp_path)
    assert notes is not None
    assert sorted(notes.tags) == sorted(f"t{number}" for number in range(40))
    assert [path.name for path in tmp_path.iterdir()] == [NOTES_NAME]


def test_a_lock_on_notes_that_is_not_released_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes_module, "_LOCK_S", 0.05)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(RunFolderError, match="are being changed by another process; try again"):
        write_notes(tmp_path, NotesChange(name="x"))
    os.close(fd)
    assert write_notes(tmp_path, NotesChange(name="x")) == Notes("x")


def test_a_table_with_very_many_values_has_those_that_are_asked_for(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those by which runs are judged; filters know all, and nothing is left out without a word."""
    monkeypatch.setattr(table_module, "MAX_VALUES", 6)
    for number in range(2):
        told = Told(tmp_path / f"run-{number}", f"run-{number}")
        tell = told.story
        told.write(
            tell.started(config={"a": 1, "b": 2, "c": 3, "d": "x" * 900}), tell(ValEpochEnded, loss=1.0 + number)
        )
        told.write(tell.metrics(**{f"m{index}": float(number) for index in range(4)}), tell.ended())
        told.let_go()
    server = serve(RunsOfFolder(tmp_path))

    def ask(query: str) -> Any:
        return httpx.get(f"{server.url}api/table?{query}").json()

    table(server)
    first = ask("filter=m3 < 9")
    assert [(list(row["metrics"]), list(row["config"])) for row in first["rows"]] == [
        (["val_loss"], ["a", "b", "c"])
    ] * 2
    (one,) = ask("filter=m3 > 0")["rows"]  # of few runs all
    assert (len(one["metrics"]), len(one["config"])) == (5, 4)
    assert (first["metric_names"], first["left_out"]) == (["val_loss", "m0", "m1", "m2", "m3"], 1)
    second = ask(f"metric=m2&metric=gone&since={first['cursor']}")
    assert [list(row["metrics"]) for row in second["rows"]] == [["val_loss", "m2"]] * 2
    assert ask(f"metric=m2&since={second['cursor']}")["rows"] != []  # other metrics are another table
    assert ask(f"metric=gone&metric=m2&since={second['cursor']}")["rows"] == []
    monkeypatch.setattr(table_module, "MAX_VALUES", 400)
    (row, _) = ask("")["rows"]
    assert row["config"]["d"] == "x" * 500 + "…"
    assert len(row["metrics"]) == 5
