"""A hostile server: `connect` ends in bounded time and memory, with a clear error, and keeps its token."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from support.https import make_certificate

from events.messages import MetricsLogged, RunEnded, RunStarted
from events.run.folder import RunFolder
from events.wire import encode_json
from trainer.errors import ConnectedRunFailed, ConnectError, ConnectionLost, ProtocolViolated
from trainer.remote import follower
from trainer.remote import http as connection_http
from trainer.remote.connect import connect

pytestmark = pytest.mark.anyio
TOKEN = "none-of-your-business"
SNAPSHOT = {"cursor": 0, "run": {"run_id": "demo", "status": "running"}}
CAP = 100_000

Answer = Callable[["Peer"], Any]
Attack = Callable[..., "Hostile"]
"""Starts a server: the fixture ``hostile``."""


class Peer:
    """One connection to the hostile server, on its own thread."""

    def __init__(self, server: Hostile, wire: socket.socket) -> None:
        self.server = server
        self.wire = wire
        self.over = server.over
        self.head = b""

    def read_request(self) -> bool:
        self.head = b""
        while b"\r\n\r\n" not in self.head:
            data = self.wire.recv(65_536)
            if not data:
                return False
            self.head += data
        self.server.heads.append(self.head)
        return True

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    def send(self, data: bytes) -> None:
        self.wire.sendall(data)

    def answer(self, body: bytes | Any, head: str = "", status: str = "200 OK") -> None:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self.send(f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n{head}\r\n".encode() + data)

    def stream(self, head: str = "") -> None:
        """Start an answer that ends with the connection."""
        self.send(f"HTTP/1.1 200 OK\r\nconnection: close\r\n{head}\r\n".encode())

    def flood(self, *parts: bytes) -> None:
        """Send the last part until the client closes."""
        for part in parts:
            self.send(part)
        while not self.over.is_set():
            self.send(parts[-1])

    def drip(self, data: bytes, pause_s: float = 0.02) -> None:
        """Send a byte at a time, until the client closes."""
        while not self.over.is_set():
            for byte in data:
                self.send(bytes([byte]))
                self.over.wait(pause_s)


class Hostile:
    """Answers requests by the first matching prefix of a path; others as a server of one run."""

    def __init__(self, answers: dict[str, Answer], context: ssl.SSLContext | None = None) -> None:
        self.heads: list[bytes] = []
        self.over = threading.Event()
        self._answers = answers
        self._context = context
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self._listening.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                wire, _ = self._listening.accept()
            except OSError:
                return
            self._open.add(wire)
            threading.Thread(target=self._serve, args=(wire,), daemon=True).start()

    def _serve(self, wire: socket.socket) -> None:
        with contextlib.suppress(OSError), wire:
            if self._context is not None:
                wire = self._context.wrap_socket(wire, server_side=True)
                self._open.add(wire)
            peer = Peer(self, wire)
            while peer.read_request():
                self._answer(peer)
                if b"connection: close" in peer.head.lower() or self.over.is_set():
                    break

    def _answer(self, peer: Peer) -> None:
        for prefix, answer in self._answers.items():
            if peer.path.startswith(prefix):
                answer(peer)
                with contextlib.suppress(OSError):
                    if answer.__name__ != "whole":
                        peer.wire.shutdown(socket.SHUT_RDWR)
                return
        if peer.path == "/api/runs":
            peer.answer({"runs": [{"run_id": "demo", "status": "running"}]})
        elif peer.path.startswith("/api/runs/demo/journal"):
            peer.stream()
            peer.send(line(1))
            peer.drip(b"\n")
        elif peer.path.startswith("/api/runs/demo/commands"):
            peer.answer({"type": "sent"}, status="202 Accepted")
        else:
            peer.answer(SNAPSHOT)

    def close(self) -> None:
        self.over.set()
        for one in [self._listening, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def line(seq: int, run_id: str = "demo", **fields: Any) -> bytes:
    kind = fields.pop("kind", RunStarted)
    fields = fields or ({"module": "m", "epochs": 1} if kind is RunStarted else {})
    return encode_json(kind(run_id, 1, seq, 0.0, 0, 0, 0, None, **fields)) + b"\n"


async def enter(connection: Any) -> None:
    async with connection:
        pytest.fail("the block was entered")


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hostile]]:
    """Start a hostile server; limits of sizes and times are small."""
    monkeypatch.delenv("STAGECAST_TOKEN", raising=False)
    monkeypatch.delenv("STAGECAST_URL", raising=False)
    for name in ("_ANSWER_BYTES", "_LIST_BYTES", "_SUMMARY_BYTES"):
        monkeypatch.setattr(connection_http, name, CAP)
    for name in ("_LINE_BYTES", "_EVENTLESS_BYTES"):
        monkeypatch.setattr(follower, name, CAP)
    for module, name in ((connection_http, "_ANSWER_S"), (connection_http, "_SILENCE_S"), (follower, "_LINE_S")):
        monkeypatch.setattr(module, name, 0.4)
    started: list[Hostile] = []

    def start(answers: dict[str, Answer], context: ssl.SSLContext | None = None) -> Hostile:
        started.append(Hostile(answers, context))
        return started[-1]

    yield start
    for one in started:
        one.close()


def whole_answer(body: Any, head: str = "", status: str = "200 OK") -> Answer:
    def whole(peer: Peer) -> None:
        peer.answer(body, head, status)

    return whole


def raw(*parts: bytes) -> Answer:
    return lambda peer: [peer.send(part) for part in parts]


def flooding(*parts: bytes) -> Answer:
    return lambda peer: peer.flood(*parts)


def dripping(data: bytes) -> Answer:
    return lambda peer: peer.drip(data)


def headed(answer: Answer, head: str = "") -> Answer:
    def send(peer: Peer) -> None:
        peer.stream(head)
        answer(peer)

    return send


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
BOMB = gzip.compress(b"a" * 10_000_000)

ENTERING: dict[str, tuple[Answer, str]] = {
    # The answer to the first request, and the error.
    "a body without end": (headed(flooding(b"a" * 65_536)), "sends more than 100,000 bytes"),
    "a length beyond the cap": (
        flooding(OK + b"content-length: 2800000000\r\n\r\n", b"a" * 65_536),
        "more than 100,000",
    ),
    "chunks without end": (flooding(CHUNKED, b"1\r\na\r\n" * 10_000), "sends more than 100,000|no complete"),
    "an endless chunk extension": (flooding(CHUNKED, b"1;" + b"a" * 65_536, b"a" * 65_536), "RemoteProtocolError"),
    "a chunk of a negative size": (raw(CHUNKED, b"-5\r\nabcde\r\n"), "RemoteProtocolError"),
    "a compression bomb": (whole_answer(BOMB, "content-encoding: gzip\r\n"), r"encodes its answer \(gzip\)"),
    "a bomb of two encodings": (whole_answer(BOMB, "content-encoding: br, gzip\r\n"), r"\(br, gzip\)"),
    "a bomb as a refusal": (whole_answer(BOMB, "content-encoding: gzip\r\n", "403 Forbidden"), "answers 403 Forbidden"),
    "a refusal without end": (flooding(b"HTTP/1.1 403 Forbidden\r\n\r\n", b"a" * 65_536), "answers 403 Forbidden"),
    "a byte at a time": (headed(dripping(b"a")), "no complete answer came within 0.4 s"),
    "a byte of a header at a time": (dripping(OK + b"x: "), "no complete answer came within 0.4 s"),
    "a refusal by bytes": (dripping(b"HTTP/1.1 403 Forbidden\r\n\r\naaa"), "no complete answer|answers 403"),
    "nothing": (lambda peer: peer.over.wait(5), "no complete answer|ReadTimeout"),
    "continue, without end": (flooding(b"HTTP/1.1 100 Continue\r\n\r\n" * 100), "no complete answer"),
    "a header without end": (flooding(OK + b"x: ", b"a" * 65_536), "RemoteProtocolError"),
    "headers without end": (flooding(OK, b"x: y\r\n" * 10_000), "RemoteProtocolError"),
    "HTTP/0.9": (raw(b"hello\x1b[2J\r\n\r\n"), "RemoteProtocolError"),
    "another protocol": (raw(b"SSH-2.0-OpenSSH_9.0\r\n"), "RemoteProtocolError"),
    "an upgrade": (raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\nabc"), "RemoteProtocolError"),
    "less than it promises": (raw(OK + b'content-length: 100\r\n\r\n{"runs"'), "RemoteProtocolError"),
    "two lengths": (raw(OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab"), "RemoteProtocolError"),
    "an empty answer": (whole_answer(b""), "is not a server of runs"),
    "a page": (whole_answer(b"<html>"), "is not a server of runs"),
    "wrong types": (whole_answer({"runs": {"demo": 1}}), "is not a server of runs"),
    "deep nesting": (whole_answer(b"[" * 90_000), "is not a server of runs"),
    "deep nesting beside": (whole_answer(b'{"runs":[],"x":' + b"[" * 90_000), "is not a server of runs"),
    "bytes that are not text": (whole_answer(b'{"runs":[{"run_id":"\xff"}]}'), "is not a server of runs"),
    "half a character": (whole_answer(b'{"runs":[{"run_id":"\\ud800"}]}'), "is not a server of runs"),
    "a redirect elsewhere": (
        whole_answer(b"", "location: http://me:hidden@elsewhere/\x85\r\n", "302 Found"),
        r"answers 302 Found; .*redirects to, if you trust it: http://\.\.\.@elsewhere/",
    ),
    "a redirect to a file": (whole_answer(b"", "location: file:///etc/passwd\r\n", "301 Moved"), "answers 301"),
    "a redirect to nowhere": (whole_answer(b"", "", "302 Found"), "answers 302 Found"),
    "not modified": (whole_answer(b"", "", "304 Not Modified"), "answers 304 Not Modified"),
    "a redirect to itself": (whole_answer(b"", "location: /api/runs\r\n", "307 Again"), "answers 307"),
    "escapes in a refusal": (
        whole_answer({"error": "\x1b]0;hidden\x07\u202e\r\n\0"}, status="403 Forbidden"),
        r"403 Forbidden \(\\x1b\]0;hidden\\x07\\u202e\\r\\n\\x00\)",
    ),
    "escapes in names": (
        whole_answer({"runs": [{"run_id": "\x1b[2Ja", "status": "\x1b[1m"}, {"run_id": "b\nc"}]}),
        r"\\x1b\[2Ja \(\\x1b\[1m\), b\\nc",
    ),
    "a name that leads elsewhere": (
        whole_answer({"runs": [{"run_id": ".."}]}),
        "names a run '..', which is not a name",
    ),
    "a very long name": (whole_answer({"runs": [{"run_id": "a" * 90_000}]}), "names a run 'aaa.*, which is not a name"),
    "an address that is none": (whole_answer(b"", "location: http://[::1\r\n", "302 x"), "RemoteProtocolError"),
    "very long names": (whole_answer({"runs": [{"run_id": "a" * 40_000}, {"run_id": "b" * 40_000}]}), "serves 2 runs"),
}


@pytest.mark.parametrize("attack", ENTERING)
async def test_entering_the_block_ends_soon_with_an_error_that_cannot_harm_a_terminal(
    hostile: Attack, attack: str
) -> None:
    """Whatever the first answer."""
    answer, message = ENTERING[attack]
    server = hostile({"/api/runs": answer})
    with anyio.fail_after(10), pytest.raises(ConnectError, match=message) as caught:
        await enter(connect(server.url))
    assert str(caught.value).isprintable()
    assert "hidden@" not in str(caught.value)
    assert len(str(caught.value)) < 2_500


HUGE = 10**400
OF_THE_RUN: dict[str, tuple[Any, str]] = {
    "another run": ({"cursor": 1, "run": {"run_id": "\x1bother"}}, r"answers with run \\x1bother, not run demo"),
    "a huge cursor": (b'{"cursor":1%s,"run":{"run_id":"demo"}}' % (b"0" * 400), "Expected `int`"),
    "a negative cursor": (SNAPSHOT | {"cursor": -1}, "Expected `int` >= 0"),
    "a cursor of text": (SNAPSHOT | {"cursor": "1"}, "Expected `int`"),
    "a run that is a list": (SNAPSHOT | {"run": []}, "Expected `object`"),
    "a number that is none": ({"cursor": 1, "run": {"run_id": "demo", "latest": {"a": "\x1b[2J"}}}, r"\\x1b\[2J"),
    "a huge summary": ({"cursor": 1, "run": {"run_id": "demo", "latest": {"a" * CAP: 1.0}}}, "more than 100,000 bytes"),
    "no cursor": ({"run": {"run_id": "demo"}}, "missing required field"),
}


@pytest.mark.parametrize("attack", OF_THE_RUN)
async def test_a_wrong_description_of_a_run_violates_the_protocol(hostile: Attack, attack: str) -> None:
    """The error is never msgspec's own."""
    answer, message = OF_THE_RUN[attack]
    server = hostile({"/api/runs/demo": whole_answer(answer)})
    with anyio.fail_after(10), pytest.raises(ProtocolViolated, match=message) as caught:
        await enter(connect(server.url, run_id="demo"))
    assert str(caught.value).isprintable()


