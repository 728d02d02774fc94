"""The command line, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from events.checkpoint.manifest import Manifest, Metric, encode_manifest
from events.messages import ObserverFailed
from events.wire import encode_json
from trainer.cli.main import main


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.cli.main", *arguments]
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
def test_a_reader_of_only_the_first_line_gets_no_traceback(tmp_path: Path) -> None:
    """As `stagecast demo | head -1` does; the training has ended by then, and its folder is whole."""
    command = [sys.executable, "-m", "trainer.cli.main", "demo", "--steps", "1", "--device", "cpu", "--run-dir", "run"]
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


BAD = "bad\x1b[2J\x9b1m\u202e\x07\nstagecast: fine"


def test_commands_print_names_and_errors_of_strangers_as_their_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a folder, a run, a metric, an observer; also an exception that ends the command."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    run = tmp_path / f"run{BAD}"
    manifest = Manifest(
        run_id=BAD, attempt=1, global_step=1, epoch=0, seq=9, time=1.5, parent=None, reasons=[BAD],
        metric=Metric(BAD, 1.0), module=BAD, files={},
    )  # fmt: skip
    for folder, data in (("step-1.a1", encode_manifest(manifest)), ("step-2.a1", b"{")):
        (run / "checkpoints" / folder).mkdir(parents=True)
        (run / "checkpoints" / folder / "manifest.json").write_bytes(data)
    (run / "journal").mkdir()
    header = (BAD, 1, 1, 1.5, 0, 0, 0, None)
    event = ObserverFailed(*header, BAD, BAD, BAD)
    (run / "journal" / f"{1:020}.jsonl").write_bytes(encode_json(event) + b"\n{}\n")
    for arguments in (
        ["checkpoints", str(run)],
        ["checkpoints", "verify", str(run)],
        ["checkpoints", "export", str(run), str(tmp_path / "out")],
        ["checkpoints", str(run / BAD)],
        ["report", str(run), "--out", str(tmp_path / BAD / "out")],
        ["replay", str(run / BAD), "memory"],
        ["watch", str(run / BAD)],
        ["train", str(run / BAD)],
    ):
        with contextlib.suppress(SystemExit):
            main(arguments)
    sys.excepthook(RuntimeError, RuntimeError(BAD), None)
    said = "".join(capsys.readouterr())
    lines = said.split("\n")
    assert said.count("bad\\x1b[2J\\x9b1m\\u202e\\x07") >= 8
    assert [line for line in lines if not line.isprintable()] == []
    assert lines.count("stagecast: fine") == 1  # of the exception, which is shown as it is written


def test_an_invalid_number_of_steps_is_refused(tmp_path: Path) -> None:
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
