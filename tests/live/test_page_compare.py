"""Runs over each other on the page, in a real browser."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from live.kit import Serve, Told
from live.page_server import FakeRun
from live.page_show import Show, a_run, choose, curve
from live.page_visits import axe
from playwright.sync_api import Page, expect

from events.messages import ValEpochEnded
from sinks.live.report import write_report
from sinks.live.runs import RunsOfFolder

NONE = "\N{EN DASH}"
"""A value that a run lacks."""
ALPHAS = """title => [...stagecast.board.charts].filter(c => c.u && c.title === title).flatMap(c =>
    c.shown.map((curve, i) => [curve.label, c.u.series[c.at[i]].alpha]))"""


def many(number: int, steps: int = 60, **options: Any) -> list[FakeRun]:
    """Runs of which only the first one is under way."""
    runs = [a_run(f"run-{index:02d}", seed=index, steps=steps, **options) for index in range(number)]
    for run in runs[1:]:
        run.run |= {"status": "finished", "commands": False}
    return runs


def link(runs: list[FakeRun]) -> str:
    return "#" + "&".join(f"run={run.run['run_id']}" for run in runs)


def marks(page: Page) -> list[tuple[str, str | None]]:
    """Colour and pattern of each run in the legend."""
    read = "lines => lines.map(line => [line.getAttribute('stroke'), line.getAttribute('stroke-dasharray')])"
    return [(colour, dash) for colour, dash in page.locator("#compared line").evaluate_all(read)]


def distance(a: str, b: str) -> float:
    """Between two colours ``#rrggbb``, weighted as by T. Riemersma's "redmean": 0 to 765."""
    (r, g, blue), (r2, g2, blue2) = ([int(one[at : at + 2], 16) for at in (1, 3, 5)] for one in (a, b))
    mean = (r + r2) / 2
    parts = (2 + mean / 256) * (r - r2) ** 2, 4 * (g - g2) ** 2, (2 + (255 - mean) / 256) * (blue - blue2) ** 2
    return float(sum(parts) ** 0.5)


def test_runs_are_compared(show: Show) -> None:
    """Ticked runs share the charts, each with a colour and a pattern; the address restores the choice."""
    page = show(*(a_run(f"run-{index}", seed=index) for index in range(3)))
    page.get_by_label("Compare run-1").check()
    page.get_by_label("Compare run-2").check()
    expect(page.locator("#compared .name")).to_have_text(["run-0", "run-1", "run-2"])
    assert len({colour for colour, _ in marks(page)}) == len({dash for _, dash in marks(page)}) == 3
    fragment = page.url.partition("#")[2]
    assert fragment == "run=run-0&run=run-1&run=run-2"
    again = show.visits(show.server.url, f"#{fragment}")
    expect(again.locator("#compared li")).to_have_count(3)
    again.get_by_role("button", name="Show the tables of run-2").click()
    expect(again.locator("#run-name")).to_have_text("run-2")
    page.get_by_label("Compare run-1").uncheck()
    expect(page.locator("#compared .name")).to_have_text(["run-0", "run-2"])
    page.wait_for_function(f"() => ({ALPHAS})('Gradient norm').map(([label]) => label).join() === 'run-0,run-2'")


def test_the_comparison_shows_all_runs_and_stays_current(show: Show) -> None:
    """Whichever run has news; a run that is not compared any more leaves it."""
    runs = [a_run(f"run-{index}", seed=index) for index in range(3)]
    runs[0].run["status"] = "finished"  # the focused one has no news of its own
    page = show(*runs, fragment="#run=run-0&run=run-1&run=run-2")
    rows = page.locator("#validation-table tbody tr").filter(has_text="val_loss").filter(has_text="default")
    expect(rows).to_have_count(3)
    expect(rows.nth(2).locator("td").nth(3)).to_have_text("500")
    show.server.train(runs[2], 400)
    expect(rows.nth(2).locator("td").nth(3)).to_have_text("1,000")
    page.get_by_label("Compare run-1").uncheck()
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text("run-2")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_twenty_runs_have_twenty_colours_and_no_patterns(scheme: str, show: Show) -> None:
    """A run's own colour and name win. The legend is there once, and a small part of the screen."""
    runs = many(20)
    runs[3].run |= {"label": "the third", "colour": "#123456"}
    page = show(*runs, fragment=link(runs), options={"color_scheme": scheme})
    expect(page.locator("#compared .name")).to_have_count(20)
    expect(page.locator("#compared .name").nth(3)).to_have_text("the third")
    found = marks(page)
    assert {dash for _, dash in found} == {None}
    colours = [colour for colour, _ in found]
    assert colours[3] == "#123456"
    assert min(distance(a, b) for at, a in enumerate(colours) for b in colours[:at] if "#123456" not in (a, b)) > 45
    expect(page.locator("#training .legend button")).to_have_text([])
    box = page.locator("#compared").bounding_box()
    assert box
    assert box["height"] < 110
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert axe(page) == []
    if scheme == "light":  # a file has no legend above it
        page.wait_for_function(f"() => ({ALPHAS})('Loss').length === 20")
        with page.expect_download() as download:
            choose(page, "Loss", "Save SVG")
        text = download.value.path().read_text()
        assert [run.run["run_id"] for run in runs[4:] if f">{run.run['run_id']}<" not in text] == []


