"""Runs told by hand, servers that show them, browsers, and programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live.kit import Story, Told
from support.nursery import ROOT

from sinks.live.hub import Hub
from sinks.live.runs import OneRun
from sinks.live.server import Server, bind


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    one = Told(tmp_path / "runs" / "demo")
    yield one
    one.let_go()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Serve runs, or a single hub, on a thread, at a free port."""
    started: list[Server] = []

    def start(what: Any, host: str = "127.0.0.1", **options: Any) -> Server:
        runs = OneRun(what) if isinstance(what, Hub) else what
        server = Server(runs, bind(host, 0), host, **options)
        server.start()
        started.append(server)
        return server

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Its path."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and os.environ.get("CI"):
        pytest.fail("no chromium on the PATH: apt-get install -y chromium")
    return path or pytest.skip("no chromium on the PATH")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    playwright: Any = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def nginx() -> str:
    """Its path."""
    path = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
    if path is None and os.environ.get("CI"):
        pytest.fail("no nginx on the PATH: apt-get install -y nginx-light")
    return path or pytest.skip("no nginx on the PATH")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open the page: see `page_visits.Visits`."""
    from live.page_visits import Visits

    with Visits(browser) as visits:
        yield visits


@pytest.fixture
def show(browser: Any) -> Iterator[Any]:
    """Open the page of a made-up server: see `page_show.Show`."""
    from live.page_show import Show
    from live.page_visits import Visits

    with contextlib.ExitStack() as servers, Visits(browser) as visits:
        yield Show(visits, servers)


@pytest.fixture(autouse=True)
def _warm_starts(warm_starts: None) -> None:
    """Fork the programs of these tests."""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python in its own process, which ends with the test; it can import `support`."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(ROOT), str(tmp_path), os.path.join(ROOT, "tests")])
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"} | env
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, env=environment, **pipes))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()
