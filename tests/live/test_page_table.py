"""The run table in a real browser, with the server that people run: which of many runs was best, and why."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from live.kit import Serve, Story, Told
from live.page_visits import EVIL, Visits, axe
from playwright.sync_api import Locator, Page, expect

from events.messages import ObserverFailed, ValEpochEnded
from events.table.notes import NOTES_NAME, Notes, read_notes
from events.wire import encode_json_lines
from sinks.live import table as table_module
from sinks.live.report import write_report
from sinks.live.runs import RunsOfFolder
from sinks.live.server import Server

RATES = (0.1, 0.01, 0.001)


def loss_of(number: int) -> float:
    """The best loss of a run: rate 0.01 is the best one, and the seeds differ."""
    return (0.5, 0.25, 0.75)[number % 3] + 0.01 * (number // 3)


def tell(folder: Path, number: int, **fields: Any) -> Told:
    told = Told(folder / f"sweep-{number % 2}" / f"run-{number:02d}", f"run-{number:02d}")
    say = told.story
    say.time += 100 * number
    config = {"optimizer": {"lr": RATES[number % 3], "name": "adam"}, "seed": number // 3, **fields.pop("config", {})}
    told.write(say.started(config=config, best="val_loss", max_steps=4, git_commit="0123456789abcdef", **fields))
    told.write(*say.steps(3), say.metrics(accuracy=1 - loss_of(number)), say(ValEpochEnded, loss=loss_of(number)))
    told.write(say(ValEpochEnded, loss=loss_of(number) + 0.5))
    return told


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Twenty runs, of which the last one is running, in two folders."""
    tolds = [tell(tmp_path, number) for number in range(20)]
    say = tolds[4].story
    tolds[4].write(say(ObserverFailed, observer="csv", error="disk full", action="disabled"))
    for told in tolds[:-1]:
        told.write(told.story.ended("failed" if told is tolds[3] else "finished"))
        told.let_go()
    yield tmp_path
    tolds[-1].let_go()


class Table:
    """The open table."""

    def __init__(self, visit: Visits, server: Server, fragment: str = "", **options: Any) -> None:
        self.page: Page = visit(server.url, f"#table=1{fragment}", loaded=False, **options)
        self.root = self.page.locator("#table")
        expect(self.root.locator("tbody tr").first).to_be_visible(timeout=20_000)

    def names(self) -> list[str]:
        return self.root.locator("tr[data-run] a").all_inner_texts()

    def heads(self) -> list[str]:
        return self.root.locator("thead .sort .word").all_inner_texts()

    def head(self, name: str) -> Locator:
        return self.root.get_by_role("columnheader", name=name).get_by_role("button")

    def cell(self, run: str, column: str) -> Locator:
        return self.row(run).locator("> *").nth(self.heads().index(column))

    def row(self, run: str) -> Locator:
        return self.root.locator("tr", has=self.page.get_by_role("link", name=run, exact=True))

    def options(self, run: str, choice: str) -> None:
        self.root.get_by_role("button", name=f"Options of {run}").click()
        self.page.get_by_role("dialog").get_by_role("button", name=choice, exact=True).click()
        expect(self.page.get_by_role("dialog")).to_have_count(0)


def best_first() -> list[str]:
    return [f"run-{number:02d}" for number in sorted(range(20), key=loss_of)]


def test_the_best_of_twenty_runs_is_on_top_and_what_differs_is_beside_it(
    folder: Path, serve: Serve, visit: Visits
) -> None:
    """Without a choice of the reader; at the width of a desk and of a phone, light and dark."""
    server = serve(RunsOfFolder(folder))
    table = Table(visit, server, viewport={"width": 1440, "height": 900})
    page = table.page
    assert table.names() == best_first()
    usual = ["Name", "best val_loss", "State", "Progress", "optimizer.lr", "seed", "Health", "Duration", "Folder"]
    assert table.heads() == usual
    assert table.root.locator("[aria-sort]").all_inner_texts() == ["best val_loss\n▲"]
    expect(table.root.locator("[aria-sort]")).to_have_attribute("aria-sort", "ascending")
    expect(table.cell("run-01", "best val_loss").locator(".winner")).to_contain_text("0.25")
    expect(table.cell("run-02", "best val_loss").locator(".winner")).to_have_count(0)
    expect(table.cell("run-03", "State")).to_contain_text("failed")
    expect(table.cell("run-03", "Health")).to_have_text("1 problem")
    cut = "cell => cell.scrollWidth > cell.clientWidth"
    assert not table.cell("run-19", "Progress").evaluate(cut)
    assert not table.cell("run-18", "Progress").evaluate(cut)
    expect(table.cell("run-04", "Health")).to_have_text("csv disabled")
    expect(table.cell("run-19", "Progress")).to_contain_text("75.0 %")
    expect(table.cell("run-05", "Folder")).to_have_text("sweep-1/run-05")
    expect(page).to_have_title(re.compile("^Runs . stagecast$"))
    assert axe(page) == []
    for options in ({"viewport": {"width": 390, "height": 800}}, {"color_scheme": "dark"}):
        other = Table(visit, server, **options).page
        assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert axe(other) == []


