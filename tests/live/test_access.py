"""Who may see and command runs: safe defaults, and no path out of the run's folder."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import msgspec
import pytest
import rich.console
from live.kit import IMAGE, Serve, Told, Watcher, code_of, connect_websocket, port_of, read_until, watch
from websockets.exceptions import ConnectionClosed, InvalidStatus

from events.errors import SinkMisconfigured
from sinks import Live
from sinks.live import clients as clients_module
from sinks.live.access import Access, Refused, Request
from sinks.live.app import LiveApp
from sinks.live.client import Hello
from sinks.live.runs import RunsOfFolder
from sinks.live.server import Server, bind
from sinks.live.token import check_host, is_loopback

TOKEN = "correct-horse-battery"
SECRET = "this-must-not-be-seen"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "127.0.0.1.example.org", ""])
def test_an_address_that_others_can_reach_requires_a_token(host: str) -> None:
    """Also for a server that is built without the sink."""
    with pytest.raises(SinkMisconfigured, match="token"):
        check_host(host, None)
    check_host(host, TOKEN)
    with bind("127.0.0.1", 0) as listening, pytest.raises(SinkMisconfigured, match="token"):
        Server(RunsOfFolder(Path()), listening, host)


def test_a_port_that_cannot_be_served_raises_with_a_fix() -> None:
    with bind("127.0.0.1", 0) as listening:
        for port in (listening.getsockname()[1], 99_999):
            with pytest.raises(SinkMisconfigured, match=f":{port} cannot be served: .*; choose another port"):
                bind("127.0.0.1", port)


def test_an_address_may_have_brackets() -> None:
    with bind("[::1]", 0) as listening:
        server = Server(RunsOfFolder(Path()), listening, "[::1]")
        assert server.url == f"http://[::1]:{listening.getsockname()[1]}/"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1"])
def test_an_address_that_only_this_machine_can_reach_requires_no_token(host: str) -> None:
    """Such as the default."""
    assert is_loopback(host)
    check_host(host, None)
    assert is_loopback(Live().host)


@pytest.mark.parametrize("token", ["", "1234567", "pässwörter", "with blank in it", "line\nbreak-in-it"])
def test_a_weak_token_is_refused(token: str) -> None:
    """Empty, short, or one that fits no header; the error does not show it."""
    for build in (lambda: check_host("0.0.0.0", token), lambda: Access(token), lambda: Live(token=token).check()):
        with pytest.raises(SinkMisconfigured) as caught:
            build()
        assert not token or token not in str(caught.value)


def test_the_token_is_in_no_text() -> None:
    """Not in a representation of a description or a message; also not in rich's tracebacks."""
    live = Live(host="0.0.0.0", token=SECRET)
    console = rich.console.Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(live)
    shown = [repr(live), str(live), f"{live}", console.export_text(), repr(Access(SECRET)), repr(Hello(token=SECRET))]
    console.file.close()
    assert not any(SECRET in text for text in shown)


@pytest.fixture
def server(told: Told, serve: Serve) -> Server:
    tell = told.story
    told.write(tell.started(arguments={"lr": 0.1}), *tell.steps(3))
    return serve(RunsOfFolder(told.path), token=TOKEN, commands=True)


def get(server: Server, path: str, **options: Any) -> httpx.Response:
    return httpx.get(server.url + path, **options)