def test_only_runs_that_may_have_news_are_connected(show: Show) -> None:
    """The others are read once, until the list shows news of them; one whose tables are shown is connected."""
    runs = many(9)
    page = show(*runs, fragment=link(runs))
    expect(page.locator("#compared li[data-key]")).to_have_count(9)
    page.wait_for_function("() => stagecast.shownRuns().every(({ store }) => store.isLoaded)")
    assert [len(run.hellos) for run in runs] == [1] + [0] * 8
    page.get_by_label("Tables of").select_option("run-04")
    expect(page.locator("#run-name")).to_have_text("run-04")
    page.wait_for_function("() => stagecast.focus().connection.state === 'open'")
    assert [len(run.hellos) for run in runs] == [1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert runs[4].hellos[0]["since"] == runs[4].cursor  # it is not sent twice
    runs[7].attempt, runs[7].run = 2, runs[7].run | {"status": "running", "attempt": 2}
    page.wait_for_function(
        "() => { const { store } = stagecast.open.get('run-07'); return store.run.status === 'running'; }"
    )
    assert len(runs[7].hellos) == 1


def test_the_legend_highlights_and_hides_a_run_in_all_charts(show: Show) -> None:
    """By mouse and by keyboard; the line under the mouse does the same."""
    runs = many(8)
    for run in runs:  # noisy lines, far from each other
        base = 10 * int(run.run["run_id"][-2:])
        curve([base + (at % 2) for at in range(60)], run, "x/level")
    page = show(*runs, fragment=link(runs))
    entry = page.locator("#compared").get_by_role("button", name="run-03")
    page.wait_for_function(f"() => ({ALPHAS})('Gradient norm').length === 8")
    entry.hover()
    others = [[f"run-{at:02d}", 1 if at == 3 else 0.2] for at in range(8)]
    assert page.evaluate(ALPHAS, "Gradient norm") == others
    page.mouse.move(0, 0)
    assert all(alpha == 1 for _, alpha in page.evaluate(ALPHAS, "Gradient norm"))
    entry.focus()
    assert page.evaluate(ALPHAS, "Gradient norm") == others
    entry.press("Enter")
    expect(entry).to_have_attribute("aria-pressed", "false")
    assert page.url.endswith("&hide=run%3Arun-03")
    for title in ("Loss", "Gradient norm"):
        page.wait_for_function(f"() => !({ALPHAS})('{title}').some(([label]) => label.startsWith('run-03'))")
    entry.press("Enter")
    page.wait_for_function(f"() => ({ALPHAS})('Gradient norm').length === 8")
    entry.blur()

    chart = page.locator("#metrics .chart").filter(has_text="x/level")
    chart.scroll_into_view_if_needed()
    expect(chart.locator("canvas")).to_be_visible()
    over = chart.locator(".u-over")
    left, top = chart.evaluate("one => [one.chart.u.valToPos(30, 'x'), one.chart.u.valToPos(50.5, 'y')]")
    over.hover(position={"x": left, "y": top})
    lit = page.locator("#compared [data-lit]")
    expect(lit).to_have_count(1)
    expect(lit).to_contain_text("run-05")
    assert [label for label, alpha in page.evaluate(ALPHAS, "x/level") if alpha == 1] == ["run-05"]
    tip = chart.locator(".tip li")
    expect(tip.first).to_contain_text("run-07")  # as the lines lie
    expect(chart.locator(".tip .lit")).to_have_text(re.compile(r"run-05\s*5[01]$"))
    page.mouse.move(0, 0)
    expect(lit).to_have_count(0)
    expect(chart.locator(".tip")).to_be_hidden()


def test_a_page_draws_2000_series_at_most_and_reports_the_others(show: Show) -> None:
    """A filter leads to the others."""
    names = [f"m/{index:03d}" for index in range(320)]
    runs = many(7, steps=2, extra=names)
    page = show(*runs, fragment=link(runs))
    for _ in range(3):
        page.get_by_role("button", name="Show more").click()
    said = page.locator("#series-left-out")
    expect(said).to_have_text(re.compile(r"^(1,99\d|2,000) of 2,\d\d\d series are drawn; choose fewer runs or filter"))
    drawn, wanted = (int(one.replace(",", "")) for one in re.findall(r"[\d,]+(?= )", said.inner_text())[:2])
    series = (
        "() => [...stagecast.board.charts].reduce((sum, chart) => sum + chart.curves().filter(c => c.run).length, 0)"
    )
    assert page.evaluate(series) == drawn <= 2000 < wanted
    page.get_by_label("Filter metrics").fill("m/31")
    expect(said).to_be_hidden()
    expect(page.locator("#metrics .chart")).to_have_count(10)


# ------------------------------------------------------------------------------------------- the comparison's tables


SWEEP: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "a": ({"lr": 0.1, "optimizer": "adam"}, {"val_loss": 0.5, "val_accuracy": 0.8, "odd": 1.0, "same": 2.0}),
    "b": ({"lr": 0.01, "optimizer": "adam"}, {"val_loss": 0.3, "val_accuracy": 0.9, "odd": 2.0, "same": 2.0}),
    "c": ({"lr": 0.001, "optimizer": "sgd"}, {"val_loss": 0.3, "val_accuracy": 0.7}),
    "d": ({"lr": 1e-5, "optimizer": "sgd", "clip": True}, {"val_loss": math.nan, "val_accuracy": 0.6}),
    "e": ({"lr": 0.05, "optimizer": "lion"}, {"val_accuracy": 0.65}),
}
"""Hyperparameters and final metrics of some runs: with a tie, a NaN, and missing values."""


