"""The page, the table, the comparison and a report by keyboard alone, and as axe sees them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")
from live.kit import Told
from live.page_server import FakeRun, PageServer
from live.page_visits import Visits, axe
from playwright.sync_api import Page, expect

from sinks.live.report import write_report


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    """Three runs under way, with everything that a page shows."""
    runs = [FakeRun(f"run-{index}", seed=index, extra=["m/a", "m/b"]) for index in range(3)]
    for run in runs:
        run.advance(300)
        run.furnish()
    started = PageServer(runs).start()
    yield started
    started.stop()


@pytest.fixture
def report(tmp_path: Path) -> str:
    """The address of a report of two runs, with notes."""
    paths = []
    for number in range(2):
        told = Told(tmp_path / f"run{number}", f"run{number}")
        tell = told.story
        told.write(tell.started(command_line="python train.py", git_commit="0123456789" * 4, config={"lr": number}))
        told.write(*(event for _ in range(20) for event in (tell.step(1.0), tell.metrics(val_loss=2.0 + number))))
        told.let_go()
        (told.path / "notes.json").write_text('{"note": "A line", "tags": ["baseline"]}')
        paths.append(told.path)
    write_report(paths, tmp_path / "out.html", title="Rates", notes="Which is better?")
    return (tmp_path / "out.html").as_uri()


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1440)])
def test_axe_finds_nothing(scheme: str, width: int, server: PageServer, report: str, visit: Visits) -> None:
    """On a phone and a desk: one run, several, the table, and a report with its table; none scrolls sideways."""
    options = {"viewport": {"width": width, "height": 850}, "color_scheme": scheme}
    pages = {where: visit(where, **options) for where in (server.url, report)}
    for address, shown in (
        (server.url, "#training"),
        (f"{server.url}#run=run-0&run=run-1&run=run-2", "#compare table"),
        (f"{server.url}#table=1", "#table tbody tr >> nth=2"),
        (report, "#origins table"),
        (f"{report}#table=1", "#table tbody tr >> nth=1"),
    ):
        page = pages[address.partition("#")[0]]
        page.goto(address)
        page.reload()
        expect(page.locator(shown)).to_be_visible()
        assert axe(page) == [], address
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address


def tab_to(page: Page, selector: str, most: int = 80) -> None:
    """Press Tab until an element has the focus, which must be visible."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            style = "one => (({ outlineStyle, outlineWidth }) => [outlineStyle, outlineWidth])(getComputedStyle(one))"
            outline, wide = page.locator(":focus").evaluate(style)
            assert outline != "none", selector
            assert float(wide.removesuffix("px")) >= 1, selector
            return
    pytest.fail(f"{most} tabs do not reach {selector}")


def test_the_main_tasks_need_only_a_keyboard(server: PageServer, visit: Visits) -> None:
    """Choose runs, hide a line, zoom, ask before a stop, pause, sort and filter the table; the focus is visible."""
    page = visit(server.url)
    expect(page.locator("#training canvas").first).to_be_visible()
    tab_to(page, "#pause")
    page.keyboard.press("Enter")
    expect(page.locator("#pause")).to_have_text("Resume")
    tab_to(page, "#stop")
    page.keyboard.press("Enter")
    expect(page.locator("#stop-cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_focused()

    tab_to(page, "[aria-label='Compare run-1']")
    page.keyboard.press("Space")
    expect(page.locator("#compared .run")).to_have_count(2)
    tab_to(page, "#compared .run")
    page.keyboard.press("Enter")
    expect(page.locator("#compared .run[aria-pressed=false]")).to_have_count(1)
    assert "hide=run" in page.url
    page.keyboard.press("Enter")

    tab_to(page, "#training .plot")
    for key in ("Home", "Shift+ArrowRight", "Shift+ArrowRight", "+"):
        page.keyboard.press(key)
    expect(page.locator("#announcer")).to_contain_text("Charts show step ")
    expect(page).to_have_url(re.compile("zoom="))
    before = page.url
    page.keyboard.press("+")
    expect(page).not_to_have_url(before)
    page.keyboard.press("-")
    expect(page).to_have_url(before)
    page.keyboard.press("-")
    expect(page).not_to_have_url(re.compile("zoom="))

    page.keyboard.press("Alt+t")
    expect(page.locator("#table tbody tr").nth(2)).to_be_visible()
    tab_to(page, "#table thead .sort")
    page.keyboard.press("Enter")
    expect(page.locator("#table thead th").filter(has=page.locator(":focus"))).to_have_attribute(
        "aria-sort", re.compile("ascending|descending")
    )
    page.keyboard.press("Shift+Tab")
    page.locator("#skip").evaluate("document.activeElement.blur()")
    tab_to(page, "#table input[type=search]")
    page.keyboard.type("run-1")
    expect(page.locator("#table tbody tr[data-run]")).to_have_count(1)
