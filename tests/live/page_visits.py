"""Visits of the page in a real browser: the chromium on the PATH, driven by Playwright; axe-core comes from PyPI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

EVIL = "<script>alert(1)</script>"
_LOAD_FAILED = re.compile(r"Failed to load resource|WebSocket connection to .* failed")


class Visits:
    """Opens pages; the block ends with an error for each error in a console, and each request to another host."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.may_lose_server = False
        self._contexts: list[BrowserContext] = []
        self._hosts: set[str] = set()

    def __call__(self, url: str, fragment: str = "", *, loaded: bool = True, **options: Any) -> Page:
        options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        context = self._browser.new_context(**options)
        context.set_default_timeout(10_000)
        self._contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.problems.append(f"{error} {error.stack}"))
        page.on("console", lambda message: self._console(message.type, message.text))
        page.on("dialog", lambda dialog: self.problems.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda websocket: self.requests.append(websocket.url))
        self._hosts.add(_host(url))
        page.goto(url + fragment)
        if loaded:
            expect(page.locator("#content")).to_be_visible()
        return page

    def _console(self, kind: str, text: str) -> None:
        lost = self.may_lose_server and _LOAD_FAILED.search(text)
        if kind in ("error", "warning") and not lost:
            self.problems.append(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for context in self._contexts:
            context.close()
        assert self.problems == [], self.problems
        assert {_host(url) for url in self.requests if not url.startswith("data:")} <= self._hosts


def _host(url: str) -> str:
    return url.split("://", 1)[1].split("/", 1)[0]


def axe(page: Page) -> list[str]:
    """Violations of accessibility rules, each in a line."""
    package = pytest.importorskip("axe_playwright_python")
    script = Path(package.__file__).with_name("axe.min.js").read_text()
    session = page.context.new_cdp_session(page)  # the page's policy allows no foreign script
    session.send("Runtime.evaluate", {"expression": script})
    session.detach()
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations'], elementRef: false})")
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for one in found["violations"]
        for node in one["nodes"][:3]
    ]