JOURNALS: dict[str, tuple[Answer, type[ConnectError], str]] = {
    "a line without end": (headed(flooding(b"a" * 65_536)), ProtocolViolated, "line of more than 100,000 bytes"),
    "newlines without end": (headed(flooding(b"\n" * 65_536)), ProtocolViolated, "bytes of a journal without a new"),
    "a line by bytes": (headed(dripping(b"a")), ConnectionLost, "took longer than 0.4 s"),
    "a bomb": (headed(flooding(BOMB), "content-encoding: gzip\r\n"), ProtocolViolated, r"encodes its answer \(gzip\)"),
    "no line": (headed(raw(b"\x1b[2J\n")), ProtocolViolated, "a line that is not an event"),
    "a type of escapes": (headed(raw(b'{"type":5,"\x1b[2J":1}\n')), ProtocolViolated, "a line that is not an event"),
    "another run": (
        headed(raw(line(1, "\x1bother"))),
        ProtocolViolated,
        r"an event of run \\x1bother in the journal of",
    ),
    "another run's news": (
        headed(raw(b'{"type":"News","seq":1,"run_id":"other"}\n')),
        ProtocolViolated,
        "an event of run other in the journal of run demo",
    ),
    "an event again": (headed(raw(line(5), line(5))), ProtocolViolated, "sends event 5 behind event 5"),
    "back": (headed(raw(line(9), line(8))), ProtocolViolated, "sends event 8 behind event 9"),
    "a huge number": (headed(raw(line(2**62))), ProtocolViolated, r"sends event 4\.61169e\+18 behind event 0"),
    "less than was": (headed(raw(line(9))), ProtocolViolated, "goes back from event 9 to event 0"),
    "signs of life, over and over": (headed(raw(b"\n")), ConnectionLost, "out of reach for 0.3 s"),
    "nothing, over and over": (whole_answer(b""), ConnectionLost, "out of reach for 0.3 s"),
    "errors, over and over": (whole_answer(b"", status="503 No"), ConnectionLost, "answers 503 No"),
    "a redirect": (whole_answer(b"", "location: http://elsewhere/\r\n", "308 Gone"), ConnectError, "answers 308 Gone"),
}