@pytest.mark.parametrize(
    "path", ["api/runs", "api/table", "api/runs/demo", "api/runs/demo/events", "api/runs/demo/journal"]
)
def test_without_the_token_nothing_is_served(server: Server, path: str) -> None:
    """Nor with a wrong one, nor with the right one in the address, where logs would have it."""
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        answer = get(server, path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert "demo" not in answer.text
    assert get(server, path, params={"token": TOKEN, "access_token": TOKEN}).status_code == 401


def test_with_the_token_everything_is_served(server: Server) -> None:
    answer = get(server, "api/runs/demo", headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json()["series"]["train_loss"]["step"] == [1, 2, 3]


@pytest.mark.parametrize("hello", [{}, {"token": None}, {"token": "wrong"}, {"token": TOKEN + "x"}, {"token": ""}])
def test_a_socket_without_the_token_is_closed(server: Server, hello: Any) -> None:
    """The first message has the token; nothing is sent before it."""
    with watch(server.url) as socket:
        socket.send(Watcher().hello(**hello))
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=10)
    assert code_of(caught) == 4401


def test_a_socket_that_does_not_start_with_a_hello_is_closed(server: Server) -> None:
    with watch(server.url) as socket:
        command = {"type": "command", "token": TOKEN, "command": {"command": "stop", "id": "1"}}
        socket.send(msgspec.json.encode(command).decode())
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)


