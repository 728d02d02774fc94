"""Visits of made-up servers, and runs for them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from live.page_server import FakeRun, PageServer
from live.page_visits import Visits
from playwright.sync_api import Locator, Page, expect


class Show:
    """Visits of a made-up server."""

    server: PageServer

    def __init__(self, visits: Visits, servers: contextlib.ExitStack) -> None:
        self.visits = visits
        self._servers = servers

    def __call__(self, *runs: FakeRun, fragment: str = "", options: Any = None, **server: Any) -> Page:
        """Serve runs, and open the page; ``options`` are those of `Visits`."""
        self.server = PageServer(list(runs), **server).start()
        self._servers.callback(self.server.stop)
        return self.visits(self.server.url, fragment, **(options or {}))

    def focus(self, page: Page, run_id: str, settings: str = "") -> None:
        """Change the run that the open page shows."""
        page.goto(f"{self.server.url}#run={run_id}{settings}")
        expect(page.locator("#run-name")).to_have_text(run_id)


def a_run(run_id: str = "demo", steps: int = 600, **options: Any) -> FakeRun:
    run = FakeRun(run_id, **options)
    if steps:
        run.advance(steps)
        run.furnish()
    return run


def curve(values: Sequence[float | str], run: FakeRun | None = None, name: str = "train_loss") -> FakeRun:
    """Give a run, or a new one, a series of values."""
    run = run or a_run(steps=0)
    for step, value in enumerate(values, 1):
        run.run["global_step"] = step
        run.clock += 1
        run.point({}, name, value)
    return run


def first_chart(page: Page) -> Locator:
    return page.locator("#training .chart").first


def choose(page: Page, title: str, option: str) -> None:
    """Choose from the menu of a chart."""
    page.get_by_role("button", name=f"Options of {title}", exact=True).click()
    page.locator("#chart-menu").get_by_text(option, exact=True).click()
    page.keyboard.press("Escape")
    expect(page.locator("#chart-menu")).to_be_hidden()


def expect_step(page: Page, text: str) -> None:
    expect(page.locator("#tiles dd").first).to_contain_text(text)
