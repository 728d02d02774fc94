"""What a table of many runs costs: read for the first time, by another process, and again.

    python tests/benchmarks/run_table.py [--runs 2000] [--steps 100] [--folder FOLDER]

*first*: every journal is read, none was before. *stored*: a new table, as of another process, which finds the stored
entries of long journals (those above 64 KiB). *again*: the same table, of which one run in a hundred has grown. *list*:
``GET /api/runs`` of a server that knows the runs, as the page asks for it. *page*: from the start of the navigation to
the first row of the table, in the chromium on the PATH. Seconds of the wall and of this process's CPU, because other
processes may share the machine; the folder stays if it is given.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import sync_playwright
from report import header

from events.messages import Event, RunEnded, RunStarted, TrainStepEnded, ValEpochEnded
from events.table.columns import Columns
from events.table.conditions import select
from events.table.table import RunTable
from events.wire import encode_json_lines
from sinks.live.runs import RunsOfFolder
from sinks.live.server import Server, bind


def write_run(folder: Path, number: int, steps: int) -> None:
    """Write a run of two epochs, in one of ten folders."""
    path = folder / f"sweep{number % 10}" / f"run{number}" / "journal"
    path.mkdir(parents=True)
    config = {"lr": 10.0 ** -(1 + number % 4), "seed": number, "optimizer": {"name": "adam", "betas": [0.9, 0.99]}}
    events: list[Event] = []

    def add(kind: type[Event], step: int, epoch: int, **fields: object) -> None:
        seq = len(events) + 1
        events.append(kind(f"run{number}", 1, seq, 1.7e9 + number + 0.01 * seq, 0, step, epoch, "train", **fields))

    add(RunStarted, 0, 0, module="benchmark.Net", epochs=2, steps_per_epoch=steps // 2, config=config)
    for step in range(1, steps + 1):
        epoch = 2 * (step - 1) // steps
        add(TrainStepEnded, step, epoch, loss=random.random(), step_s=0.01, lr=0.1, step_in_epoch=step)
        if 2 * step % steps == 0:
            add(ValEpochEnded, step, epoch, loss=random.random())
    add(RunEnded, steps, 1, status="finished")
    (path / f"{1:020d}.jsonl").write_bytes(encode_json_lines(events))


def timed(what: str, work: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:24} {wall:8.2f} s {cpu:8.2f} s CPU   {result}")


def visit(url: str, times: int = 5) -> None:
    """Open the page that many times in one browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for _ in range(times):
            page = browser.new_page()

            def until_first_row(page: Any = page) -> str:
                page.goto(url, wait_until="commit")
                page.locator("#table tbody tr[data-run]").first.wait_for()
                return f"{page.locator('#table tbody tr[data-run]').count()} rows drawn"

            timed("page", until_first_row)
            page.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for number in range(options.runs):
            write_run(folder, number, options.steps)
        table = RunTable(folder)
        timed("first", lambda: f"{len(table.look()):,} runs")
        timed("stored", lambda: f"{len(RunTable(folder).look()):,} runs")
        for journal in sorted(folder.glob("*/*/journal/*.jsonl"))[::100]:
            event = ValEpochEnded("grown", 1, 10**6, 1.8e9, 0, options.steps, 1, "train", loss=0.5)
            with open(journal, "ab") as file:
                file.write(encode_json_lines([event]))
        timed("again", lambda: f"{len(table.look()):,} runs")
        entries = table.look()
        columns = Columns(entries)
        timed("filter", lambda: f"{len(select(entries, ['lr > 0.01 and val_loss < 0.5'], columns)):,} runs match")
        server = Server(RunsOfFolder(folder), bind("127.0.0.1", 0), "127.0.0.1")
        server.start()
        try:
            for what in ("list, first", "list, again"):
                timed(what, lambda: f"{len(httpx.get(f'{server.url}api/runs', timeout=60).content):,} bytes")
            visit(server.url)
        finally:
            server.stop()
    print(f"memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
