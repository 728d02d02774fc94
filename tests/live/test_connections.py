"""Clients that exhaust a server's connections, descriptors and time; the server's own process has few descriptors."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket as sockets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import msgspec
import pytest
from live.kit import Serve, Start, Story, Told, hub_of, port_of
from support.threads import wait_until
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from sinks.connections import ConnectionLimit, address_group, hostname_of
from sinks.live import protocols as protocols_module
from sinks.live import server as server_module

LIMIT = 128
SERVER = f"""
import resource, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
import sinks.live.protocols as protocols
import sinks.live.server as server
from sinks.live.runs import RunsOfFolder
protocols.REQUEST_S = float(sys.argv[2])
listening = server.bind("127.0.0.1", 0)
one = server.Server(RunsOfFolder(sys.argv[1]), listening, "127.0.0.1", token="correct-horse-battery")
one.start()
print(one.url, flush=True)
held = []
for line in sys.stdin:  # descriptors of the rest of the process
    if line == "close\\n":
        held.clear()
    elif line == "all\\n":
        try:
            while True:
                held.append(open("/dev/null"))
        except OSError:
            pass
    else:
        held += [open("/dev/null") for _ in range(int(line))]
    print("held", flush=True)
"""


class Remote:
    def __init__(self, process: Start) -> None:
        self._process = process
        self._logged = ""
        self.url = process.stdout.readline().strip()
        self.port = port_of(self.url)

    def hold(self, what: str) -> None:
        """Let the process open a number of files, "all" that it can, or "close" them."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()) != "held\n":
            assert line
            self._logged += line

    def answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url, timeout=5).status_code == 200
        return False

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def log(self) -> str:
        return self._logged + str(self._process.communicate(timeout=20)[0])


@pytest.fixture
def remote(tmp_path: Path, process: Start) -> Callable[[float], Remote]:
    (tmp_path / "serve.py").write_text(SERVER)
    (tmp_path / "runs").mkdir(exist_ok=True)
    return lambda request_s: Remote(process("serve.py", str(tmp_path / "runs"), str(request_s)))


@pytest.fixture
def crowd() -> Iterator[Callable[..., list[sockets.socket]]]:
    """Open connections, which send the same; refused ones are not an error."""
    opened: list[sockets.socket] = []

    def come(port: int, count: int, sent: bytes = b"") -> list[sockets.socket]:
        for _ in range(count):
            one = sockets.create_connection(("127.0.0.1", port), timeout=20)
            opened.append(one)
            with contextlib.suppress(OSError):
                one.sendall(sent)
        return opened

    yield come
    for one in opened:
        one.close()


