"""Reads of many runs at once: few decode at a time, and neither a long read nor a blocked one delays others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live.kit import Serve, Told
from support.threads import wait_until

from events.journal.reader import JournalReader
from sinks.live import folder_hub as folder_hub_module
from sinks.live import runs as runs_module
from sinks.live import turns as turns_module
from sinks.live.runs import RunsOfFolder
from sinks.live.turns import READING, Turns

Clock = Callable[[float, float], None]
"""Sets the times of a turn: the fixture ``clock``."""
SLOW = 9


class Threads:
    """Reads on threads, which the test steps through."""

    def __init__(self, turns: Turns) -> None:
        self.order: list[str] = []
        self._turns = turns
        self._threads: list[threading.Thread] = []

    def start(self, name: str, *waits: threading.Event) -> None:
        """Start a read with one part per event; each part lasts until its event is set."""

        def read() -> None:
            with self._turns.taken():
                for part, wait in enumerate(waits):
                    self._turns.pass_on() if part else None
                    self.order.append(f"{name}{part}")
                    assert wait.wait(20)

        self._threads.append(threading.Thread(target=read))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    def set_times(turn_s: float, overtime_s: float) -> None:
        monkeypatch.setattr(turns_module, "TURN_S", turn_s)
        monkeypatch.setattr(turns_module, "OVERTIME_S", overtime_s)

    return set_times


def test_new_reads_come_before_the_rest_of_a_long_one(clock: Clock) -> None:
    """The long one passes its turn on after each part."""
    clock(0.0, 1e6)
    turns = Turns(1)
    threads = Threads(turns)
    first, open_ = threading.Event(), threading.Event()
    open_.set()
    threads.start("long", first, open_)
    wait_until(lambda: threads.order == ["long0"])
    threads.start("new", open_)
    threads.start("newer", open_)
    wait_until(lambda: len(turns._waiting) == 2)
    first.set()
    threads.join()
    assert threads.order == ["long0", "new0", "newer0", "long1"]
    assert not turns._waiting + list(turns._began)


def test_a_turn_that_does_not_end_is_not_counted(clock: Clock) -> None:
    """Its thread waits for a disk that hangs; others have their turn."""
    clock(0.0, 0.01)
    turns = Turns(1)
    threads = Threads(turns)
    hangs, open_ = threading.Event(), threading.Event()
    open_.set()
    for name in "abc":
        threads.start(name, hangs)
    threads.start("sound", open_, open_)
    wait_until(lambda: "sound1" in threads.order)
    hangs.set()
    threads.join()
    assert not turns._waiting + list(turns._began)


def test_a_thread_without_a_turn_passes_none_on() -> None:
    """Such as a command that reads a run."""
    turns = Turns(1)
    with turns.taken():
        thread = threading.Thread(target=turns.pass_on)
        thread.start()
        thread.join(20)
        assert len(turns._began) == 1
    assert not turns._began


@pytest.fixture
def many(told: Told) -> Path:
    """The folder of ``demo`` and nine runs with long journals."""
    told.start(20)
    for number in range(SLOW):
        Told(told.path.parent / f"slow{number}", f"slow{number}", steps=2_000).let_go()
    return told.path.parent


def ask(url: str, name: str) -> Any:
    answer = httpx.get(f"{url}api/runs/{name}", timeout=30)
    return answer.status_code, answer.json()["series"]["train_loss"]["count"]


def test_reads_that_hang_do_not_delay_those_of_a_sound_run(
    many: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine folders do not answer; ``demo`` is read for the first time meanwhile."""
    hang, hung = threading.Event(), []
    read_view = folder_hub_module.read_view

    def read(run_dir: Any) -> Any:
        if run_dir.name != "demo":
            hung.append(run_dir)
            assert hang.wait(30)
        return read_view(run_dir)

    monkeypatch.setattr(folder_hub_module, "read_view", read)
    server = serve(RunsOfFolder(many))
    with ThreadPoolExecutor(SLOW) as pool:
        try:
            answers = [pool.submit(ask, server.url, f"slow{number}") for number in range(SLOW)]
            wait_until(lambda: len(hung) == SLOW)
            assert ask(server.url, "demo") == (200, 20)
        finally:
            hang.set()
        assert [answer.result() for answer in answers] == [(200, 2_000)] * SLOW


def test_simultaneous_requests_take_a_limited_number_of_threads(
    many: Path, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait without a thread; requests for the same run share one."""
    clock(0.0, 0.0)
    monkeypatch.setattr(runs_module, "MOST_READERS", 4)
    hang, lock = threading.Event(), threading.Lock()
    hung, most = [], []
    read_view = folder_hub_module.read_view

    def read(run_dir: Any) -> Any:
        with lock:
            hung.append(run_dir)
            most.append(len(hung))
        assert hang.wait(30)
        with lock:
            hung.remove(run_dir)
        return read_view(run_dir)

    monkeypatch.setattr(folder_hub_module, "read_view", read)
    server = serve(RunsOfFolder(many))
    with ThreadPoolExecutor(2 * SLOW) as pool:
        try:
            answers = [pool.submit(ask, server.url, f"slow{number % SLOW}") for number in range(2 * SLOW)]
            wait_until(lambda: len(hung) == 4)
            wait_until(lambda: server._app._runs._readers.statistics().tasks_waiting == SLOW - 4)
        finally:
            hang.set()
        assert [answer.result() for answer in answers] == [(200, 2_000)] * 2 * SLOW
    assert max(most) == 4


def test_few_runs_are_decoded_at_a_time(
    many: Path, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each passes its turn on, so that all of them advance."""
    clock(0.0, 1e6)
    lock = threading.Lock()
    reading: list[str] = []
    most: list[int] = []
    turned: list[str] = []
    decode = JournalReader.read

    def read(self: JournalReader, *arguments: Any) -> Any:
        name = self._dir.parent.name
        if threading.get_ident() not in READING._began:  # the look at all runs, which is one
            return decode(self, *arguments)
        with lock:
            reading.append(name)
            most.append(len(reading))
            if not turned or turned[-1] != name:
                turned.append(name)
        try:
            return decode(self, *arguments)
        finally:
            with lock:
                reading.remove(name)

    monkeypatch.setattr(JournalReader, "read", read)
    server = serve(RunsOfFolder(many))
    with ThreadPoolExecutor(SLOW) as pool:
        answers = [pool.submit(ask, server.url, f"slow{number}") for number in range(SLOW)]
        assert [answer.result() for answer in answers] == [(200, 2_000)] * SLOW
    assert max(most) <= turns_module.MOST_AT_ONCE
    assert len(turned) > 2 * SLOW
