"""Fixtures of the trainer's tests. What they share beside, `support` has: `support.training` first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support.command import stagecast as stagecast
from support.reads import watching_reads
from support.scripts import ROOT, Script, Start
from support.threads import WAIT_S, join_threads, trainer_threads, wait_until_failed, wait_until_in
from support.training import Diary, InlineDiary, Net, make_trainer, read_journal, train

from sinks import Memory
from trainer import Trainer
from trainer.checkpoint.slab import SlabPool


@pytest.fixture
def kit() -> Any:
    """What the tests of this folder share, by name."""
    return SimpleNamespace(
        Net=Net,
        Diary=Diary,
        InlineDiary=InlineDiary,
        Memory=Memory,
        WAIT_S=WAIT_S,
        ROOT=ROOT,
        SlabPool=SlabPool,
        Trainer=Trainer,
        make_trainer=make_trainer,
        train=train,
        wait_until_failed=wait_until_failed,
        wait_until_in=wait_until_in,
        watching_reads=watching_reads,
        trainer_threads=trainer_threads,
        join_threads=join_threads,
        read_journal=read_journal,
        replace=msgspec.structs.replace,
    )


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
