"""The page in a real browser, of a real run in a process of its own, by a real ``stagecast watch`` in another."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from live.kit import Serve, Start, Told
from support.threads import WAIT_S, wait_until
from support.training import read_journal

pytest.importorskip("playwright.sync_api")
from live.page_visits import EVIL
from playwright.sync_api import Page, expect

from events.checkpoint.store import CHECKPOINTS_DIR, CheckpointStore
from events.journal.segment import JOURNAL_DIR
from events.messages import CommandTaken, Event, RunEnded
from sinks.live.runs import RunsOfFolder

TRAIN = f"""
import os, sys, time
import torch
from support.training import Net, make_trainer


class Logging(Net):
    def on_end_val_epoch(self, global_step, *outputs, key="default"):
        self.log("worst", 4.0)

    def train_step(self, global_step, batch, device):
        time.sleep(0.005)
        self.log({EVIL!r}, float(global_step))
        self.log("gauge", torch.tensor(2.0) * global_step)
        return super().train_step(global_step, batch, device)


options = {{"run_id": os.path.basename(sys.argv[1]), "run_dir": sys.argv[1]}}
make_trainer(Logging(rows=320, lr=0.01), epochs=1_000_000, journal=True, checkpoints=True, **options).train()
"""


class Run:
    """A run that trains until it is stopped, and a server that can restart at its address."""

    def __init__(self, folder: Path, process: Start) -> None:
        self.path = folder / "runs" / "demo"
        self._process = process
        (folder / "train_demo.py").write_text(TRAIN)
        self.training: subprocess.Popen[str] = process("train_demo.py", str(self.path), OMP_NUM_THREADS="1")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/"
        self._watching: subprocess.Popen[str] | None = None

    def watch(self, *options: str) -> None:
        arguments = ["-m", "trainer.cli.main", "watch", str(self.path.parent), "--no-token", "--port", str(self._port)]
        self._watching = self._process(*arguments, *options)
        assert self._watching.stdout is not None
        assert self.url in self._watching.stdout.readline()

    def end_watching(self, how: int) -> None:
        assert self._watching is not None
        self._watching.send_signal(how)
        self._watching.communicate(timeout=20)

    def events(self) -> list[Event]:
        return read_journal(self.path)


@pytest.fixture
def run(tmp_path: Path, process: Start) -> Run:
    started = Run(tmp_path, process)
    wait_until(lambda: list((started.path / JOURNAL_DIR).glob("*.jsonl")))
    return started


def step_of(page: Page) -> int:
    """The step that the page shows."""
    shown = re.match(r"[\d,]+", page.locator("#tiles dd").first.text_content() or "")
    assert shown is not None
    return int(shown.group().replace(",", ""))


def is_complete(page: Page, series: str, behind: int) -> bool:
    """Whether the page has each value of a series once and in order, up to a step behind this one."""
    found: list[Any] = page.evaluate(
        "name => { const one = stagecast.focus().store.get(name), steps = Array.from(one.step.slice(0, one.length));"
        " const counted = one.weight.slice(0, one.length).reduce((sum, weight) => sum + weight, 0);"
        " const inOrder = steps.every((step, index) => !index || step > steps[index - 1]);"
        " return [inOrder, counted, one.count, one.lastStep]; }",
        series,
    )
    in_order, counted, count, last = found
    return bool(in_order) and counted == count == last and last > behind


def test_charts_fill_while_a_run_trains_and_survive_the_server(run: Run, visit: Any) -> None:
    """The server is killed: the page marks its data as old. It restarts: nothing is missing."""
    visit.may_lose_server = True
    run.watch()
    page = visit(run.url)
    expect(page.locator("#status")).to_contain_text("running")
    expect(page.locator("#commands")).to_be_hidden()  # they were not allowed
    expect(page.locator("#training canvas").first).to_be_visible()
    expect(page.locator("#metrics h3").get_by_text(EVIL, exact=True)).to_be_visible()
    expect(page.locator("#metrics h3").get_by_text("gauge", exact=True)).to_be_visible()
    expect(page.locator("#validation-table")).to_contain_text("worst")  # logged while validating, whatever its name
    expect(page.locator("#validation h3").get_by_text("worst", exact=True)).to_be_visible()
    first = step_of(page)
    wait_until(lambda: step_of(page) > first + 20)

    run.end_watching(signal.SIGKILL)
    expect(page.locator("#banner")).to_be_visible()
    lost_at = step_of(page)
    run.watch()
    expect(page.locator("#banner")).to_be_hidden(timeout=20_000)
    wait_until(lambda: step_of(page) > lost_at + 20)
    for series in ("train_loss", "gauge", EVIL):
        assert is_complete(page, series, lost_at), f"{series} has a gap or a repetition"


def test_commands_of_the_page_reach_the_run(run: Run, visit: Any) -> None:
    """Pause, resume, a checkpoint, and a stop with its reason: on the page, and in the run."""
    run.watch("--commands")
    page = visit(run.url, color_scheme="dark")
    page.click("#pause")
    expect(page.locator("#status")).to_contain_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#status")).to_contain_text("running")
    paused_at = step_of(page)
    wait_until(lambda: step_of(page) > paused_at)
    page.click("#checkpoint")
    expect(page.locator("#checkpoints")).to_contain_text(re.compile(r"step-\d+"))
    page.click("#stop")
    page.get_by_label(re.compile("Reason")).fill("seen enough")
    page.get_by_role("button", name="Stop the run").click()
    expect(page.locator("#status")).to_contain_text("stopped", timeout=20_000)
    expect(page.locator("#commands")).to_be_hidden()
    output, _ = run.training.communicate(timeout=WAIT_S)
    assert run.training.returncode == 0, output
    events = run.events()
    taken = [event.command for event in events if isinstance(event, CommandTaken)]
    assert taken == ["pause", "resume", "checkpoint", "stop"]
    assert [event.status for event in events if isinstance(event, RunEnded)] == ["stopped"]
    store = CheckpointStore(run.path / CHECKPOINTS_DIR)
    assert len(store.names()) == 2, "the one that was asked for, and that of the stop"


def test_the_list_has_runs_that_begin_later(run: Run, visit: Any, process: Start) -> None:
    """They can be compared."""
    run.watch()
    page = visit(run.url)
    other = run.path.parent / "second"
    process("train_demo.py", str(other), OMP_NUM_THREADS="1")
    expect(page.get_by_label("Compare demo")).to_have_count(1)
    page.get_by_label("Compare second").check(timeout=20_000)
    expect(page.locator("#compared .name")).to_have_text(["demo", "second"])


def test_a_run_whose_folder_is_removed_is_reported(told: Told, serve: Serve, visit: Any) -> None:
    """While it is watched, and after a reload; the page names the other runs."""
    visit.may_lose_server = True
    told.start(5)
    other = Told(told.path.parent / "other", "other")
    other.write(other.story.started(), *other.story.steps(2))
    page = visit(serve(RunsOfFolder(told.path.parent)).url, "#run=demo")
    expect(page.locator("#status")).to_contain_text("running")
    told.let_go()
    shutil.rmtree(told.path)
    expect(page.locator("#banner")).to_contain_text("The run demo does not exist any more", timeout=20_000)
    expect(page.locator("#banner")).to_contain_text("it has other")
    expect(page.locator("#status")).to_contain_text("no such run")
    page.reload()
    expect(page.locator("#waiting-text")).to_have_text("this server has no such run; it has other")
    expect(page.locator("#status")).to_contain_text("no such run")
    other.let_go()