def tell_sweep(folder: Path) -> None:
    for name, (config, metrics) in SWEEP.items():
        told = Told(folder / name, name)
        tell = told.story
        mode = {"best": "odd", "best_mode": "min" if name == "a" else "max"} if "odd" in metrics else {}
        told.write(tell.started(config={"width": 8, **config}, max_steps=4, **mode), tell.step(2.0))
        for factor in (2.0, 1.0):  # the last value is the best one, but for accuracy
            told.write(tell.step(1.0))
            if "val_loss" in metrics:
                told.write(tell(ValEpochEnded, loss=factor * metrics["val_loss"]))
            told.write(tell.metrics(**{key: factor * value for key, value in metrics.items() if key != "val_loss"}))
        told.write(tell.ended())
        told.let_go()


@pytest.fixture
def sweep(tmp_path: Path, serve: Serve, visit: Any) -> Any:
    """Open the page of a real server with the runs of `SWEEP` over each other; the fragment may have more settings."""
    tell_sweep(tmp_path)
    server = serve(RunsOfFolder(tmp_path))

    def start(settings: str = "", **options: Any) -> Page:
        page: Page = visit(server.url, "#" + "&".join(f"run={name}" for name in SWEEP) + settings, **options)
        expect(page.locator(".comparison tbody tr")).not_to_have_count(0)
        return page

    return start


def cells(page: Page) -> list[list[str]]:
    """The table of results, with its heads."""
    read = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    rows = page.locator("#compare tr").evaluate_all(read)
    return [[" ".join(cell.split()) for cell in row] for row in rows]


