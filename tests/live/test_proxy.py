"""The page behind a real nginx: with the guide's configuration, with a minimal one, and with one that buffers."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live.kit import Serve, Told, Watcher, watch
from support.threads import wait_until

pytest.importorskip("playwright.sync_api")
from live.page_visits import Visits
from playwright.sync_api import expect

from sinks.live.runs import RunsOfFolder

GUIDE = (Path(__file__).parent.parent.parent / "sinks" / "README.md").read_text()
NGINX = re.findall(r"^```nginx\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)[0]
CONFIG = """
daemon off; pid {folder}/pid; error_log stderr; {user}
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; {locations} }}
}}
"""
BARE = "location /live/ { proxy_pass http://127.0.0.1:8765/; }"


def is_up(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code > 0
    return False


@pytest.fixture
def proxy(nginx: str, tmp_path: Path) -> Iterator[Callable[[str, str], str]]:
    """Start nginx in front of a server; return the page's address, once it answers."""
    started: list[subprocess.Popen[bytes]] = []

    def start(locations: str, url: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        folder = tmp_path / f"nginx-{port}"
        folder.mkdir()
        here = locations.replace("127.0.0.1:8765", url.split("/")[2])
        user = "user root;" if tmp_path.owner() == "root" else ""
        (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port, locations=here, user=user))
        started.append(subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.PIPE))
        address = f"http://127.0.0.1:{port}/live/"
        wait_until(lambda: is_up(address))
        return address

    yield start
    for one in started:
        one.terminate()
        one.communicate(timeout=10)


@pytest.fixture
def served(told: Told, serve: Serve) -> Any:
    """A server that takes commands, with a run that trains."""
    told.start(5)
    return serve(RunsOfFolder(told.path), commands=True)


@pytest.mark.parametrize("locations", [NGINX, BARE], ids=["readme", "bare"])
def test_the_page_works_behind_nginx(locations: str, served: Any, told: Told, proxy: Any, visit: Visits) -> None:
    """Below a path; without the Host header and without WebSocket, too: frames come, commands and notes are sent."""
    visit.may_lose_server = locations is BARE  # a WebSocket that does not get through
    url = proxy(locations, served.url)
    page = visit(url)
    told.write(*told.story.steps(3))
    expect(page.locator("#tiles dd").first).to_contain_text("8")
    told.write(*told.story.steps(3))
    expect(page.locator("#tiles dd").first).to_contain_text("11", timeout=3_000)
    page.click("#pause")
    expect(page.locator("#toast")).to_contain_text("takes effect at the next step")
    if locations is NGINX:
        noted = httpx.post(
            f"{url}api/runs/demo/notes", json={"note": "a line"}, headers={"origin": url.rsplit("/", 2)[0]}
        )
        assert noted.status_code == 200, noted.text
        assert httpx.get(f"{url}api/table").json()["rows"][0]["notes"]["note"] == "a line"
        with watch(url, origin=url.removesuffix("/live/")) as watched:
            watched.send(Watcher().hello())
            assert '"snapshot"' in watched.recv(timeout=10)


def test_a_proxy_that_buffers_the_stream_is_named(served: Any, told: Told, proxy: Any, visit: Visits) -> None:
    """The page polls instead, and names the setting."""
    visit.may_lose_server = True
    ignoring = "proxy_ignore_headers X-Accel-Buffering; proxy_buffers 8 1m; proxy_buffer_size 1m;"
    url = proxy(BARE.replace("{", "{ " + ignoring), served.url)
    page = visit(url, loaded=False)
    expect(page.locator("#banner")).to_contain_text("proxy_buffering off;", timeout=30_000)
    told.write(*told.story.steps(3))
    expect(page.locator("#tiles dd").first).to_contain_text("8")


def test_a_command_that_the_proxy_makes_look_foreign_names_the_setting(
    served: Any, proxy: Any, browser: Any, chromium: str
) -> None:
    """Without the Host header and without TLS: the browser sends nothing that shows whose page it is."""
    url = proxy(BARE, served.url).replace("127.0.0.1", "runs.example")
    mapped = browser.browser_type.launch(
        executable_path=chromium, args=["--host-resolver-rules=MAP runs.example 127.0.0.1"]
    )
    page = mapped.new_page()
    page.goto(url)
    expect(page.locator("#content")).to_be_visible(timeout=20_000)
    page.click("#pause")
    expect(page.locator("#toast")).to_contain_text("proxy_set_header Host $http_host;")
    mapped.close()


def test_a_name_that_the_proxy_passes_on_is_explained(served: Any, proxy: Any) -> None:
    """Instead of the page, a reader gets the requested name, and the option that allows it."""
    url = proxy(NGINX, served.url)
    answer = httpx.get(url, headers={"host": "runs.example", "accept": "text/html"})
    assert (answer.status_code, "'runs.example'" in answer.text) == (421, True)
    assert "--origin" in answer.text


def test_a_page_whose_files_are_missing_names_the_slash_that_its_address_lacks(
    served: Any, proxy: Any, visit: Visits
) -> None:
    """A location without its slash: all relative addresses lead nowhere."""
    visit.may_lose_server = True
    url = proxy("location /live { proxy_pass http://127.0.0.1:8765/; }", served.url)
    page = visit(url.removesuffix("/"), loaded=False)
    expect(page.locator(".unstyled")).to_be_visible()
    visit.problems.clear()  # the browser reports that the files are no scripts
    page.goto(url)
    expect(page.locator("#content")).to_be_visible()
    expect(page.locator(".unstyled")).to_be_hidden()
