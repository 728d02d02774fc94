"""The command ``stagecast``, in the test's own process and in others."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import pytest
from support.scripts import ROOT

from trainer.cli.main import main

COMMAND = [sys.executable, "-P", "-m", "trainer.cli.main"]
"""Starts it in another process, as the installed command: without the working directory on the path."""


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Stagecast = Callable[..., Ended]
"""Runs the command in this process: the fixture ``stagecast``."""


@pytest.fixture
def stagecast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Stagecast]:
    """Run the command in this process; modules that it imports from the working directory are forgotten at the end."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        try:
            code = main([*map(str, arguments)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ended(code, *capsys.readouterr())

    yield call
    for name in {*sys.modules} - before:
        if name.partition(".")[0] == "jobs":
            del sys.modules[name]


def environment(**more: str) -> dict[str, str]:
    """That of another process, which can import `support`, without settings of the developer's terminal."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "PYTHONUNBUFFERED")}
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **more}


def run_process(*arguments: object, **more: str) -> Ended:
    """Run the command in another process."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=50)
    return Ended(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """Start the command in another process, with pipes as its stdout and stderr; it is killed at the end."""
    command, pipe = [*COMMAND, *arguments], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, process.stdout, process.stderr
        finally:
            process.kill()
