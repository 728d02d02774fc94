"""Waits for the threads of a run."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from events.run.run import Run

WAIT_S = 20.0
"""Seconds that an expected event may take on a busy machine before the test fails."""


def wait_until(condition: Callable[[], object], failure: str = "it has not happened") -> None:
    """Poll a condition that no event reports."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, failure
        threading.Event().wait(0.001)


def stack_of(thread_id: int | None) -> set[str]:
    """The names of the functions, and of their files, that a thread executes."""
    frame = sys._current_frames().get(thread_id or 0)
    names: set[str] = set()
    while frame is not None:
        names |= {frame.f_code.co_name, os.path.basename(frame.f_code.co_filename)}
        frame = frame.f_back
    return names


def wait_until_in(thread: threading.Thread, place: str) -> None:
    """Wait until a thread executes a function of this name."""
    wait_until(lambda: place in stack_of(thread.ident), f"{thread.name} has not entered {place}")


def wait_until_failed(run: Run) -> None:
    """Hold the loop's thread, in a step or a hook, until the run is cancelled or an observer has failed fatally.

    Without it, the number of steps until the loop stops would depend on timing.
    """
    control = run._connection._session.control  # type: ignore[attr-defined]
    deadline = time.monotonic() + WAIT_S
    while control.error is None:
        assert time.monotonic() < deadline, "nothing has failed"
        control.wait(1.0)


def trainer_threads(*, loops: bool = False) -> list[str]:
    """List the names of the live threads of runs; ``loops`` keeps the training threads only."""
    return [thread.name for thread in _threads("stagecast-loop-" if loops else "stagecast-")]


def _threads(prefix: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]


def join_threads() -> None:
    """Wait until every thread of a run has ended, shortly after its run."""
    gc.collect()  # on this thread: the collection of earlier garbage could keep one of those alive
    deadline = time.monotonic() + WAIT_S
    while left := _threads("stagecast-"):  # repeated: a thread that ends may have started another
        left[0].join(deadline - time.monotonic())
        assert time.monotonic() < deadline, "\n".join(f"{one.name} is alive:\n{_stack(one)}" for one in left)


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "it has ended"