def is_closed(one: sockets.socket) -> bool:
    """Wait for the server to close a connection."""
    try:
        while one.recv(2**16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


BEGINNINGS = [
    b"",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nx-never: end",
    b"POST /api/runs/demo/commands HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n"
    b"authorization: Bearer correct-horse-battery\r\ncontent-type: application/json\r\n\r\n{",
]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("sent", BEGINNINGS, ids=["nothing", "headers", "body"])
def test_connections_take_no_descriptors_that_the_process_needs(remote: Any, crowd: Any, sent: bytes) -> None:
    """Three times as many as there are descriptors: the page answers, and most descriptors stay free."""
    server = remote(60.0)
    crowd(server.port, 3 * LIMIT, sent)
    assert server.answers()
    assert server.descriptors < LIMIT // 2
    server.hold(str(LIMIT // 2))


def test_sockets_without_a_hello_make_room(remote: Any, crowd: Any) -> None:
    """Also those that were closed for others, and do not answer the close."""
    server = remote(60.0)
    upgrade = (
        b"GET /api/runs/demo/ws HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
    )
    for one in crowd(server.port, LIMIT, upgrade):
        one.settimeout(0.0)
    for _ in range(5):
        assert server.answers()
    assert server.descriptors < LIMIT // 2


TRAIN = """
import resource, sys
from events.messages import CheckpointFailed, CheckpointSaved
from events.sink import Delivery
from sinks import Live, Memory, Prometheus
from support.training import Net, make_trainer
from trainer import Checkpoints

def wait(global_step):
    if global_step == 4:
        print("begun", flush=True)
        sys.stdin.readline()

resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
memory, where = Memory(), {"runs_in": sys.argv[1]}
sinks = [memory, (Live(), Delivery(**where)), (Prometheus(port=0, linger_s=0), Delivery(**where))]
options = {"sinks": sinks, "checkpoints": Checkpoints(every_steps=2), "run_dir": "runs/demo", "run_id": "demo"}
result = make_trainer(Net(rows=96, act=wait), epochs=1, journal=True, **options).train()
print("end", result.status, len(memory.of(CheckpointSaved)) > 3, len(memory.of(CheckpointFailed)), flush=True)
"""


@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.timeout(180)
def test_clients_without_a_token_end_no_run(where: str, tmp_path: Path, process: Start, crowd: Any) -> None:
    """More sockets than descriptors, beside the loop and in the sink host: each checkpoint is saved."""
    (tmp_path / "train.py").write_text(TRAIN)
    one = process("train.py", where, OMP_NUM_THREADS="1", STAGECAST_TOKEN="")
    lines: list[str] = []
    while "begun\n" not in lines:
        lines.append(one.stdout.readline())
        assert lines[-1], "".join(lines)
    live, prometheus = tmp_path / "runs" / "demo" / "live.json", tmp_path / "runs" / "prometheus-demo.json"
    wait_until(lambda: live.exists() and prometheus.exists())
    page = msgspec.json.decode(live.read_bytes())["url"]
    scraped = msgspec.json.decode(prometheus.read_bytes())[0]["targets"][0]
    crowd(port_of(page), 200)
    crowd(int(scraped.rsplit(":", 1)[1]), 200)
    assert httpx.get(page, timeout=10).status_code == 200
    assert httpx.get(f"http://{scraped}/metrics", timeout=10).status_code == 200
    out, _ = one.communicate("\n", timeout=100)
    assert "end finished True 0\n" in out, "".join(lines) + out


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the CPU time from /proc")
def test_a_process_without_descriptors_refuses_clients_and_waits(remote: Any, crowd: Any) -> None:
    """It does not spin, logs a line and not one for each client, and answers once there are descriptors again."""
    server = remote(60.0)
    assert server.answers()
    server.hold("all")
    before_s = server.cpu_s
    crowd(server.port, 40)
    watched = threading.Event()
    watched.wait(2.0)
    assert server.cpu_s - before_s < 1.0
    server.hold("close")
    wait_until(server.answers)
    assert server.log().count("descriptor") + server.log().count("Too many open files") < 6


def test_clients_leave_a_reserve_of_descriptors(remote: Any, crowd: Any) -> None:
    server = remote(60.0)
    base = server.descriptors
    server.hold(str(LIMIT - LIMIT // 4 - base - 2))
    crowd(server.port, LIMIT)
    assert server.descriptors <= LIMIT - LIMIT // 4 + 1
    server.hold(str(LIMIT // 4 - 4))


@pytest.mark.parametrize("sent", BEGINNINGS, ids=["nothing", "headers", "body"])
def test_an_incomplete_request_times_out(remote: Any, sent: bytes) -> None:
    """Also where a byte comes now and then, and after an answered request."""
    server = remote(1.0)
    with sockets.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        one.sendall(sent)
        over = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not over.wait(0.2):
                    one.sendall(b"x")

        dripping = threading.Thread(target=drip)
        if sent:
            dripping.start()
        assert is_closed(one)
        over.set()
        if sent:
            dripping.join()
    with sockets.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        one.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\nGET / HT")
        assert is_closed(one)


UPGRADE = (
    b"GET /api/runs/demo/ws HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


@pytest.mark.parametrize(
    "more", [b"a: b\r\n" * 300, b"a: " + b"b" * 20_000 + b"\r\n", b"sec-websocket-protocol: \x01\xe9,,\r\n"]
)
def test_a_handshake_that_cannot_be_answered_is_closed(remote: Any, more: bytes) -> None:
    """The library sends no answer to too many headers, too long ones, and invalid names of protocols."""
    server = remote(60.0)
    with sockets.create_connection(("127.0.0.1", server.port), timeout=20) as one:
        one.sendall(UPGRADE + more + b"\r\n")
        assert is_closed(one)


def test_a_client_that_only_pings_is_closed(told: Told, remote: Any) -> None:
    """Unread answers would fill the memory; long before the timeout of a hello."""
    told.start()
    server = remote(60.0)
    ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
    with sockets.create_connection(("127.0.0.1", server.port), timeout=20) as one:
        one.sendall(UPGRADE + b"\r\n")
        assert b" 101 " in one.recv(100)
        with pytest.raises(ConnectionError):
            for _ in range(400):  # 50 MB
                one.sendall(ping * 1_000)


def test_a_client_that_closes_leaves_nothing_unread_in_memory(
    story: Story, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection ends at once, although it has read nothing of a large message."""
    monkeypatch.setattr(protocols_module, "_CLOSING_S", 100.0)
    hub = hub_of(story)
    hub.view.run.problems = ["p" * 2**23]
    server = serve(hub)
    server._socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 2**15)
    connections = server._server.server_state.connections
    with sockets.socket() as one:
        one.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 2**15)
        one.settimeout(20)
        one.connect(("127.0.0.1", port_of(server.url)))
        hello = b'{"type":"hello"}'
        one.sendall(UPGRADE + b"\r\n")
        assert b" 101 " in one.recv(100)
        one.sendall(b"\x81" + bytes([0x80 + len(hello)]) + b"\0\0\0\0" + hello)
        wait_until(lambda: any(part.transport.get_write_buffer_size() > 2**22 for part in connections))
        one.sendall(b"\x88\x82\0\0\0\0\x03\xe8")
        wait_until(lambda: not any(part.transport.get_write_buffer_size() for part in connections))


def test_invalid_chunks_log_no_traceback(remote: Any, crowd: Any) -> None:
    server = remote(60.0)
    sent = b"POST /x HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    for one in crowd(server.port, 20, sent):
        assert is_closed(one)
    assert "Traceback" not in server.log()


def test_a_request_with_two_lengths_is_the_last_of_its_connection(remote: Any) -> None:
    """A proxy that uses the other length would take the second answer for another client's."""
    server = remote(60.0)
    with sockets.create_connection(("127.0.0.1", server.port), timeout=20) as one:
        lengths = b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        request = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
        one.sendall(b"POST /api/runs/demo/commands HTTP/1.1\r\nhost: localhost\r\n" + lengths + request + b"\r\n")
        answers = b""
        while part := one.recv(2**16):
            answers += part
    assert (answers.count(b"HTTP/1.1 "), answers[:12]) == (1, b"HTTP/1.1 400")


def test_malformed_requests_are_logged_once_a_minute(remote: Any, crowd: Any) -> None:
    server = remote(60.0)
    for one in crowd(server.port, 20, b"\0\1\2\r\n\r\n"):
        assert is_closed(one)
    assert server.log().count("Invalid HTTP request") == 1


def test_the_addresses_of_one_network_are_one_group() -> None:
    """A client has a whole /64; loopback may be a proxy."""
    assert address_group(("192.0.2.1", 1)) == address_group(("::ffff:192.0.2.1", 1, 0, 0)) == "192.0.2.1"
    assert address_group(("2001:db8::1", 1, 0, 0)) == address_group(("2001:db8::ffff:2", 1, 0, 0))
    assert address_group(("127.3.0.1", 1)) is address_group(("::1", 1, 0, 0)) is None
    limit = ConnectionLimit(4)
    with sockets.socket() as one, sockets.socket() as two, sockets.socket() as three:
        limit.add(one, "192.0.2.1")
        assert not limit.is_full_for("192.0.2.1")
        limit.add(two, "192.0.2.1")
        limit.add(three, None)
        assert limit.is_full_for("192.0.2.1")
        assert not limit.is_full_for("192.0.2.2")
        assert not limit.is_full_for(None)
        two.close()
        assert not limit.is_full_for("192.0.2.1")


def test_one_address_takes_at_most_half_of_the_connections(
    serve: Serve, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other addresses are served."""
    hub = hub_of(story)
    server = serve(hub)
    monkeypatch.setattr(server._socket, "limit", ConnectionLimit(8))
    address = ("127.0.0.1", port_of(server.url))
    request = b"GET /api/runs/demo/events HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with contextlib.ExitStack() as streams:

        def answers(group: str) -> bool:
            for module in (server_module, protocols_module):
                monkeypatch.setattr(module, "address_group", lambda address: group)
            one = streams.enter_context(sockets.create_connection(address, timeout=20))
            try:
                one.sendall(request)
                return b"200 OK" in one.recv(100)
            except ConnectionError:
                return False

        assert [answers("192.0.2.1") for _ in range(6)] == [True] * 4 + [False] * 2
        assert [answers("192.0.2.2") for _ in range(6)] == [True] * 4 + [False] * 2
        assert not answers("192.0.2.3")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("LocalHost:80", "localhost"),
        ("[::1]:8765", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("example.org:", "example.org"),
        ("[localhost]x.evil.com", None),
        ("[::1]x.evil.com", None),
        ("[::1].evil.com:80", None),
        ("[127.0.0.1]", None),
        ("[localhost]", None),
        ("localhost:80@evil.com", None),
        ("localhost/evil.com", None),
        ("localhost, evil.com", None),
        ("evil.com\tlocalhost", None),
        ("localhost:evil", None),
        ("", None),
    ],
)
def test_a_host_header_is_read_strictly(host: str, name: str | None) -> None:
    """Text before or after the name is not ignored."""
    assert hostname_of(host) == name


def test_the_parts_of_uvicorn_that_are_used_exist() -> None:
    """An upgrade that removed one is named here."""
    http, websocket = protocols_module.H11Protocol, protocols_module.WebSocketsSansIOProtocol
    state = protocols_module.uvicorn.server.ServerState()
    config = protocols_module.uvicorn.Config(lambda: None, log_config=None)
    config.load()
    loop: Any = object()
    cycle = RequestResponseCycle(**dict.fromkeys(inspect.signature(RequestResponseCycle).parameters, MagicMock()))
    server = protocols_module.uvicorn.Server(config)
    used: list[tuple[Any, tuple[str, ...]]] = [
        (
            http(config, state, {}, loop),
            ("app", "client", "cycle", "logger", "on_response_complete", "scope", "transport"),
        ),
        (cycle, ("more_body", "response_complete")),
        (websocket(config, state, {}, loop), ("app", "client", "close_sent", "conn", "handle_close", "handle_ping")),
        (websocket(config, state, {}, loop), ("handshake_complete", "handshake_initiated", "logger", "transport")),
        (websocket(config, state, {}, loop).conn, ("handshake_exc",)),
        (server, ("on_tick", "run", "server_state", "should_exit", "started", "startup")),
        (server.server_state, ("connections",)),
    ]
    missing = [f"{type(one).__qualname__}.{name}" for one, names in used for name in names if not hasattr(one, name)]
    assert missing == []
