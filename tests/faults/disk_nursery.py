"""Starts `disk_child` and gives it jobs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Nursery:
    """The other end of `disk_child`. One job at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(
        self, job: str, *, kill_after: int | None = None, kill_s: float = 0.0, **arguments: Any
    ) -> tuple[dict[str, list[Any]], int, bool]:
        """Have a child do a job, and wait for its end.

        Args:
            kill_after: Kill it so much later than it has announced so many checkpoints; 0: than it was born.

        Returns:
            What it reported, by its first word; its exit code; whether it was killed before its end.
        """
        order = {"job": job, "arguments": arguments, "kill_after": kill_after, "kill_s": kill_s}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order, default=os.fspath) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        said: dict[str, list[Any]] = {}
        for word, *rest in answer["said"]:
            said.setdefault(word, []).append(rest[0] if len(rest) == 1 else rest)
        assert "error" not in said, said["error"][0]
        return said, answer["status"], answer["killed"]


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """One that is ready; its processes have ended afterwards."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("disk_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Nursery(process)
    finally:
        process.kill()  # its child, if there is one, dies with it
        process.communicate()