def test_the_order_of_several_columns_is_in_the_link(folder: Path, serve: Serve, visit: Visits) -> None:
    """A click sorts by a column alone, one with Shift in addition; a third click restores the usual order."""
    table = Table(visit, serve(RunsOfFolder(folder)))
    page = table.page
    table.head("seed").click()
    table.head("optimizer.lr").click(modifiers=["Shift"])
    table.head("optimizer.lr").click(modifiers=["Shift"])
    expected = sorted(range(20), key=lambda number: (number // 3, -RATES[number % 3]))
    expect(table.root.locator("tr[data-run] a").first).to_have_text("run-00")
    assert table.names() == [f"run-{number:02d}" for number in expected]
    assert table.root.locator("[aria-sort]").all_inner_texts() == ["seed\n▲1"]
    page.reload()
    expect(table.root.locator("tbody tr").first).to_be_visible()
    assert table.names() == [f"run-{number:02d}" for number in expected]
    table.head("Name").click()
    table.head("Name").click()
    expect(table.root.locator("tr[data-run] a").first).to_have_text("run-19")
    table.head("Name").click()
    expect(table.root.locator("tr[data-run] a").first).to_have_text("run-01")
    assert "sort" not in page.url


def test_a_filter_is_a_condition_or_an_expression_and_its_errors_are_in_words(
    folder: Path, serve: Serve, visit: Visits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows stay while it cannot be read; the link keeps it. A refusal is not repeated at once."""
    visit.may_lose_server = True  # the browser logs the refusals
    table = Table(visit, serve(RunsOfFolder(folder)))
    page, where = table.page, table.root.get_by_role("searchbox")
    problem = table.root.locator("#table-problem")
    where.fill("optimizer.lr > 0.005")
    expect(table.root.get_by_text("14 of 20 runs")).to_be_visible()
    where.fill("optimizer.lr > 0.005 and val_loss <")
    expect(problem).to_have_text("the condition ends where a value is expected; write it as in lr > 0.01")
    expect(where).to_have_attribute("aria-invalid", "true")
    assert len(table.names()) == 14
    where.press_sequentially(" 0.8")
    expect(table.root.get_by_text("5 of 20 runs")).to_be_visible()
    assert table.names() == ["run-01", "run-04", "run-07", "run-10", "run-13"]
    expect(problem).to_have_text("")
    where.fill("val_los < 1")
    expect(problem).to_contain_text("did you mean val_loss?")
    where.fill("-(03|1[0-2])$")
    expect(table.root.get_by_text("4 of 20 runs")).to_be_visible()
    assert table.names() == ["run-10", "run-03", "run-12", "run-11"]
    page.reload()
    expect(where).to_have_value("-(03|1[0-2])$")
    expect(table.root.get_by_text("4 of 20 runs")).to_be_visible()
    where.fill("nothing like it")
    expect(table.root.get_by_text("No run matches the filter.")).to_be_visible()
    monkeypatch.setattr(RunsOfFolder, "is_behind", True)
    expect(problem).to_have_text("The server is still reading runs, so some are missing.")
    where.fill("val_los < 1")
    times = []
    for _ in range(3):
        with page.expect_response(lambda response: response.status == 400) as refused:
            expect(problem).to_contain_text(re.compile("still reading|did you mean val_loss?"))
        times.append(refused.value.request.timing["startTime"])
    assert times[-1] - times[0] > 1000


def test_groups_have_the_mean_and_the_spread_of_their_runs(folder: Path, serve: Serve, visit: Visits) -> None:
    """Of metrics; of another hyperparameter the number of values. They unfold, and are sorted by their means."""
    table = Table(visit, serve(RunsOfFolder(folder)))
    page = table.page
    table.root.get_by_label("Group by").select_option("optimizer.lr")
    rows = table.root.locator(".group-row")
    expect(rows).to_have_count(3)
    for row, (rate, first) in enumerate(((0.01, 1), (0.1, 0), (0.001, 2))):
        losses = [loss_of(number) for number in range(first, 20, 3)]
        expect(rows.nth(row)).to_contain_text(f"optimizer.lr = {rate} · {len(losses)} runs")
        mean, spread = f"{statistics.mean(losses):.4g}", f"{statistics.stdev(losses):.4g}"
        expect(rows.nth(row)).to_contain_text(f"{mean} ± {spread}")
        expect(rows.nth(row)).to_contain_text(f"{len(losses)} values")
    cut = "row => [...row.querySelectorAll('td')].filter(cell => cell.scrollWidth > cell.clientWidth).length"
    assert [row.evaluate(cut) for row in rows.all()] == [0, 0, 0]
    assert table.names() == []
    rows.first.get_by_role("button").click()
    assert table.names() == [f"run-{number:02d}" for number in range(1, 20, 3)]
    page.reload()
    expect(rows.first.get_by_role("button")).to_have_attribute("aria-expanded", "true")
    table.options("run-07", "Pin to the top")
    assert table.names()[0] == "run-07"
    expect(rows.first).to_contain_text("6 runs")
    assert axe(page) == []


def test_runs_are_hidden_and_pinned(folder: Path, serve: Serve, visit: Visits) -> None:
    """One by one or those that are ticked; the link keeps it, and Reset forgets it."""
    table = Table(visit, serve(RunsOfFolder(folder)))
    page = table.page
    table.options("run-01", "Hide")
    table.options("run-19", "Pin to the top")
    assert table.names()[:2] == ["run-19", "run-04"]
    for name in ("run-04", "run-07"):
        table.root.get_by_label(f"Tick {name}").check()
    table.root.get_by_role("group", name="Ticked runs").get_by_role("button", name="Hide").click()
    page.reload()
    expect(table.root.get_by_text("17 of 20 runs")).to_be_visible()
    assert table.names()[:2] == ["run-19", "run-10"]
    table.root.get_by_role("button", name="Hidden: 3").click()
    assert table.names()[:3] == ["run-19", "run-01", "run-04"]
    table.options("run-01", "Show again")
    expect(table.root.get_by_role("button", name="Hidden: 2")).to_be_visible()
    table.root.get_by_role("button", name="Reset").click()
    assert table.names() == best_first()
    assert page.url.endswith("#table=1")


def test_a_name_tags_a_note_and_a_colour_are_kept_in_the_folder_of_the_run(
    folder: Path, serve: Serve, visit: Visits
) -> None:
    """The page shows name and colour wherever it names the run; an error is in the dialog."""
    server = serve(RunsOfFolder(folder), commands=True)
    visit.may_lose_server = True  # the browser logs the refusal
    table = Table(visit, server)
    page, dialog = table.page, table.page.get_by_role("dialog")
    run_dir = folder / "sweep-1" / "run-01"

    def edit(name: str) -> None:
        table.root.get_by_role("button", name=f"Options of {name}").click()

    edit("run-01")
    dialog.get_by_label("Name").fill(f"the best {EVIL}")
    dialog.get_by_label("New tags").fill("keep, paper")
    dialog.get_by_label("Note", exact=True).fill("two\nlines")
    dialog.get_by_text("Own colour").click()
    dialog.get_by_label("Colour", exact=True).fill("#00aa55")
    assert axe(page) == []
    dialog.get_by_role("button", name="Save").click()
    expect(table.row(f"the best {EVIL}")).to_contain_text("keep paper")
    assert read_notes(run_dir) == Notes(f"the best {EVIL}", ("keep", "paper"), "two\nlines", "#00aa55")
    expect(table.root.locator(".dot")).to_have_css("background-color", "rgb(0, 170, 85)")
    edit("the best")
    dialog.get_by_role("button", name="paper").click()
    dialog.get_by_text("Own colour").click()
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_have_count(0)
    assert read_notes(run_dir) == Notes(f"the best {EVIL}", ("keep",), "two\nlines")
    (run_dir / NOTES_NAME).write_text("[")
    edit("run-01" if table.row("run-01").count() else "the best")
    dialog.get_by_label("Name").fill("other")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_contain_text(
        "notes.json in the run folder is not valid; repair or delete it"
    )
    (run_dir / NOTES_NAME).unlink()
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_have_count(0)
    table.root.get_by_role("link", name="other").click()
    expect(page.locator("#run-name")).to_have_text("other")
    expect(page).to_have_title(re.compile("· other . stagecast$"))
    expect(page.locator("#runs-list a[aria-current]")).to_have_text("other")
    page.locator("#runs-list li", has_text="run-04").get_by_role("checkbox").check()
    for part in ("#compared", "#validation-table"):
        expect(page.locator(part).first).to_contain_text("other")
    readers = Table(visit, serve(RunsOfFolder(folder)))
    readers.root.get_by_role("button", name="Options of other").click()
    expect(readers.page.get_by_role("dialog").get_by_role("button", name="Hide")).to_be_visible()
    expect(readers.page.get_by_role("dialog").get_by_role("textbox")).to_have_count(0)


def test_any_column_is_found_by_a_search_and_moved(
    folder: Path, serve: Serve, visit: Visits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of metrics, hyperparameters and what every run has; their order is in the link.

    A table with too many values gets those of a metric when it is shown.
    """
    monkeypatch.setattr(table_module, "MAX_VALUES", 60)
    table = Table(visit, serve(RunsOfFolder(folder)))
    page = table.page
    table.root.get_by_role("button", name="Columns").click()
    chooser = table.root.get_by_role("group", name="Columns", exact=True)
    expect(chooser.get_by_label("Search columns")).to_be_focused()
    page.keyboard.type("accuracy")
    chooser.get_by_role("checkbox", name="last accuracy").check()
    expect(table.cell("run-01", "last accuracy")).to_have_text("0.75 (best)")
    chooser.get_by_label("Search columns").fill("commit")
    chooser.get_by_role("checkbox", name="Commit").check()
    expect(table.cell("run-01", "Commit")).to_have_text("012345678")
    chooser.get_by_role("checkbox", name="Health").click()
    for _ in range(2):
        chooser.get_by_role("button", name="Move Commit to the left").click()
    page.keyboard.press("Escape")
    expect(table.root.get_by_role("button", name="Columns")).to_be_focused()
    page.reload()
    expect(table.root.locator("tbody tr").first).to_be_visible()
    assert table.heads()[-3:] == ["Commit", "Folder", "last accuracy"]
    assert "Health" not in table.heads()
    table.head("last accuracy").click()
    expect(table.root.locator("[aria-sort]")).to_have_attribute("aria-sort", "descending")
    assert table.names() == best_first()


def test_a_table_of_two_thousand_runs_draws_the_rows_in_sight(tmp_path: Path, serve: Serve, visit: Visits) -> None:
    """Scrolling leads to the last one; a row follows its run."""
    running = tell(tmp_path / "live", 0, config={f"width{number}": number for number in range(70)})
    for number in range(2_000):
        run_dir = tmp_path / f"run{number}" / "journal"
        run_dir.mkdir(parents=True)
        say = Story(f"run{number}")
        told = [say.started(config={"number": number}), say(ValEpochEnded, loss=1.0 + number), say.ended()]
        (run_dir / f"{1:020d}.jsonl").write_bytes(encode_json_lines(told))
    table = Table(visit, serve(RunsOfFolder(tmp_path)))
    page = table.page
    expect(table.root.get_by_text("2,001 runs")).to_be_visible(timeout=20_000)  # read in several looks
    assert table.names()[:2] == ["run-00", "run0"]
    assert table.root.locator("tr").count() < 100
    expect(table.root.locator("table")).to_have_attribute("aria-rowcount", "2002")
    running.write(running.story(ValEpochEnded, loss=0.125))
    expect(table.cell("run-00", "best val_loss")).to_contain_text("0.125", timeout=20_000)
    table.root.locator(".table-scroll").evaluate("box => { box.scrollTop = box.scrollHeight; }")
    expect(table.row("run1999")).to_be_visible()
    expect(table.row("run1999")).to_have_attribute("aria-rowindex", "2002")
    assert table.root.locator("tr").count() < 100
    table.root.get_by_label("Tick run1999").focus()
    page.keyboard.press("ArrowUp")
    expect(table.root.get_by_label("Tick run1998")).to_be_focused()
    table.root.get_by_role("button", name="Columns").click()
    page.keyboard.type("width")
    chooser = table.root.get_by_role("group", name="Columns", exact=True)
    expect(chooser.get_by_role("status")).to_contain_text("more: search for them.")
    assert chooser.get_by_role("list", name="Other columns").get_by_role("checkbox").count() == 60
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    expect(table.root.get_by_text("1,501 more rows are not printed.")).to_be_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    expect(table.root.get_by_text("more rows are not printed")).to_have_count(0)
    running.let_go()


def test_runs_are_compared_with_the_keyboard_alone(folder: Path, serve: Serve, visit: Visits) -> None:
    """From the charts to the table, to ticked runs, over each other, and back by the browser's history."""
    page = visit(serve(RunsOfFolder(folder)).url)
    page.keyboard.press("Alt+t")
    root = page.locator("#table")
    expect(root.locator("tr[data-run]").first).to_be_visible()
    expect(page.locator("#content")).to_be_hidden()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('tbody input')"):
            break
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    expect(root.get_by_text("2 ticked")).to_be_visible()
    compare = root.get_by_role("button", name="Compare")
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        if compare.evaluate("button => button === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#compared li")).to_have_count(2)
    assert [name in page.url for name in ("run-01", "run-04", "table=1")] == [True, True, False]
    page.go_back()
    expect(root.locator("tr[data-run]").first).to_be_visible()
    root.get_by_role("link", name="run-04").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#run-name")).to_have_text("run-04")
    expect(root).to_be_hidden()


def test_two_runs_of_one_id_and_values_that_are_not_finite_are_told_apart(
    tmp_path: Path, serve: Serve, visit: Visits
) -> None:
    """A run without a value is last in either order.

    Without a run under way, the page opens with the table: once, and the browser's Back button leaves it.
    """
    for place, loss in (("a/demo", 1.0), ("b/c/demo", math.nan)):
        told = Told(tmp_path / place, "demo")
        told.write(told.story.started(best="val_loss"), told.story(ValEpochEnded, loss=loss), told.story.ended())
        told.let_go()
    server = serve(RunsOfFolder(tmp_path))
    page = visit(server.url, loaded=False)
    expect(page.locator("#table tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Charts", exact=True).click()
    expect(page.locator("#content")).to_be_visible()
    page.go_back()
    expect(page.locator("#table tbody tr")).to_have_count(2)
    page.go_back()
    assert page.url == "about:blank"
    table = Table(visit, server, "&column=folder&column=last.val_loss&column=health")
    table.head("last val_loss").click()
    names = table.names()
    assert sorted(names) == ["demo", f"demo ({'b:c' if 'demo (b:c)' in names else 'a'})"]
    folders = [table.root.locator("tr[data-run] td:nth-child(2)").nth(at).inner_text() for at in (0, 1)]
    assert folders == ["a/demo", "b/c/demo"]
    expect(table.root.locator("tr[data-run]").last).to_contain_text("NaN")
    expect(table.root.locator("tr[data-run]").last).to_contain_text("val_loss NaN since step 0")
    table.head("last val_loss").click()
    expect(table.root.locator("tr[data-run]").last).to_contain_text("NaN")


def test_a_report_has_the_table_without_a_server(folder: Path, visit: Visits) -> None:
    """Its filter is a regular expression on names, and nothing can be noted."""
    (folder / "sweep-1" / "run-01" / NOTES_NAME).write_text('{"name": "the best", "note": "keep it"}')
    write_report([folder], folder / "out.html")
    page = visit((folder / "out.html").as_uri())
    page.get_by_role("button", name="Table", exact=True).click()
    root = page.locator("#table")
    expect(root.locator("tr[data-run] a").first).to_have_text("the best")
    assert root.locator("tr[data-run]").count() == 20
    root.get_by_role("button", name="Options of the best").click()
    expect(page.get_by_role("dialog").get_by_text("keep it")).to_be_visible()
    expect(page.get_by_role("dialog").get_by_role("textbox")).to_have_count(0)
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    root.get_by_role("searchbox").fill("-1[0-9]$")
    expect(root.get_by_text("10 of 20 runs")).to_be_visible()
    root.get_by_role("searchbox").fill("-1[")
    expect(root.locator("#table-problem")).to_contain_text("is not a regular expression")
    root.get_by_role("searchbox").fill("best")
    root.get_by_role("link", name="the best").click()
    expect(root).to_be_hidden()
    expect(page.locator("#content")).to_be_visible()
