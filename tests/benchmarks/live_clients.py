"""What many watchers cost: against the same server sending a ready text, with latency, and with clients that hang.

    python tests/benchmarks/live_clients.py [--clients 500] [--rounds 4] [--seconds 10] [--stuck 60]

*live*: the application with a hub that is fed ``--metrics`` numbers a second, as a run of its own does. *bare*: uvicorn
with the same options, sending a text of the same size ten times a second, made once. Each server is a process of its
own, and so are the clients, two processes of raw sockets that count messages and decode none; the servers take turns.
CPU is the server's, user and system, in percent of a core. A number's latency is from its event's time to its arrival;
the frame that it waits for comes every 100 ms.

Then: twice as many clients, all held; and ten that never read beside one that does, with twenty times the numbers, and
what the server's memory grows by. The bound that the documentation states: for each one snapshot and 64 KiB, and for
all of them the frames that are kept, as bytes and as text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import psutil
import uvicorn
from report import header, percentile

from events.messages import Event, MetricsLogged, RunStarted
from sinks.live.frames import KEPT_BYTES
from sinks.live.hub import FRAME_S, Hub
from sinks.live.runs import OneRun
from sinks.live.server import Server, bind

ROOT = Path(__file__).parent.parent.parent
_NAMES = 10
_HELLO = b'{"type":"hello"}'


# ------------------------------------------------------------------------------------------------- the servers


def serve_live(metrics: int) -> None:
    """A hub, fed by a thread."""
    hub = Hub()
    hub.feed([RunStarted("demo", 1, 1, time.time(), 0, 0, 0, None, "benchmark.Net", 1)])

    def feed() -> None:
        seq, began = 1, time.monotonic()
        while True:
            events: list[Event] = []
            due = int((time.monotonic() - began) * metrics / _NAMES)
            while seq - 1 < due:
                seq += 1
                values = {f"metric/{index}": seq * 0.001 + index for index in range(_NAMES)}
                events.append(MetricsLogged("demo", 1, seq, time.time(), 0, seq, 0, "train", values))
            if events:
                hub.feed(events)
            time.sleep(0.1)  # as a sink is given its batches

    server = Server(OneRun(hub), bind("127.0.0.1", 0), "127.0.0.1")
    print(server.url, flush=True)
    threading.Thread(target=feed, daemon=True).start()
    server.run()


def serve_bare(size: int) -> None:
    """The same text to everybody, ten times a second."""
    tick = anyio.Event()
    tail = "x" * (size - 60)
    text = ""

    async def ticks() -> None:
        nonlocal tick, text
        number = 0
        while True:
            await anyio.sleep(FRAME_S)
            number += 1
            text = f'{{"type":"frame","cursor":{number},"time":{time.time():.6f},"x":"{tail}"}}'
            now, tick = tick, anyio.Event()
            now.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            return
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        while True:
            await tick.wait()
            await send({"type": "websocket.send", "text": text})

    async def main() -> None:
        listening = bind("127.0.0.1", 0)
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
        options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "server_header": False}
        options |= {"ws": "websockets-sansio", "ws_per_message_deflate": False, "timeout_graceful_shutdown": 1}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ticks)
            await uvicorn.Server(uvicorn.Config(app, **options)).serve(sockets=[listening])
            tasks.cancel_scope.cancel()

    with contextlib.suppress(KeyboardInterrupt):
        anyio.run(main)


class Process:
    """One of the two."""

    def __init__(self, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().rsplit(":", 1)[1].strip().strip("/"))
        self._seen = psutil.Process(self._process.pid)

    @property
    def cpu_s(self) -> float:
        """Seconds so far."""
        times = self._seen.cpu_times()
        return float(times.user + times.system)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(self._seen.memory_info().rss)

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


# ------------------------------------------------------------------------------------------------- the clients


def connect(port: int) -> socket.socket:
    """A WebSocket whose hello is said."""
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(
        b"GET /api/runs/demo/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += one.recv(1)
    if b" 101 " not in answer:
        raise RuntimeError(f"the server answers {answer!r}")
    mask = b"\0\0\0\0"
    one.sendall(bytes([0x81, 0x80 | len(_HELLO)]) + mask + _HELLO)
    return one


class Reader:
    """Counts the messages of one connection, and notes when some of them came."""

    def __init__(self, one: socket.socket, keeps: bool) -> None:
        self.socket = one
        self.count = self.nbytes = 0
        self.latencies: list[float] = []
        self._keeps = keeps
        self._data = b""
        self._before: float | None = None

    def read(self) -> bool:
        """What is there; False when the connection is closed."""
        data = self.socket.recv(2**18)
        self._data += data
        while len(self._data) >= 10:
            length, begin = self._data[1] & 0x7F, 2
            if length == 126:
                length, begin = int.from_bytes(self._data[2:4], "big"), 4
            elif length == 127:
                length, begin = int.from_bytes(self._data[2:10], "big"), 10
            if len(self._data) < begin + length:
                break
            if self._data[0] == 0x81:
                self.count, self.nbytes = self.count + 1, length
                if self._keeps:
                    self._note(self._data[begin : begin + 100])
            elif self._data[0] == 0x89:  # a ping: who does not answer is let go
                text = self._data[begin : begin + length]
                self.socket.send(bytes([0x8A, 0x80 | length]) + b"\0\0\0\0" + text)
            self._data = self._data[begin + length :]
        return bool(data)

    def _note(self, beginning: bytes) -> None:
        now, place = time.time(), beginning.find(b'"time":')
        if place < 0:
            return
        made = float(beginning[place + 7 :].partition(b",")[0].rstrip(b"}"))
        if self._before is not None:  # numbers came all the time from the frame before to this one
            step = (made - self._before) / 10
            self.latencies += [now - (self._before + (index + 0.5) * step) for index in range(10)]
        self._before = made


def watch(port: int, count: int) -> None:
    """A process of clients: connects, says so, and reads until it is told to stop; then says what came."""
    readers = [Reader(connect(port), keeps=index % 10 == 0) for index in range(count)]
    select = selectors.DefaultSelector()
    for reader in readers:
        reader.socket.setblocking(False)
        select.register(reader.socket, selectors.EVENT_READ, reader)
    select.register(sys.stdin, selectors.EVENT_READ, None)
    print("connected", flush=True)
    closed = 0
    while True:
        for key, _ in select.select():
            if key.data is None:
                line = sys.stdin.readline().strip()
                if line == "begin":
                    for reader in readers:
                        reader.count, reader.latencies = 0, []
                else:
                    latencies = [value for reader in readers for value in reader.latencies]
                    counts = [reader.count for reader in readers]
                    print(json.dumps([counts, readers[0].nbytes, closed, latencies]), flush=True)
                    return
            elif not key.data.read():
                closed += 1
                select.unregister(key.fileobj)


class Clients:
    """Some processes of them."""

    def __init__(self, port: int, count: int, processes: int = 2) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--watch", str(port), "--clients", str(count // processes)]
        self._processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline() != "connected\n":
                raise RuntimeError("the clients could not connect")
        self.counts: list[int] = []
        self.latencies: list[float] = []
        self.closed = self.nbytes = 0

    def begin(self) -> None:
        """Count from now on."""
        self._say("begin\n")

    def end(self) -> None:
        """Count no more."""
        self._say("end\n")
        for process in self._processes:
            counts, self.nbytes, closed, latencies = json.loads(process.communicate()[0])
            self.counts += counts
            self.latencies += latencies
            self.closed += closed

    def _say(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(word)
            process.stdin.flush()


# ------------------------------------------------------------------------------------------------- the measurements


def measure(arguments: list[str], count: int, seconds: float) -> tuple[float, Clients]:
    """The server's CPU in percent, and what the clients saw."""
    server = Process(*arguments)
    try:
        clients = Clients(server.port, count)
        time.sleep(1.5)
        clients.begin()
        cpu_s, began = server.cpu_s, time.monotonic()
        time.sleep(seconds)
        percent = 100 * (server.cpu_s - cpu_s) / (time.monotonic() - began)
        clients.end()
        return percent, clients
    finally:
        server.stop()


