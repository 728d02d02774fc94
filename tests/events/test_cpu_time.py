"""The processor time of some threads: exact when they have ended, as of now while they run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from events.bus.cpu_time import CpuTime

USED_NS = 20_000_000
LIMIT_S = 20.0


def burn() -> None:
    end = time.thread_time_ns() + USED_NS
    while time.thread_time_ns() < end:
        pass


def counting(cpu_time: CpuTime, *steps: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with cpu_time.counting():
            for step in steps:
                step()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_threads_that_have_ended_count_and_others_do_not() -> None:
    cpu_time = CpuTime()
    assert cpu_time.read_ns() == 0
    for _ in range(2):
        counting(cpu_time, burn).join(LIMIT_S)
    before = cpu_time.read_ns()
    assert before >= 2 * USED_NS
    burn()  # nobody counts this
    assert cpu_time.read_ns() == before


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no thread can tell another one's time here")
def test_threads_that_run_count_as_they_go() -> None:
    cpu_time = CpuTime()
    burnt, over = threading.Event(), threading.Event()
    thread = counting(cpu_time, burn, burnt.set, lambda: over.wait(LIMIT_S))
    assert burnt.wait(LIMIT_S)
    running = cpu_time.read_ns()
    assert running >= USED_NS
    over.set()
    thread.join(LIMIT_S)
    assert cpu_time.read_ns() >= running


def test_without_such_a_clock_a_thread_counts_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and on Windows."""
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    cpu_time = CpuTime()
    burnt, over = threading.Event(), threading.Event()
    thread = counting(cpu_time, burn, burnt.set, lambda: over.wait(LIMIT_S))
    assert burnt.wait(LIMIT_S)
    assert cpu_time.read_ns() == 0
    over.set()
    thread.join(LIMIT_S)
    assert cpu_time.read_ns() >= USED_NS


def test_what_a_thread_used_before_does_not_count_and_an_error_does_not_hide_what_it_used() -> None:
    cpu_time = CpuTime()

    def run() -> None:
        burn()
        with pytest.raises(ZeroDivisionError), cpu_time.counting():
            raise ZeroDivisionError

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT_S)
    assert 0 < cpu_time.read_ns() < USED_NS
