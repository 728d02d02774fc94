"""What the page costs in a real browser: opening a run of many metrics, and following one that logs ten times a second.

    python tests/benchmarks/page.py [--metrics 300] [--steps 640] [--rounds 5] [--seconds 20] [--profile]

*snapshot*: bytes on the wire. *first chart*: from the start of the navigation to the first chart with a line. *live*:
CPU of the page's own process (its renderer) and of all of the browser's processes together, in percent of a core, with
every metric logged ten times a second, beside an empty page of the same browser; the rounds alternate. Without a GPU
the browser paints on the CPU. ``--profile`` lists the functions of the page by their own time.

Needs ``chromium`` on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx
import psutil
from playwright.sync_api import sync_playwright
from report import header

from events.messages import MetricsLogged, RunStarted, TrainStepEnded
from sinks.live.hub import Hub
from sinks.live.runs import OneRun
from sinks.live.server import Server, bind

_HERTZ = 10


class Feed:
    """A hub with a run of some steps, and a thread that logs further ones while it is on."""

    def __init__(self, metrics: int, steps: int) -> None:
        self.hub = Hub()
        self._metrics = metrics
        self._random = random.Random(0)
        self._seq = self._step = 0
        self._on = threading.Event()
        self.hub.feed([self._event(RunStarted, module="benchmark.Net", epochs=1)])
        for _ in range(steps):
            self._log()
        threading.Thread(target=self._run, daemon=True).start()

    def _event(self, kind: Any, **fields: Any) -> Any:
        self._seq += 1
        return kind("demo", 1, self._seq, time.time(), 0, self._step, 0, "train", **fields)

    def _log(self) -> None:
        self._step += 1
        noise = self._random.random
        values = {f"part{i % 10}/metric{i}": math.exp(-self._step / 400) + noise() * 0.1 for i in range(self._metrics)}
        step = self._event(TrainStepEnded, loss=noise(), step_in_epoch=self._step, step_s=0.1, rows=32)
        self.hub.feed([step, self._event(MetricsLogged, metrics=values)])

    def _run(self) -> None:
        while self._on.wait():
            began = time.monotonic()
            self._log()
            time.sleep(max(0.0, began + 1 / _HERTZ - time.monotonic()))

    def turn(self, *, on: bool) -> None:
        (self._on.set if on else self._on.clear)()


def cpu_s(browser: psutil.Process) -> Counter[int]:
    """Seconds of the CPU so far, by process."""
    found: Counter[int] = Counter()
    for one in [browser, *browser.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # that of a page which was closed
            times = one.cpu_times()
            found[one.pid] = times.user + times.system  # type: ignore[assignment]
    return found


def wire_bytes(server: Server) -> int:
    with httpx.stream("GET", f"{server.url}api/runs/demo", timeout=60) as response:
        return sum(len(part) for part in response.iter_raw())


def first_chart_s(browser: Any, url: str) -> float:
    page = browser.new_page()
    page.goto(url, wait_until="commit")
    drawn = "() => window.stagecast?.board?.draws.count > 0 && performance.now()"
    found = float(page.wait_for_function(drawn, polling=20).json_value()) / 1e3
    page.close()
    return found


def shares(browser: Any, root: psutil.Process, address: str, seconds: float, *, profiles: bool) -> tuple[float, float]:
    """Percent of a core: of the page's process, and of all of the browser's."""
    known = set(cpu_s(root))
    page = browser.new_page()
    page.goto(address)
    page.wait_for_timeout(3_000)
    session = page.context.new_cdp_session(page)
    if profiles:
        session.send("Profiler.enable")
        session.send("Profiler.start")
    begin, began = cpu_s(root), time.monotonic()
    page.wait_for_timeout(seconds * 1e3)
    used, passed = cpu_s(root), time.monotonic() - began
    if profiles:
        show(session.send("Profiler.stop")["profile"])
    page.close()
    spent = {pid: 100 * (used[pid] - begin[pid]) / passed for pid in used}
    return max(spent[pid] for pid in spent if pid not in known), sum(spent.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=int, default=300)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    print(header(), flush=True)
    feed = Feed(options.metrics, options.steps)
    server = Server(OneRun(feed.hub), bind("127.0.0.1", 0), "127.0.0.1")
    threading.Thread(target=server.run, daemon=True).start()
    size = wire_bytes(server)
    print(f"snapshot {size / 1e6:.2f} MB on the wire; {options.metrics} metrics x {options.steps} steps")
    with sync_playwright() as playwright:
        before = set(cpu_s(psutil.Process()))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        started = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
        root = next(one for one in started if not any("--type=" in part for part in one.cmdline()))
        firsts = [first_chart_s(browser, server.url) for _ in range(options.rounds)]
        print(f"first chart {statistics.median(firsts):.2f} s ({min(firsts):.2f} to {max(firsts):.2f})", flush=True)
        found: dict[str, list[tuple[float, float]]] = {"empty page": [], "live": []}
        for _ in range(options.rounds):
            found["empty page"].append(shares(browser, root, "about:blank", options.seconds, profiles=False))
            feed.turn(on=True)
            found["live"].append(shares(browser, root, server.url, options.seconds, profiles=options.profile))
            feed.turn(on=False)
        for name, both in found.items():
            for what, values in zip(("page", "browser"), zip(*both, strict=True), strict=True):
                spread = f"{min(values):.1f} to {max(values):.1f}"
                print(f"{name:11} {what:8} {statistics.median(values):6.1f} % of a core ({spread})")
        browser.close()
    return 0


def show(profile: dict[str, Any]) -> None:
    """Print functions by their own time."""
    nodes = {node["id"]: node["callFrame"] for node in profile["nodes"]}
    own: Counter[str] = Counter()
    for node, delta in zip(profile["samples"], profile["timeDeltas"], strict=True):
        frame = nodes[node]
        own[f"{frame['functionName']} {frame['url'].rsplit('/', 1)[-1]}:{frame['lineNumber'] + 1}"] += delta
    total = sum(profile["timeDeltas"])
    for name, spent in own.most_common(25):
        print(f"  {100 * spent / total:6.2f} %  {name}")


if __name__ == "__main__":
    sys.exit(main())
