"""Runs over each other on the page, in a real browser."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from live.page_server import FakeRun
from live.page_show import Show, a_run, curve, first_chart
from live.page_visits import axe
from playwright.sync_api import Page, expect

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
    expect(first_chart(page).locator("canvas")).to_be_visible()
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
