"""How soon who comes late sees a long run, and what another watcher of the same server feels of it.

    python tests/benchmarks/live_journal.py [--steps 1000000] [--rounds 3] [--followers 500]

A journal of that many steps; for each round ``stagecast watch`` is started anew, in a process of its own. *cold*: the
stored view was deleted, so the whole journal is read. *stored*: it is there. *again*: the server has the run already.
Each time is from the client's hello to its snapshot. Meanwhile somebody watches a second, short run, to which a step is
added every 10 ms: *other* is the time between two of his frames (100 ms when all is well) while the long one is read.

Then so many clients ask for the journal and read nothing: how many are taken, what the server's memory and threads come
to, and how long the page takes meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import psutil
from report import header, percentile
from websockets.sync.client import connect

from events.messages import Event, RunStarted, TrainStepEnded
from events.run.folder import RunFolder
from events.wire import encode_json_lines
from sinks.live.stored import STORE_NAME

ROOT = Path(__file__).parent.parent.parent
_TOKEN = "not-a-secret-of-anybody"
_HELLO = f'{{"type":"hello","token":"{_TOKEN}"}}'
_HEADERS = {"Authorization": f"Bearer {_TOKEN}"}
_SEGMENT_BYTES = 64 * 2**20


def step(run_id: str, number: int) -> Event:
    """One step, as a run journals it."""
    place = (run_id, 1, number + 1, 1.7e9 + number / 100, 0, number, 0, "train")
    return TrainStepEnded(*place, loss=1.0 / number, step_in_epoch=number, rows=32, step_s=0.01, lr=1e-3)


def write_journal(folder: Path, steps: int) -> int:
    """A run's folder with so many steps; returns its bytes."""
    journal = folder / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    events: list[Event] = [RunStarted(folder.name, 1, 1, 1.7e9, 0, 0, 0, None, "benchmark.Net", 1)]
    size = total = 0
    path = journal / f"{1:020d}.jsonl"
    for number in range(1, steps + 1):
        events.append(step(folder.name, number))
        if len(events) >= 1_000 or number == steps:
            if size > _SEGMENT_BYTES:
                size, path = 0, journal / f"{events[0].seq:020d}.jsonl"
            with open(path, "ab") as file:
                size += file.write(data := encode_json_lines(events))
            total += len(data)
            events = []
    return total


