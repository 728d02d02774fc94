"""The link to a page, with its token in the fragment: who prints it, and how a browser uses it."""

from __future__ import annotations

import importlib
import socket
import sys
from typing import Any

import anyio
import anyio.from_thread
import pytest
from live.kit import Serve, Told

from events import notice
from sinks.live.runs import RunsOfFolder
from sinks.live.server import link_to
from trainer.errors import ConnectError
from trainer.remote.connect import connect

TOKEN = "corr&ct+horse%20#battery="


def test_a_link_escapes_its_token_and_names_this_machine() -> None:
    """The address of all interfaces would lead nowhere from another machine."""
    assert link_to("http://127.0.0.1:1/", None) == "http://127.0.0.1:1/"
    assert link_to("http://127.0.0.1:1/", "a&b+c%#=") == "http://127.0.0.1:1/#token=a%26b%2Bc%25%23%3D"
    for everywhere in ("0.0.0.0", "[::]"):
        assert link_to(f"http://{everywhere}:1/", "t") == f"http://{socket.gethostname()}:1/#token=t"


def test_a_notice_has_no_secret_where_it_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launched run's stderr is a file in its folder. A closed stream is not an error."""
    notice.notify("with a secret", "without")
    monkeypatch.setattr(notice, "is_kept", True)
    notice.notify("with a secret", "without")
    assert capsys.readouterr().err == "stagecast: with a secret\nstagecast: without\n"
    monkeypatch.setattr(sys, "stderr", None)
    notice.notify("with a secret", "without")


def test_the_printed_link_opens_the_page(told: Told, serve: Serve, visit: Any) -> None:
    """The token leaves the address bar at once, is in no request's address, and lasts as long as the tab."""
    expect = importlib.import_module("playwright.sync_api").expect
    told.start(3)
    server = serve(RunsOfFolder(told.path), token=TOKEN)
    page = visit(server.link + "&log=1")
    assert page.url == server.url + "#log=1&run=demo" or page.url == server.url + "#run=demo&log=1"
    expect(page.locator("#tiles dd").first).to_contain_text("3")
    page.reload()
    expect(page.locator("#content")).to_be_visible()
    visit.may_lose_server = True  # the browser reports the 401
    page.goto(server.url + "#token=another-one")
    expect(page.locator("#token-dialog")).to_be_visible()
    page.goto(server.link)
    expect(page.locator("#content")).to_be_visible()
    expect(page.locator("#token-dialog")).to_be_hidden()
    assert not [url for url in visit.requests if "token" in url or "battery" in url or "another" in url]


def test_connect_accepts_the_printed_link(told: Told, serve: Serve) -> None:
    """With the run beside the token, or without; the token is in no message."""
    told.start(3)
    server = serve(RunsOfFolder(told.path), token=TOKEN)

    async def name(url: str) -> str:
        async with connect(url) as run:
            return run.run_id

    with anyio.from_thread.start_blocking_portal() as portal:  # on a thread: the browser's loop may be in this one
        assert [portal.call(name, server.link + more) for more in ("", "&run=demo")] == ["demo", "demo"]
    for url in ("ftp://h/#token=s3cret-token", "http://h:port/#run=x&token=s3cret-token"):
        with pytest.raises(ConnectError) as caught:
            connect(url)
        assert "s3cret" not in str(caught.value)