@pytest.mark.parametrize("attack", JOURNALS)
async def test_a_hostile_journal_ends_soon_for_streams_and_for_the_result(hostile: Attack, attack: str) -> None:
    """After the events before the attack, with one error of one class."""
    answer, kind, message = JOURNALS[attack]
    snapshot = whole_answer(SNAPSHOT if "over and over" not in attack else SNAPSHOT | {"cursor": 1})
    server = hostile({"/api/runs/demo/journal": answer, "/api/runs/demo": snapshot})
    with anyio.fail_after(15):
        async with connect(server.url, run_id="demo", give_up_s=0.3) as run:
            stream = run.events(since=0)
            for wait in (stream.receive, run.result):
                with pytest.raises(kind, match=message) as caught:
                    while True:
                        await wait()
                assert str(caught.value).isprintable()
    assert len(server.heads) < 20, "it reconnects as fast as it is disconnected"


async def test_the_end_of_a_run_cannot_harm_a_terminal(hostile: Attack) -> None:
    """The reason of a failure is the server's text; it is escaped in the message and in the result."""
    reason = "Boom: \x1b[2J\u202e"
    end = line(1) + line(2, kind=RunEnded, status="failed", reason=reason)
    over = whole_answer({"cursor": 2, "run": {"run_id": "demo", "status": "failed"}})
    server = hostile({"/api/runs/demo/journal": headed(raw(end)), "/api/runs/demo": over})
    async with connect(server.url, run_id="demo") as run:
        with anyio.fail_after(10), pytest.raises(ConnectedRunFailed, match=r"Boom: \\x1b\[2J\\u202e") as caught:
            await run.result()
    assert caught.value.result is not None
    assert caught.value.result.reason == r"Boom: \x1b[2J\u202e"