class Other:
    """A short run that goes on, and somebody who watches it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.gaps: list[float] = []
        self._over = threading.Event()
        self._folder = folder
        self._threads = [threading.Thread(target=self._write), threading.Thread(target=self._watch, args=(url,))]
        self._seen = threading.Event()
        for thread in self._threads:
            thread.start()
        self._seen.wait(20)

    def _write(self) -> None:
        path = next((self._folder / "journal").iterdir())
        number = len(path.read_bytes().splitlines())
        with open(path, "ab", buffering=0) as file:
            while not self._over.wait(0.01):
                file.write(encode_json_lines([step(self._folder.name, number)]))
                number += 1

    def _watch(self, url: str) -> None:
        with connect(f"{url}api/runs/{self._folder.name}/ws", proxy=None, max_size=None) as watching:
            watching.send(_HELLO)
            for _ in range(5):
                watching.recv()
            self._seen.set()
            last = time.perf_counter()
            while not self._over.is_set():
                watching.recv()
                now = time.perf_counter()
                if not self._over.is_set():  # else the run does not go on any more
                    self.gaps.append(now - last)
                last = now

    def stop(self) -> None:
        """Of both."""
        self._over.set()
        for thread in self._threads:
            thread.join()


def serve(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """``stagecast watch``; and its address."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "STAGECAST_TOKEN": _TOKEN}
    command = [sys.executable, "-m", "trainer.cli.main", "watch", str(folder), "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "http://" in line:
            return process, "http://" + line.partition("http://")[2].partition("#")[0]
    raise RuntimeError("the server has not started")


def join(url: str) -> tuple[float, int]:
    """Seconds from hello to snapshot, and its bytes."""
    with connect(f"{url.replace('http', 'ws', 1)}api/runs/long/ws", proxy=None, max_size=None) as watching:
        began = time.perf_counter()
        watching.send(_HELLO)
        data = watching.recv()
        return time.perf_counter() - began, len(data)


def page_s(url: str) -> float:
    """Seconds for the page and the list of runs."""
    began = time.perf_counter()
    for path in ("", "api/runs"):
        urllib.request.urlopen(urllib.request.Request(url + path, headers=_HEADERS), timeout=60).read()
    return time.perf_counter() - began


def follow(folder: Path, count: int) -> None:
    """Clients that ask for a journal and read nothing; prints a line."""
    process, url = serve(folder)
    try:
        seen = psutil.Process(process.pid)
        join(url)
        quiet = [page_s(url) for _ in range(20)]
        before = seen.memory_info().rss
        request = b"GET /api/runs/long/journal?follow=1 HTTP/1.1\r\nHost: localhost\r\nAuthorization: %b\r\n\r\n"
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1].strip("/")))
        clients = [socket.create_connection(address) for _ in range(count)]
        for one in clients:
            with contextlib.suppress(OSError):  # closed by the server: there are too many
                one.sendall(request % _HEADERS["Authorization"].encode())
        most = threads = 0
        taken: list[float] = []
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            taken.append(page_s(url))
            most, threads = max(most, seen.memory_info().rss), max(threads, seen.num_threads())
            time.sleep(0.05)
        held = 0
        for one in clients:
            with contextlib.suppress(OSError):
                held += b" 200 " in one.recv(64)
            one.close()
        print(
            f"\n{count} clients follow the journal and read nothing: {held} were taken, memory grew by at most ", end=""
        )
        print(f"{(most - before) / 2**20:.0f} MiB, {threads} threads; the page took", end=" ")
        print(f"{1e3 * statistics.median(taken):.0f} ms (p99 {1e3 * percentile(taken, 99):.0f} ms, ", end="")
        print(f"max {1e3 * max(taken):.0f} ms), before {1e3 * statistics.median(quiet):.0f} ms")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--followers", type=int, default=500)
    options = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_journal(folder / "long", options.steps)
        write_journal(folder / "other", 10)
        print(f"a journal of {options.steps:,} steps, {size / 2**20:.0f} MiB; {options.rounds} rounds")
        found: dict[str, list[float]] = {"cold": [], "stored": [], "again": []}
        gaps: dict[str, list[float]] = {name: [] for name in found}
        nbytes = 0
        with RunFolder.open(folder / "other", "other"):
            for _ in range(options.rounds):
                (folder / "long" / STORE_NAME).unlink(missing_ok=True)
                for kind in found:
                    if kind != "again":
                        process, url = serve(folder)
                    other = Other(url.replace("http", "ws", 1), folder / "other")
                    taken, nbytes = join(url)
                    other.stop()
                    found[kind].append(taken)
                    gaps[kind] += other.gaps
                    if kind != "stored":
                        process.send_signal(signal.SIGINT)
                        process.communicate()
                        if kind == "cold" and not (folder / "long" / STORE_NAME).exists():
                            raise RuntimeError("the view was not stored")
        print(f"snapshot: {nbytes / 2**10:.0f} KiB\n")
        print(f"{'':8}  {'median':>8}  {'slowest':>8}  {'other: median':>14}  {'p99':>7}  {'max':>7}")
        for kind, times in found.items():
            ms = [1e3 * gap for gap in gaps[kind]] or [0.0]
            own = f"{kind:8}  {statistics.median(times):6.2f} s  {max(times):6.2f} s"
            print(f"{own}  {statistics.median(ms):11.0f} ms  {percentile(ms, 99):4.0f} ms  {max(ms):4.0f} ms")
        follow(folder, options.followers)


if __name__ == "__main__":
    main()
