"""The console in a real pseudo-terminal, in a process of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

import sinks

SCRIPT = """
import os, sys
from events.messages import *
from events.sink import RunInfo
from sinks import Console

time = 1_700_000_000.0
step = 0

def event(event_type, **fields):
    return event_type("demo", 1, 0, time, 0, step, 0, "train", **fields)

writer = Console(refresh_per_s=60).open(RunInfo("demo"))
writer.write([event(RunStarted, module="Net", epochs=1, steps_per_epoch=50)])
for step in range(1, 51):
    time += 0.1
    if step == 25:
        writer.write([event(ObserverDropped, observer="web", dropped=3)])
        print("printed by the user", flush=True)
    writer.write([event(TrainStepEnded, loss=2.0, step_in_epoch=step)])
ENDING
"""
CLOSE = """
writer.write([event(TrainEpochEnded, steps=50, loss=2.0, duration_s=5.0), event(RunEnded, status="finished")])
writer.close()
"""


def run_in_terminal(script: str, width: int, height: int = 24) -> tuple[str, int]:
    """Run a script with stdin, stdout and stderr in a pseudo-terminal; returns its output and exit status."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    dropped = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    root = Path(sinks.__file__).parent.parent
    env |= {"TERM": "xterm-256color", "PYTHONPATH": str(root), "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    output = b""
    while True:
        try:
            part = os.read(master, 65_536)
        except OSError:  # Linux's way to say that nobody has the terminal open any more
            break
        if not part:
            break
        output += part
    os.close(master)
    return output.decode(), process.wait()


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_final_screen_has_the_lines_and_no_bars(screen: Any, width: int) -> None:
    """What a person sees when the run is over: permanent lines, whole, and the cursor below them."""
    output, status = run_in_terminal(SCRIPT.replace("ENDING", CLOSE), width)
    assert status == 0, output
    final = screen(width, 24).feed(output)
    began = ["· run demo  Net on cpu  1 epoch of 50 steps"]
    ended = [
        "! finished at step 50 after 5.0 s, with 1 problem",
        "! problem: web missed 3 events, which its queue had no room for",
    ]
    if width == 40:
        began = ["· run demo  Net on cpu", "  1 epoch of 50 steps"]
        ended = [
            "! finished at step 50 after 5.0 s, with",
            "  1 problem",
            "! problem: web missed 3 events, which",
            "  its queue had no room for",
        ]
    assert final.lines == [
        *began,
        "! warning: 3 events did not reach web",
        "printed by the user",
        "• epoch 1/1  train_loss 2.0000  5.0 s",
        *ended,
        "",
    ]
    assert final.cursor_shown
    assert (final.x, final.y) == (0, len(final.lines) - 1)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("os._exit(3)", 3),
    ],
)
def test_a_process_that_is_killed_leaves_a_visible_cursor(screen: Any, ending: str, expected: int) -> None:
    """Nothing can be restored by a process that is gone, so nothing may need it."""
    output, status = run_in_terminal(SCRIPT.replace("ENDING", ending), 80)
    assert status == expected
    final = screen(80, 24).feed(output)
    assert final.cursor_shown
    assert set(final.bars) == {"epoch", "step"}


@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise SystemExit(3)"])
def test_a_process_that_ends_without_closing_leaves_the_cursor_below(screen: Any, ending: str) -> None:
    """The interpreter's exit closes what nobody closed: the last state stays, the cursor is below it."""
    output, status = run_in_terminal(SCRIPT.replace("ENDING", ending), 80)
    assert status == 3
    final = screen(80, 24).feed(output)
    assert "50/50" in final.lines[-2]
    assert final.lines[-2].startswith("step")
    assert (final.x, final.y) == (0, len(final.lines) - 1)
    assert final.text.count("elapsed") == 1