def test_the_comparison_has_what_differs_and_marks_the_best(sweep: Any) -> None:
    """By the direction in the head of each metric; ties, NaN, missing values and runs that disagree are shown."""
    page = sweep("&metric=val_loss")
    head, *rows = cells(page)
    assert head[:4] == ["Run", "lr", "clip", "optimizer"]
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(table) == ["b", "c", "a", "d", "e"]  # the best first; those without a number last
    assert {"width", "module"}.isdisjoint(head)
    assert [table[name]["val_loss ↓"] for name in table] == ["★ 0.3 tie of 2", "★ 0.3 tie of 2", "0.5", "NaN", NONE]
    assert table["b"]["val_accuracy ↑"] == "★ 1.8"
    assert [table[name]["odd"] for name in "ab"] == ["1", "4"]  # one run wants the least, one the greatest
    assert [table[name]["same ↑"] for name in "abc"] == ["4", "4", NONE]
    assert [table[name]["clip"] for name in "ad"] == [NONE, "true"]
    assert [table[name]["lr"] for name in "ad"] == ["0.1", "1e-5"]
    caption = page.locator("#compare caption").inner_text()
    assert "Lower is better: val_loss" in caption
    assert "Higher is better: val_accuracy" in caption
    assert "No winner, because the runs disagree on what is better: odd." in caption
    page.get_by_label("Value", exact=True).select_option("last")
    assert {row[0]: row[cells(page)[0].index("val_accuracy ↑")] for row in cells(page)[1:]}["b"] == "★ 0.9"
    page.get_by_role("button", name="Order by val_accuracy: higher is better").press("Enter")
    assert [row[0] for row in cells(page)[1:]] == ["b", "a", "c", "e", "d"]
    assert page.url.endswith("&value=last&metric=val_accuracy")
    page.reload()
    expect(page.locator("#compare th[aria-sort=descending]")).to_contain_text("val_accuracy")


def test_a_hyperparameter_is_drawn_against_a_metric(sweep: Any) -> None:
    """On a logarithmic scale by its data, or by category; runs without a number are counted, arrow keys read them."""
    page = sweep("&metric=val_loss&parameter=lr")
    places = "dots => Object.fromEntries(dots.map(dot => [dot.dataset.key.slice(4), dot.cx.baseVal.value]))"
    found = page.locator(".scatter circle").evaluate_all(places)
    assert set(found) == {"a", "b", "c"}
    assert found["a"] - found["b"] == pytest.approx(found["b"] - found["c"], abs=0.1)  # a factor of ten each
    expect(page.locator(".scatter + p")).to_have_text(
        "Logarithmic: lr. Not shown: 2 of 5 runs without lr or a finite val_loss."
    )
    page.locator(".scatter").press("Home")
    page.locator(".scatter").press("ArrowRight")
    expect(page.locator("#announcer")).to_have_text("b: lr 0.01, val_loss 0.3")
    expect(page.locator("#compare tr[data-lit] th")).to_have_text("b")
    page.get_by_label("Hyperparameter", exact=True).select_option("optimizer")
    page.get_by_label("Metric", exact=True).select_option("val_accuracy")
    found = page.locator(".scatter circle").evaluate_all(places)
    assert found["a"] == found["b"] < found["e"] < found["c"] == found["d"]  # by their names
    assert page.url.endswith("&metric=val_accuracy&parameter=optimizer")


def drag(page: Page, axis: str, start: float, end: float) -> None:
    """Select a part of an axis, in shares of it from its top."""
    box = page.locator(f".axis[aria-label='Selected part of {axis}'] .overlay").bounding_box()
    assert box
    x = box["x"] + box["width"] / 2
    page.mouse.move(x, box["y"] + start * box["height"])
    page.mouse.down()
    page.mouse.move(x, box["y"] + end * box["height"], steps=4)
    page.mouse.up()


def test_a_selection_on_axes_leads_to_its_runs(sweep: Any) -> None:
    """By mouse and by keyboard; it is in the link, and its runs can be laid over each other alone."""
    page = sweep("&metric=val_accuracy")
    page.locator(".parallel").scroll_into_view_if_needed()
    expect(page.locator(".parallel .lines g")).to_have_count(5)
    drag(page, "lr", 0.4, -0.05)
    expect(page.locator("#compare [role=status]")).to_have_text("3 of 5 runs selected")
    selected = page.locator("#compare tbody tr:not(.beside) th")
    expect(selected).to_have_text(["b", "a", "e"])
    expect(page.locator(".parallel .lines .beside")).to_have_count(2)
    expect(page.locator(".scatter .beside")).to_have_count(2)
    drag(page, "optimizer", 0.6, 1.05)
    expect(selected).to_have_text(["b", "a"])
    page.reload()
    expect(page.locator("#compare [role=status]")).to_have_text("2 of 5 runs selected")
    axis = page.locator(".axis[aria-label='Selected part of optimizer']")
    expect(axis).to_have_attribute("aria-valuetext", "adam")
    axis.press("Escape")
    expect(page.locator("#compare [role=status]")).to_have_text("3 of 5 runs selected")
    lr = page.locator(".axis[aria-label='Selected part of lr']")
    lr.press("Escape")
    expect(page.locator("#compare [role=status]")).to_be_empty()
    lr.press("ArrowUp")  # the lower end rises by a twentieth of the axis
    expect(page.locator("#compare [role=status]")).to_have_text("4 of 5 runs selected")
    expect(page.locator("#announcer")).to_have_text(re.compile(r"^lr: .* to .*, 4 of 5 runs$"))
    expect(lr).to_be_focused()
    page.get_by_role("button", name="Lay them over each other").click()
    expect(page.locator("#compared .name")).to_have_text(["b", "a", "c", "e"])
    page.get_by_role("button", name="Clear the selection").click()
    assert page.url.endswith("run=b&run=a&run=c&run=e&metric=val_accuracy")


