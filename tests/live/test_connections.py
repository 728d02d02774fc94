"""Clients that exhaust what a server has: connections, descriptors, patience. The server runs in a process of its own,
with a low descriptor limit."""

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
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from sinks.connections import ConnectionLimit, address_group, hostname_of
from sinks.live import protocols as protocols_module
from sinks.live import server as server_module
from sinks.live.hub import Hub

LIMIT = 128
SERVER = f"""
import resource, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
import sinks.live.server as server
from sinks.live.runs import RunsOfFolder
server.REQUEST_S = float(sys.argv[2])
listening = server.bind("127.0.0.1", 0)
one = server.Server(RunsOfFolder(sys.argv[1]), listening, "127.0.0.1", token="correct-horse-battery")
one.start()
print(one.url, flush=True)
held = []
for line in sys.stdin:  # the descriptors that the rest of the process needs
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
    """The server in its process."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._logged = ""
        self.url = process.stdout.readline().strip()
        self.port = int(self.url.rsplit(":", 1)[1].strip("/"))

    def hold(self, what: str) -> None:
        """Have the process open so many files, "all" that it can, or "close" them."""
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
        """What the process has logged by its end."""
        return self._logged + str(self._process.communicate(timeout=20)[0])


@pytest.fixture
def remote(tmp_path: Path, process: Callable[..., Any]) -> Callable[[float], Remote]:
    (tmp_path / "serve.py").write_text(SERVER)
    (tmp_path / "runs").mkdir(exist_ok=True)
    return lambda request_s: Remote(process("serve.py", str(tmp_path / "runs"), str(request_s)))


@pytest.fixture
def crowd() -> Iterator[Callable[..., list[sockets.socket]]]:
    """Opens many connections, which send the same; an address that refuses some is no error."""
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
    """Whether the server has closed a connection; waits for it."""
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


def test_sockets_that_say_no_hello_make_room(remote: Any, crowd: Any) -> None:
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
from pathlib import Path
import torch
from events.messages import CheckpointFailed, CheckpointSaved
from events.sink import Delivery
from sinks import Live, Memory, Prometheus
from trainer import Checkpoints, ModuleInterface, Trainer, TrainerArguments


class Net(ModuleInterface):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.01)], []

    def get_train_dataloader(self, sampler, batch_size):
        return [torch.ones(2, 2)] * 12

    def get_val_dataloaders(self, sampler, batch_size):
        return None

    def val_step(self, global_step, batch, device):
        return None

    def train_step(self, global_step, batch, device):
        if global_step == 4:
            print("begun", flush=True)
            sys.stdin.readline()
        return self.linear(batch).square().mean()


resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
memory = Memory()
where = {"runs_in": sys.argv[1]}
sinks = [memory, (Live(), Delivery(**where)), (Prometheus(port=0, linger_s=0), Delivery(**where))]
arguments = TrainerArguments(epochs=1, train_batch_size=2, device="cpu")
keep = Checkpoints(every_steps=2)
result = Trainer(Net(), arguments, sinks=sinks, checkpoints=keep, run_dir="runs/demo", run_id="demo").train()
print("end", result.status, len(memory.of(CheckpointSaved)) > 3, len(memory.of(CheckpointFailed)), flush=True)
"""


@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.timeout(180)
def test_clients_without_a_token_end_no_run(
    where: str, tmp_path: Path, process: Callable[..., Any], crowd: Any, kit: Any
) -> None:
    """In the process that trains and in the sink host: more sockets than descriptors, and each checkpoint is saved."""
    (tmp_path / "train.py").write_text(TRAIN)
    one = process("train.py", where, OMP_NUM_THREADS="1", STAGECAST_TOKEN="")
    lines: list[str] = []
    while "begun\n" not in lines:
        lines.append(one.stdout.readline())
        assert lines[-1], "".join(lines)
    live, prometheus = tmp_path / "runs" / "demo" / "live.json", tmp_path / "runs" / "prometheus-demo.json"
    kit.wait_until(lambda: live.exists() and prometheus.exists())
    page = msgspec.json.decode(live.read_bytes())["url"]
    scraped = msgspec.json.decode(prometheus.read_bytes())[0]["targets"][0]
    crowd(int(page.rsplit(":", 1)[1].strip("/")), 200)
    crowd(int(scraped.rsplit(":", 1)[1]), 200)
    assert httpx.get(page, timeout=10).status_code == 200
    assert httpx.get(f"http://{scraped}/metrics", timeout=10).status_code == 200
    out, _ = one.communicate("\n", timeout=100)
    assert "end finished True 0\n" in out, "".join(lines) + out


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the CPU time from /proc")
def test_a_process_without_descriptors_refuses_clients_and_waits(remote: Any, crowd: Any, kit: Any) -> None:
    """It neither ends nor spins, logs a line and not one for each client, and answers when there are some again."""
    server = remote(60.0)
    assert server.answers()
    server.hold("all")
    before_s = server.cpu_s
    crowd(server.port, 40)
    watched = threading.Event()
    watched.wait(2.0)
    assert server.cpu_s - before_s < 1.0
    server.hold("close")
    kit.wait_until(server.answers)
    assert server.log().count("descriptor") + server.log().count("Too many open files") < 6


def test_clients_leave_a_reserve_when_the_process_needs_many(remote: Any, crowd: Any) -> None:
    """Though they are fewer than allowed."""
    server = remote(60.0)
    base = server.descriptors
    server.hold(str(LIMIT - LIMIT // 4 - base - 2))
    crowd(server.port, LIMIT)
    assert server.descriptors <= LIMIT - LIMIT // 4 + 1
    server.hold(str(LIMIT // 4 - 4))


@pytest.mark.parametrize("sent", BEGINNINGS, ids=["nothing", "headers", "body"])
def test_a_request_that_does_not_come_is_not_waited_for(remote: Any, sent: bytes) -> None:
    """Also where a byte comes now and then, and after a request that was answered."""
    server = remote(1.0)
    with sockets.create_connection(("127.0.0.1", server.port), timeout=20) as one:
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
    with sockets.create_connection(("127.0.0.1", server.port), timeout=20) as one:
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
    """Too many headers, too long ones, and names of protocols that are none: the library answers nothing to these."""
    server = remote(60.0)
    with sockets.create_connection(("127.0.0.1", server.port), timeout=20) as one:
        one.sendall(UPGRADE + more + b"\r\n")
        assert is_closed(one)


def test_a_client_that_only_pings_is_closed(told: Any, remote: Any) -> None:
    """Its answers, which it does not read, would fill the memory; long before the time for a hello is over."""
    told.write(told.story.started())
    server = remote(60.0)
    ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
    with sockets.create_connection(("127.0.0.1", server.port), timeout=20) as one:
        one.sendall(UPGRADE + b"\r\n")
        assert b" 101 " in one.recv(100)
        with pytest.raises(ConnectionError):
            for _ in range(400):  # 50 MB
                one.sendall(ping * 1_000)


def test_a_client_that_closes_leaves_nothing_unread_in_memory(
    story: Any, serve: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sent a large message and has read nothing: its connection ends at once, not after a time to read."""
    monkeypatch.setattr(protocols_module, "_CLOSING_S", 100.0)
    hub = Hub()
    hub.view.run.run_id = "demo"
    hub.feed([story.started()])
    hub.view.run.problems = ["p" * 2**23]
    server = serve(hub)
    server._socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 2**15)
    connections = server._server.server_state.connections
    with sockets.socket() as one:
        one.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 2**15)
        one.settimeout(20)
        one.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1].strip("/"))))
        hello = b'{"type":"hello"}'
        one.sendall(UPGRADE + b"\r\n")
        assert b" 101 " in one.recv(100)
        one.sendall(b"\x81" + bytes([0x80 + len(hello)]) + b"\0\0\0\0" + hello)
        kit.wait_until(lambda: any(part.transport.get_write_buffer_size() > 2**22 for part in connections))
        one.sendall(b"\x88\x82\0\0\0\0\x03\xe8")
        kit.wait_until(lambda: not any(part.transport.get_write_buffer_size() for part in connections))


def test_requests_that_break_off_log_no_traceback(remote: Any, crowd: Any) -> None:
    """A body in chunks that are none."""
    server = remote(60.0)
    sent = b"POST /x HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    for one in crowd(server.port, 20, sent):
        assert is_closed(one)
    assert "Traceback" not in server.log()


def test_a_request_with_two_lengths_is_the_last_of_its_connection(remote: Any) -> None:
    """A proxy that believes the other length would take the second answer for that to another client's request."""
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
    """Who sends them must not fill the disk."""
    server = remote(60.0)
    for one in crowd(server.port, 20, b"\0\1\2\r\n\r\n"):
        assert is_closed(one)
    assert server.log().count("Invalid HTTP request") == 1


def test_the_addresses_of_one_network_are_one() -> None:
    """A client has a whole /64; loopback brings the clients of a proxy."""
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
    serve: Any, story: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its streams are: those of other addresses are served."""
    hub = Hub()
    hub.view.run.run_id = "demo"
    hub.feed([story.started()])
    server = serve(hub)
    monkeypatch.setattr(server._socket, "limit", ConnectionLimit(8))
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1].strip("/")))
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
    """What stands before or behind the name is not ignored: a name of a stranger could hide in it."""
    assert hostname_of(host) == name


def test_the_parts_of_uvicorn_that_are_used_exist() -> None:
    """If an upgrade has removed one, this names it."""
    http, websocket = protocols_module.H11Protocol, protocols_module.WebSocketsSansIOProtocol
    state = protocols_module.uvicorn.server.ServerState()
    config = protocols_module.uvicorn.Config(lambda: None, log_config=None)
    config.load()
    loop: Any = object()
    cycle = RequestResponseCycle(**dict.fromkeys(inspect.signature(RequestResponseCycle).parameters, MagicMock()))
    server = protocols_module.uvicorn.Server(config)
    used: list[tuple[Any, tuple[str, ...]]] = [
        (http(config, state, {}, loop), protocols_module.HTTP_ATTRIBUTES),
        (cycle, protocols_module.CYCLE_ATTRIBUTES),
        (websocket(config, state, {}, loop), protocols_module.WEBSOCKET_ATTRIBUTES),
        (websocket(config, state, {}, loop).conn, ("handshake_exc",)),
        (server, protocols_module.SERVER_ATTRIBUTES),
        (server.server_state, ("connections",)),
    ]
    missing = [f"{type(one).__qualname__}.{name}" for one, names in used for name in names if not hasattr(one, name)]
    assert missing == []
