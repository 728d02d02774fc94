"""Starts `disk_child`, and kills it when it is time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.nursery import Popen

STUCK_S = 40.0
"""A child that has not done in this time what it is to be killed after is killed, and the test fails."""


def run_child(
    job: str, *, kill_after: int | None = None, kill_s: float = 0.0, **arguments: Any
) -> tuple[dict[str, list[Any]], int, bool]:
    """Have a child do a job, and wait for its end.

    Args:
        kill_after: Kill it ``kill_s`` after it has announced so many checkpoints; 0: after its start.

    Returns:
        What it reported, by its first word; its exit code; whether it was killed before its end.
    """
    program = Path(__file__).with_name("disk_child.py")
    command = [sys.executable, str(program), job, json.dumps(arguments, default=os.fspath)]
    with Popen(command, stdout=subprocess.PIPE) as process:
        reports, killed = _listen(process, kill_after, kill_s)
    said: dict[str, list[Any]] = {}
    for word, *rest in map(json.loads, reports):
        said.setdefault(word, []).append(rest[0] if len(rest) == 1 else rest)
    assert "error" not in said, said["error"][0]
    return said, process.returncode, killed


def _listen(process: subprocess.Popen[bytes], kill_after: int | None, kill_s: float) -> tuple[list[bytes], bool]:
    assert process.stdout is not None
    buffer = b""
    deadline = time.monotonic() + (kill_s if kill_after == 0 else STUCK_S)
    timed = kill_after == 0
    killed = False
    while True:
        left_s = deadline - time.monotonic()
        if not killed and not select.select([process.stdout], [], [], max(0.0, left_s))[0]:
            process.kill()
            killed = True
        data = os.read(process.stdout.fileno(), 2**16)
        if not data:
            return buffer.splitlines(), killed and timed
        buffer += data
        if kill_after and not timed and buffer.count(b'["saved"') >= kill_after:
            timed, deadline = True, time.monotonic() + kill_s