async def test_names_without_end_do_not_fill_the_memory(hostile: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of a result has a maximum size."""
    monkeypatch.setattr("trainer.remote.result._MAX_BYTES", 50_000)

    def journal(peer: Peer) -> None:
        peer.stream()
        for seq in range(1, 1_000_000):
            peer.send(line(seq, kind=MetricsLogged, metrics={f"metric-{seq}": 1.0}))

    server = hostile({"/api/runs/demo/journal": journal})
    async with connect(server.url, run_id="demo") as run:
        with anyio.fail_after(10), pytest.raises(ProtocolViolated, match="more names of metrics"):
            await run.result()


async def test_commands_without_an_answer_share_one_timeout(hostile: Attack) -> None:
    """Leaving the block does not wait that long for each."""
    server = hostile({"/api/runs/demo/commands": dripping(OK)})
    with anyio.fail_after(15):
        with pytest.raises(ConnectionLost, match="no complete answer"):
            async with connect(server.url, run_id="demo", give_up_s=1.0) as run:
                for _ in range(6):
                    run.pause()
        assert len(server.heads) < 12


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_memory_is_bounded_with_the_default_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a body of gigabytes, a bomb and a line without end."""
    monkeypatch.setattr(follower, "_EVENTLESS_BYTES", 2**23)  # 64 MiB of newlines would take long, in the same memory
    attacks = [
        {"/api/runs": headed(flooding(b"a" * 2**20))},
        {"/api/runs": whole_answer(gzip.compress(bytes(2**28)), "content-encoding: gzip\r\n")},
        {"/api/runs/demo/journal": headed(flooding(b"a" * 2**20))},
        {"/api/runs/demo/journal": headed(flooding(b"\n" * 2**20))},
    ]
    for answers in attacks:
        server = Hostile(answers)
        tracemalloc.start()
        try:
            with anyio.fail_after(100), pytest.raises(ProtocolViolated):
                async with connect(server.url) as run:
                    await run.events(since=0).receive()
            assert tracemalloc.get_traced_memory()[1] < 80 * 2**20
        finally:
            tracemalloc.stop()
            server.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    make_certificate(path)
    return path


@pytest.mark.parametrize("attack", ["untrusted", "garbage for a handshake", "garbage afterwards"])
async def test_a_broken_or_untrusted_tls_server_gets_no_token(
    hostile: Attack, certificate: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the failure; no exception of the library below propagates."""
    monkeypatch.setattr(connection_http, "_ANSWER_S", 10.0)  # a handshake is slow on a busy machine
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def garbage(peer: Peer) -> None:
        os.write(peer.wire.fileno(), b"\x17\x03\x03\x00\x20" + b"garbage " * 4)

    server = hostile({"/api/runs": garbage}, None if "handshake" in attack else context)
    url = server.url.replace("http://", "https://")
    if attack == "garbage afterwards":
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with anyio.fail_after(10), pytest.raises(ConnectError, match="no run is served at") as caught:
        await enter(connect(url, token=TOKEN))
    assert str(caught.value).isprintable()
    assert attack == "garbage afterwards" or TOKEN.encode() not in b"".join(server.heads)


async def test_a_token_is_sent_to_its_server_only(hostile: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the target of a redirect; and no cookie is returned."""
    thief = hostile({})
    for status in ("301 x", "302 x", "303 x", "307 x", "308 x", "200 x"):
        head = f"location: {thief.url}\r\nrefresh: 0;url={thief.url}\r\nset-cookie: a=b\r\nalt-svc: h2=':1'\r\n"
        there = whole_answer({"runs": [{"run_id": "demo"}]}, head, status)
        server = hostile({"/api/runs/demo": whole_answer(SNAPSHOT, head), "/api/runs": there})
        with contextlib.suppress(ConnectError):
            async with connect(f"{server.url}#token={TOKEN}"):
                pass
        assert all(f"authorization: Bearer {TOKEN}".encode() in head for head in server.heads)
        assert not any(b"cookie" in head.lower() for head in server.heads)
    assert thief.heads == []


@pytest.mark.parametrize(
    ("owner", "url", "sent"),
    [
        (None, "http://127.0.0.1:1/", True),
        (None, "http://localhost:1/", True),
        (None, "http://LOCALHOST:1/", True),
        (None, "https://[::1]/", True),
        (None, "http://127.8.9.1/x/", True),
        (None, "http://train.example/", False),
        (None, "https://train.example/", False),
        (None, "http://127.0.0.1.evil.example/", False),
        (None, "http://localhost.evil.example/", False),
        (None, "http://127.0.0.1@evil.example/", False),
        (None, "http://127.0.0.1:80@evil.example/", False),
        (None, "http://localhost\\@evil.example/", False),
        (None, "http://10.0.0.1/", False),
        (None, "http://0.0.0.0:1/", False),
        ("https://train.example/", "https://train.example/#run=a", True),
        ("https://train.example", "https://TRAIN.example:443/runs/", True),
        ("https://train.example/", "http://train.example/", False),
        ("https://train.example/", "https://train.example:8443/", False),
        ("https://train.example/", "https://evil.example/", False),
        ("https://train.example/", "http://127.0.0.1:1/", False),
        ("http://[::1]:1/x", "http://[0:0::1]:1/", True),
    ],
)
async def test_the_token_of_the_environment_belongs_to_one_origin(
    owner: str | None, url: str, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ``STAGECAST_URL``, or without it to this machine; a token of the call belongs to the call's address."""
    monkeypatch.setenv("STAGECAST_TOKEN", TOKEN)
    monkeypatch.setenv("STAGECAST_URL", owner) if owner else monkeypatch.delenv("STAGECAST_URL", raising=False)
    seen: list[Any] = []
    monkeypatch.setattr("trainer.remote.connect.RunServer", lambda *given: seen.append(given) or 1 / 0)
    for kept, shown in ((url, sent), (url.partition("#")[0] + "#token=mine", True)):
        seen.clear()
        try:
            with contextlib.suppress(ZeroDivisionError):
                async with connect(kept):
                    pass
        except ConnectError:  # an address that reads in two ways
            assert not sent
            continue
        token, withheld = seen[0][2], seen[0][4]
        assert token == ((TOKEN if "#token" not in kept else "mine") if shown else None)
        assert bool(withheld) == (not shown)


async def test_the_token_of_the_environment_is_not_sent_to_the_address_in_a_folder(
    hostile: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any program may listen there. For the folder of a run that is over nothing is sent."""
    server = hostile({"/api/runs": whole_answer({"error": "no"}, status="401 Unauthorized")})
    monkeypatch.setenv("STAGECAST_TOKEN", TOKEN)
    (tmp_path / "live.json").write_text(json.dumps({"url": server.url}))
    with pytest.raises(ConnectError, match="is not the folder of a run that is under way"):
        connect(tmp_path)
    assert server.heads == []
    with RunFolder.open(tmp_path, "run"):
        with pytest.raises(ConnectError, match="STAGECAST_TOKEN is sent to an address of a run folder only if"):
            await enter(connect(tmp_path))
        assert not [one for one in server.heads if TOKEN.encode() in one]
        monkeypatch.setenv("STAGECAST_URL", server.url)
        with pytest.raises(ConnectError):
            await enter(connect(tmp_path))
    assert [one for one in server.heads if TOKEN.encode() in one]


async def test_a_withheld_token_is_named_when_the_server_requires_one(
    hostile: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong ``STAGECAST_URL`` is an error, without its password."""
    server = hostile({"/api/runs": whole_answer({"error": "no"}, status="401 Unauthorized")})
    monkeypatch.setenv("STAGECAST_TOKEN", TOKEN)
    monkeypatch.setenv("STAGECAST_URL", "https://train.example")
    with pytest.raises(ConnectError, match=r"STAGECAST_TOKEN belongs to https://train\.example:443, as"):
        await enter(connect(server.url))
    monkeypatch.setenv("STAGECAST_URL", "https://me:hid/den@there:0")
    with pytest.raises(ConnectError, match=r"STAGECAST_URL='https://\.\.\.@there:0' is not an"):
        connect(server.url)


async def test_a_token_without_encryption_to_another_machine_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once for each connection, without the token."""
    caplog.set_level(logging.WARNING)
    for url in ("http://127.0.0.1:1", "https://10.0.0.1", "http://10.0.0.1"):
        server = connection_http.RunServer(url + "/", "demo", TOKEN if url != "http://10.0.0.1" else None, 1.0)
        await server.aclose()
    assert not caplog.records
    for url, token in (("http://10.0.0.1:5/", TOKEN), ("http://me:hidden@10.0.0.1:5/", None)):
        await connection_http.RunServer(url, "demo", token, 1.0).aclose()
    assert [record.getMessage().partition(" is sent")[0] for record in caplog.records] == [
        "the token for http://10.0.0.1:5",
        "the password for http://10.0.0.1:5",
    ]


def test_the_warning_reaches_stderr_without_a_logging_configuration() -> None:
    program = (
        "import anyio\nfrom trainer.remote.http import RunServer\n"
        f"anyio.run(RunServer('http://10.0.0.1:5/', 'demo', {TOKEN!r}, 1.0).aclose)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "stagecast: warning: the token for http://10.0.0.1:5 is sent without encryption" in done.stderr
    assert TOKEN not in done.stderr


async def test_requests_to_this_machine_bypass_the_proxy_of_the_environment(
    hostile: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy would see the token. An unusable proxy is an error, without its password."""
    thief, server = hostile({}), hostile({})
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", thief.url)
    async with connect(server.url, token=TOKEN) as run:
        assert run.run_id == "demo"
    assert thief.heads == []
    monkeypatch.setenv("http_proxy", "gopher://me:hidden@there")
    with pytest.raises(ConnectError, match=r"proxy settings .* cannot be used") as caught:
        await enter(connect("http://10.0.0.1:5", run_id="demo"))
    assert "hidden" not in str(caught.value)