def stuck(seconds: float, metrics: int) -> None:
    """Ten that never read, beside one that does; and what their memory is."""
    server = Process("--serve", "live", "--metrics", str(metrics))
    try:
        clients = Clients(server.port, 1, processes=1)
        time.sleep(3.0)
        before = server.memory
        silent = [connect(server.port) for _ in range(10)]
        clients.begin()
        most, deadline = 0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            most = max(most, server.memory)
            time.sleep(0.1)
        clients.end()
        for one in silent:
            one.close()
        bound = 10 * (2**20 + 2**16) + 2 * KEPT_BYTES
        print(
            f"\nten that never read for {seconds:.0f} s: {metrics:,} numbers a second, {clients.nbytes:,} bytes a frame"
        )
        print(f"memory grows by at most {(most - before) / 2**20:.1f} MiB (bound with snapshots of 1 MiB:", end=" ")
        print(f"{bound / 2**20:.0f} MiB), the one that reads got {clients.counts[0] / seconds:.1f} messages a second")
    finally:
        server.stop()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--stuck", type=float, default=60, help="seconds that clients do not read")
    parser.add_argument("--metrics", type=int, default=1_000, help="numbers a second")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=4_000, help=argparse.SUPPRESS)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if options.watch:
        return watch(options.watch, options.clients)
    if options.serve:
        logging.disable()
        return serve_live(options.metrics) if options.serve == "live" else serve_bare(options.size)
    print(header())
    live = ["--serve", "live", "--metrics", str(options.metrics)]
    _, first = measure(live, 2, options.seconds)
    bare = ["--serve", "bare", "--size", str(first.nbytes)]
    print(f"{options.clients} clients, {options.metrics:,} numbers a second, frames of {first.nbytes:,} bytes\n")
    print(f"{'':6}  {'CPU':>7}  {'messages/s':>10}  {'latency: median':>15}  {'p99':>7}")
    cpu: dict[str, list[float]] = {"live": [], "bare": []}
    for number in range(options.rounds):
        for name, arguments in (("live", live), ("bare", bare)) if number % 2 else (("bare", bare), ("live", live)):
            percent, clients = measure(arguments, options.clients, options.seconds)
            cpu[name].append(percent)
            _row(name, percent, clients, options.seconds)
    ratios = [one / other for one, other in zip(cpu["live"], cpu["bare"], strict=True)]
    print(f"\nCPU, live over bare: median {statistics.median(ratios):.2f}, each round ", end="")
    print(", ".join(f"{ratio:.2f}" for ratio in ratios))
    percent, clients = measure(live, 2 * options.clients, options.seconds)
    print(f"\n{2 * options.clients} clients, {clients.closed} of them closed:")
    _row("live", percent, clients, options.seconds)
    stuck(options.stuck, 20 * options.metrics)
    return None


def _row(name: str, percent: float, clients: Clients, seconds: float) -> None:
    ms = [1e3 * value for value in clients.latencies] or [0.0]
    each = statistics.mean(clients.counts) / seconds
    print(
        f"{name:6}  {percent:5.1f} %  {each:10.2f}  {statistics.median(ms):12.1f} ms  {percentile(ms, 99):4.0f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
