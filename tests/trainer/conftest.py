"""Fixtures of the trainer's tests. What they share beside, `support` has: `support.training` first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import stagecast as stagecast
from support.scripts import Script, Start


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Start]:
    """Start a program; it is killed when the test ends."""
    started: list[Script] = []

    def start(text: str) -> Script:
        started.append(Script(text, tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdin, one.process.stdout, one.process.stderr):
            with contextlib.suppress(OSError):  # a forked child may hold the other end
                pipe.close()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_starts: None) -> None:
    """A run that writes into the working directory writes into the test's."""
    monkeypatch.chdir(tmp_path)