def test_a_highlighted_run_is_highlighted_everywhere(sweep: Any) -> None:
    """Whichever part of the page the mouse is over, and the run is named."""
    page = sweep("&metric=val_accuracy")
    page.locator(".parallel").scroll_into_view_if_needed()
    for place in (
        ".scatter circle[data-key='run:b']",
        "#compare tr[data-key='run:b'] th",
        "#compared [data-key='run:b'] .run",
    ):
        page.mouse.move(0, 0)
        expect(page.locator("[data-lit]")).to_have_count(0)
        page.locator(place).hover()
        expect(page.locator("[data-key][data-lit]")).to_have_count(4)
        expect(page.locator(".parallel [data-lit]")).to_have_attribute("data-key", "run:b")
        expect(page.locator(".lit-run")).to_have_text(f"b: lr 0.01 · clip {NONE} · optimizer adam · val_accuracy 1.8")
    page.locator("#compared [data-key='run:b'] .run").click()
    expect(page.locator(".scatter .beside")).to_have_attribute("data-key", "run:b")


def test_all_runs_that_the_table_shows_are_compared(sweep: Any) -> None:
    """The filter's runs without the hidden ones; a selection of them leads to the charts."""
    page = sweep("&table=1&compare=1&where=val_accuracy+%3E+0.62&hide-run=c&metric=val_accuracy", loaded=False)
    names = page.locator("#table .comparison tbody th")
    expect(names).to_have_text(["b", "a", "e"])
    page.locator(".scatter").press("Home")
    expect(page.locator(".lit-run")).to_have_text("b: lr 0.01 · optimizer adam · val_accuracy 1.8")
    page.locator(".axis[aria-label='Selected part of optimizer']").press("ArrowDown")
    expect(page.locator(".comparison [role=status]")).to_have_text("3 runs selected")
    for _ in range(8):
        page.locator(".axis[aria-label='Selected part of optimizer']").press("ArrowDown")
    expect(page.locator(".comparison [role=status]")).to_have_text("2 of 3 runs selected")
    page.get_by_role("button", name="Lay them over each other").click()
    expect(page.locator("#compared .name")).to_have_text(["b", "a"])
    page.go_back()
    expect(names).to_have_count(3)
    page.locator("#table .all > summary").click()
    expect(names).to_have_count(0)


def test_a_report_has_the_comparison_without_a_server(tmp_path: Path, visit: Any) -> None:
    tell_sweep(tmp_path / "runs")
    write_report([tmp_path / "runs"], tmp_path / "out.html")
    page: Page = visit((tmp_path / "out.html").as_uri(), "#metric=val_accuracy")
    expect(page.locator("#compare tbody th")).to_have_text(["b", "a", "c", "e", "d"])
    page.locator(".axis[aria-label='Selected part of lr']").press("ArrowUp")
    expect(page.locator("#compare [role=status]")).to_have_text("4 of 5 runs selected")
    expect(page.locator(".scatter circle")).to_have_count(5)
    page.get_by_role("button", name="Lay them over each other").click()
    expect(page.locator("#compared .name")).to_have_text(["b", "a", "c", "e"])


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1440)])
def test_the_comparison_is_accessible_and_does_not_scroll_sideways(scheme: str, width: int, sweep: Any) -> None:
    page = sweep("&range=0.0001~1:lr", color_scheme=scheme, viewport={"width": width, "height": 844})
    expect(page.locator("#compare [role=status]")).to_have_text("4 of 5 runs selected")
    assert axe(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
