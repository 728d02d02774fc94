"""The command line, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=110)


@pytest.mark.timeout(120)
def test_the_demo_trains_and_shows_what_it_did(tmp_path: Path) -> None:
    """It exits with 0, prints a sample, the ledger and the run's folder, and leaves a journal there."""
    done = _run("demo", "--steps", "4", "--device", "cpu", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "After 4 steps it writes:" in done.stdout
    assert "compute" in done.stdout
    assert str(tmp_path / "run") in done.stdout
    assert list((tmp_path / "run" / "journal").glob("*.jsonl"))
    assert "epoch 4/4" in done.stderr
    assert "\x1b" not in done.stderr  # no terminal: plain lines


@pytest.mark.timeout(120)
def test_whoever_reads_only_the_first_line_gets_no_traceback(tmp_path: Path) -> None:
    """As `stagecast demo | head -1` does; the training has ended by then, and its folder is whole."""
    command = [sys.executable, "-m", "trainer.cli", "demo", "--steps", "1", "--device", "cpu", "--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as demo:  # type: ignore[call-overload]
        assert demo.stdout.readline()
        demo.stdout.close()
        errors = demo.stderr.read()
        assert demo.wait(110) == 1
    assert "finished" in errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_what_is_no_number_of_steps_is_refused(tmp_path: Path) -> None:
    """Bad options end with status 2 and a sentence."""
    done = _run("demo", "--steps", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert "at least 1" in done.stderr


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    """An unusable device is a wrong argument, told in one line without a traceback."""
    done = _run("demo", "--device", "cuda:99", cwd=tmp_path)
    assert done.returncode == 2
    assert "cuda:99" in done.stderr
    assert "Traceback" not in done.stderr