def test_a_client_without_a_hello_is_disconnected(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `HELLO_S`."""
    monkeypatch.setattr(clients_module, "HELLO_S", 0.05)
    with watch(server.url) as socket, pytest.raises(ConnectionClosed):
        socket.recv(timeout=10)


def test_clients_without_a_hello_do_not_count_against_those_with_the_token(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the maximum, the oldest is disconnected."""
    clients = server._app._clients
    monkeypatch.setattr(clients, "most_expected", 2)
    monkeypatch.setattr(clients, "most", 1)
    with watch(server.url) as first, watch(server.url), watch(server.url):
        with pytest.raises(ConnectionClosed) as closed:
            first.recv(timeout=10)
        assert code_of(closed) == 1013
        with watch(server.url) as friend:
            friend.send(Watcher().hello(token=TOKEN))
            assert '"snapshot"' in friend.recv(timeout=10)


@pytest.mark.parametrize("since", ["abc", "-1", "1" * 23])
def test_an_invalid_cursor_is_refused(server: Server, since: str) -> None:
    answer = get(server, f"api/runs/demo/journal?since={since}", headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 400
    assert "since" in answer.json()["error"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", "https://ok.example.evil.example"]
)
def test_pages_of_other_sites_are_refused(server: Server, origin: str) -> None:
    """By WebSocket, which a browser opens to any site; and by HTTP, token or not."""
    with pytest.raises(InvalidStatus), watch(server.url, origin=origin):
        pass
    headers = {"origin": origin, "authorization": f"Bearer {TOKEN}"}
    assert get(server, "api/runs", headers=headers).status_code == 403


def test_the_own_origin_and_allowed_ones_are_accepted(told: Told, serve: Serve) -> None:
    told.start()
    server = serve(RunsOfFolder(told.path), origins=["https://ok.example/"])
    for origin in (server.url.rstrip("/"), "https://ok.example"):
        with watch(server.url, origin=origin) as socket:
            socket.send(Watcher().hello())
            assert '"snapshot"' in socket.recv(timeout=10)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", ""])
def test_a_foreign_host_name_is_refused(told: Told, serve: Serve, host: str) -> None:
    """DNS rebinding: a stranger's page uses its own name for this machine."""
    server = serve(RunsOfFolder(told.path))
    assert get(server, "", headers={"host": host}).status_code in (400, 421)
    assert get(server, "api/runs", headers={"host": host, "origin": f"http://{host}"}).status_code in (400, 403, 421)
    assert get(server, "api/runs", headers={"host": "localhost:1234"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8765", "sec-fetch-site": "same-origin"}, 202),  # nginx, without proxy_set_header Host
        ({"host": "127.0.0.1:8765", "sec-fetch-site": "same-site"}, 403),
        ({"host": "127.0.0.1:8765", "sec-fetch-site": "cross-site"}, 403),
        ({"host": "127.0.0.1:8765", "x-forwarded-host": "public.example"}, 202),  # Apache, Traefik
        ({"host": "127.0.0.1:8765", "x-forwarded-host": "other.example"}, 403),
        ({"host": "127.0.0.1:8765"}, 403),
        ({"host": "public.example"}, 202),
        ({"host": "public.example:443"}, 202),
        ({"host": "public.example:80"}, 403),
        ({"host": "evil.example", "x-forwarded-host": "127.0.0.1"}, 421),
    ],
)
def test_a_page_behind_a_proxy_is_the_servers_own(told: Told, headers: dict[str, str], status: int) -> None:
    """By headers that a page of another site cannot send; the refusal names the settings."""
    told.start()
    hosts = ["127.0.0.1", "public.example"]
    answer = ask(
        LiveApp(RunsOfFolder(told.path), Access(commands=True, hosts=hosts)),
        "POST",
        "/api/runs/demo/commands",
        {"origin": "https://public.example", "content-type": "application/json"} | headers,
        b'{"command":"pause","id":"1"}',
    )
    assert answer.status_code == status
    if status == 403:
        assert "proxy_set_header Host $http_host;" in answer.json()["error"]
        assert "origins=" in answer.json()["error"]
    if status == 421:
        assert "'evil.example'" in answer.json()["error"]
        assert "hosts=" in answer.json()["error"]


def test_an_allowed_origin_is_an_allowed_host_and_a_refused_browser_gets_a_sentence(told: Told, serve: Serve) -> None:
    """``stagecast watch --origin`` is enough behind a proxy."""
    told.start()
    server = serve(RunsOfFolder(told.path), origins=["https://runs.example:8443"])
    assert get(server, "", headers={"host": "runs.example:8443"}).status_code == 200
    answer = get(server, "", headers={"host": "other.example", "accept": "text/html,*/*"})
    assert (answer.status_code, answer.headers["content-type"]) == (421, "text/plain; charset=utf-8")
    assert answer.text.startswith("stagecast: this server does not answer to the name 'other.example'; ")
    assert "--origin" in answer.text


def ask(
    app: LiveApp, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> httpx.Response:
    """Send a request to the application itself, under trio."""

    async def asking() -> httpx.Response:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers, content=body)

    return anyio.run(asking, backend="trio")


class NotAuthenticated(Exception):
    """Like the ``HTTPException`` of FastAPI and Starlette."""

    status_code = 401
    detail = "log in first"
    headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Cookie"}


def sync_check(request: Request) -> bool:
    return request.cookies.get("user") == "ada"


async def async_check(request: Request) -> bool:
    await anyio.lowlevel.checkpoint()
    return request.headers.get("x-user") == "ada" or sync_check(request)


class ObjectCheck:
    async def __call__(self, request: Request) -> bool:
        return await async_check(request)


ADDRESSES = [
    *(
        "/",
        "/page/live.js",
        "/page/../page/live.js",
        "/api/runs",
        "/api/runs/",
        "/api/table",
        "/%61pi/runs",
        "/api%2Fruns",
        "//api/runs",
    ),
    *("/api/runs/demo", "/api/runs//demo", "/api/runs/d%65mo", "/api/runs/demo/events", "/api/runs/demo/journal"),
    *(
        "/api/runs/demo/media/a.png",
        "/api/runs/demo/commands",
        "/api/runs/demo/commands/",
        "/api/runs/demo/notes",
        "/no",
        "/api/runs/demo/ws",
    ),
]


@pytest.mark.parametrize("check", [sync_check, async_check, ObjectCheck(), lambda request: async_check(request)])
def test_a_check_of_the_host_guards_every_address(told: Told, check: Any) -> None:
    """Pages, runs, streams and commands, by any method and spelling of the address."""
    told.start()
    told.write(told.story.ended())
    told.let_go()
    (told.path / "media").mkdir()
    (told.path / "media" / "a.png").write_bytes(b"image")
    app = LiveApp(RunsOfFolder(told.path), Access(commands=True, check=check))
    for path in ADDRESSES:
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            answer = ask(app, method, path, {"cookie": "user=eve", "content-type": "application/json"})
            assert answer.status_code in (403, 404), (method, path)
            assert answer.status_code == 403 or "//" in path, (method, path)
            assert "demo" not in answer.text
    passed = {"cookie": "other=1; user=ada"}
    for path in ("/", "/page/live.js", "/api/runs", "/api/table", "/api/runs/demo", "/api/runs/demo/journal"):
        assert ask(app, "GET", path, passed).status_code == 200, path
        assert ask(app, "HEAD", path, passed).status_code in (200, 405), path


def test_a_check_sees_a_command_however_its_address_is_written(told: Told) -> None:
    told.start()
    app = LiveApp(RunsOfFolder(told.path), Access(commands=True, check=lambda request: not request.command))
    for path in (
        "demo/commands",
        "demo/commands/",
        "demo/commands%0A",
        "demo/commands%0a/",
        "demo//commands",
        "demo/notes",
    ):
        command = b'{"command":"pause","id":"1"}'
        answer = ask(app, "POST", f"/api/runs/{path}", {"content-type": "application/json"}, command)
        assert answer.status_code in (403, 404), path


@pytest.mark.parametrize("user", ["ada", "eve"])
def test_a_check_of_the_host_guards_websockets_and_each_command_on_them(
    told: Told, serve: Serve, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command by WebSocket is checked as a posted one."""
    asked: list[Request] = []

    def check(request: Request) -> bool:
        asked.append(request)
        return request.headers.get("x-user") == "ada" or (
            request.query_params.get("see") == "1" and not request.command
        )

    told.start()
    server = serve(RunsOfFolder(told.path), commands=True)
    monkeypatch.setattr(server._app, "_access", Access(commands=True, check=check))
    with pytest.raises(InvalidStatus) as refused, watch(server.url):
        pass
    assert refused.value.response.status_code == 403
    assert b"refuses" in refused.value.response.body
    address = server.url.replace("http", "ws") + "api/runs/demo/ws?see=1"
    with connect_websocket(address, additional_headers={"x-user": user}) as socket:
        socket.send(Watcher().hello())
        socket.send('{"type":"command","command":{"command":"pause","id":"p"}}')
        while (answer := Watcher().take(socket.recv(timeout=10)))["type"] not in ("sent", "refused"):
            pass
    assert (answer["type"], answer["id"]) == ("sent" if user == "ada" else "refused", "p")
    assert (asked[-1].method, asked[-1].path, asked[-1].run_id) == ("POST", "api/runs/demo/commands", "demo")
    assert asked[-1].client is not None
    assert asked[-1].client.host == "127.0.0.1"
    assert asked[1].method == "WEBSOCKET"
    assert not asked[1].command
    posted = httpx.post(
        server.url + "api/runs/demo/commands?see=1", json={"command": "pause", "id": "q"}, headers={"x-user": user}
    )
    assert posted.status_code == (202 if user == "ada" else 403)


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (False, 403, ""),
        (None, 403, "returned NoneType"),
        ("yes", 403, "returned str"),
        (1, 403, "returned int"),
        (ValueError("the session store is down"), 403, "the session store is down"),
        (StopIteration(), 403, "StopIteration"),
        (NotAuthenticated(), 401, ""),
        (Refused(401, "no session"), 401, ""),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_check_that_does_not_answer_true_refuses(
    told: Told, caplog: pytest.LogCaptureFixture, answer: Any, status: int, said: str, is_async: bool
) -> None:
    """An exception, or a value that is not a bool, is logged, and not shown to clients."""
    told.start()

    def check(request: Request) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def awaited(request: Request) -> Any:
        return check(request)

    app = LiveApp(RunsOfFolder(told.path), Access(check=awaited if is_async else check))
    refused = ask(app, "GET", "/api/runs")
    assert refused.status_code == status
    assert "store" not in refused.text
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)
    if isinstance(answer, NotAuthenticated):
        assert (refused.json()["error"], refused.headers["www-authenticate"]) == ("log in first", "Cookie")


@pytest.mark.anyio
async def test_a_slow_check_blocks_neither_the_event_loop_nor_the_threads_of_the_host(told: Told) -> None:
    """It has its own threads; an exhausted limiter of the host does not delay it."""
    told.start()
    go_on = threading.Event()

    def check(request: Request) -> bool:
        return go_on.wait(20)

    transport = httpx.ASGITransport(LiveApp(RunsOfFolder(told.path), Access(check=check)))  # type: ignore[arg-type]
    statuses: list[int] = []
    limiter = anyio.to_thread.current_default_thread_limiter()
    limiter.total_tokens = 1
    async with (
        limiter,
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client,
        anyio.create_task_group() as tasks,
    ):

        async def get_runs() -> None:
            statuses.append((await client.get("/api/runs")).status_code)

        for _ in range(3):
            tasks.start_soon(get_runs)
        await anyio.wait_all_tasks_blocked()  # the loop runs while the checks wait
        assert not statuses
        go_on.set()
    assert statuses == [200, 200, 200]


def test_a_server_takes_no_commands_by_default(told: Told, serve: Serve) -> None:
    """The page shows that, and no file is written for the run."""
    told.start()
    server, watcher = serve(RunsOfFolder(told.path)), Watcher()
    with watch(server.url) as socket:
        socket.send(watcher.hello())
        read_until(socket, watcher, lambda: "snapshot" in watcher.kinds)
        assert watcher.run["commands"] is False
        socket.send('{"type":"command","command":{"command":"stop","id":"x"}}')
        while (answer := watcher.take(socket.recv(timeout=10)))["type"] == "frame":
            pass
    assert (answer["type"], answer["id"]) == ("refused", "x")
    sent = httpx.post(server.url + "api/runs/demo/commands", json={"command": "stop", "id": "y"})
    assert (sent.status_code, sent.json()["type"]) == (403, "refused")
    assert not (told.path / "commands").exists()


def test_a_form_of_another_site_commands_nothing(server: Server, told: Told) -> None:
    """Requests that a browser sends without a preflight are refused: text, forms, other methods."""
    url, token = server.url + "api/runs/demo/commands", {"authorization": f"Bearer {TOKEN}"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        headers = token | {"content-type": kind}
        assert httpx.post(url, content=b'{"command":"stop","id":"1"}', headers=headers).status_code == 415
    assert httpx.get(url, headers=token).status_code == 405
    assert httpx.post(url, json={"command": "stop", "id": "1"}).status_code == 401
    assert httpx.post(url, json={"command": "explode", "id": "1"}, headers=token).status_code == 409
    assert httpx.post(url, json={"pad": "x" * 100_000}, headers=token).status_code == 413
    assert not (told.path / "commands").exists()
    assert httpx.post(url, json={"command": "stop", "id": "1"}, headers=token).json() == {"type": "sent", "id": "1"}
    assert len(list((told.path / "commands").iterdir())) == 1


@pytest.fixture
def folder(told: Told) -> Path:
    """A run with an image, and secrets in it, beside it and above it."""
    told.start()
    path = told.path
    media = path / "media"
    (media / "sub").mkdir(parents=True)
    (media / "ok.png").write_bytes(IMAGE)
    (media / "sub" / "ä b.png").write_bytes(IMAGE + b"other")
    for secret in (path / "s.png", path.parent / "s.png", path.parent.parent / "s.png"):
        secret.write_text(SECRET)
    (media / "link.png").symlink_to(path / "s.png")
    (media / "far").symlink_to(path.parent)
    (media / "loop.png").symlink_to(media / "loop.png")
    (media / "no.txt").write_text(SECRET)
    (media / "folder.png").mkdir()
    os.mkfifo(media / "pipe.png")
    return path


WAYS = [
    *("..", "../s.png", "../../s.png", "../../../s.png", "sub/../../s.png", "./../s.png", "media/../../s.png"),
    *("%2e%2e/s.png", "..%2fs.png", "%2e%2e%2f%2e%2e%2fs.png", "..%252fs.png", "..%5cs.png", "%c0%ae%c0%ae/s.png"),
    *("/etc/passwd.png", "//s.png", "%2fetc%2fpasswd", "%2Fetc%2Fhostname.png", "ok.png%00.png", "%00.png", "%ff.png"),
    *("link.png", "far/s.png", "far/../s.png", "loop.png", "loop.png/x.png", "no.txt", "folder.png", "pipe.png"),
    *("", ".", "x" * 5_000 + ".png", "sub", "ok.png/../../s.png", "ok.png/"),
]


def test_no_path_leaves_the_folder_of_images(folder: Path, serve: Serve) -> None:
    """Dots, encoded dots, absolute paths, NUL, links, pipes; sent unnormalised."""
    server = serve(RunsOfFolder(folder))
    port = port_of(server.url)
    for way in WAYS:
        for base in ("/api/runs/demo/media/", "/page/", "/api/runs/", "/"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", base + way)
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            assert SECRET.encode() not in body, way
            assert b"root:" not in body, way
            assert answer.status in (200, 307, 400, 404, 405), way
            assert answer.status != 200 or base != "/api/runs/demo/media/" or body == IMAGE, way


def test_images_are_served_with_their_type(folder: Path, serve: Serve) -> None:
    """With a type and ``nosniff``."""
    server = serve(RunsOfFolder(folder))
    answer = get(server, "api/runs/demo/media/media/ok.png")
    assert (answer.content, answer.headers["content-type"]) == (IMAGE, "image/png")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert get(server, "api/runs/demo/media/sub/%C3%A4%20b.png").content == IMAGE + b"other"


def test_every_answer_has_the_strict_policy(server: Server) -> None:
    """Errors too: nothing from elsewhere, nothing inline, in no frame."""
    for path in ("", "nothing", "api/runs", "page/../x", "api/runs/no"):
        policy = get(server, path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in re.sub(r"'[^']*'", "", policy)


def test_nothing_secret_is_logged(told: Told, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """At the finest level, of right and wrong requests."""
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    caplog.set_level(logging.DEBUG, logger="stagecast")
    told.start()
    server = serve(RunsOfFolder(told.path), token=SECRET)
    get(server, "api/runs", headers={"authorization": f"Bearer {SECRET}"})
    get(server, "api/runs/demo/media/x", headers={"authorization": f"Bearer {SECRET}x"})
    for hello in (Watcher().hello(token=SECRET), '{"type":"hello","token":["' + SECRET + '"]}'):
        with watch(server.url) as socket:
            socket.send(hello)
            try:
                said = socket.recv(timeout=10)
            except ConnectionClosed as closed:
                said = str(closed)
            assert SECRET not in said
    assert SECRET not in caplog.text


def test_no_bytes_of_a_request_are_an_error_of_the_server() -> None:
    """Invalid headers and addresses, sent to the application itself."""
    sent: list[Any] = []

    async def ask(headers: list[tuple[bytes, bytes]], path: str) -> None:
        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        app = LiveApp(RunsOfFolder(Path("nowhere")), Access(TOKEN))
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"\xff=%ff", "headers": headers}
        await app(scope, receive, send)

    for value in (b"\xff\xfe", b"Bearer \xc3\x28", b"", b"http://[::", b"9" * 10_000):
        for name in (b"authorization", b"origin", b"host", b"last-event-id"):
            for path in ("/api/runs/\ud800", "/api/runs/\0/events", "/page/\ud800", "\0", ""):
                asyncio.run(ask([(name, value)], path))
    statuses = {message["status"] for message in sent if message["type"] == "http.response.start"}
    assert statuses <= {200, 307, 401, 403, 404}
    assert all(msgspec.json.decode(one["body"]) for one in sent if one.get("body", b"").startswith(b"{"))
