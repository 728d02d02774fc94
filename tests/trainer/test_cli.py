"""The command line: its options, errors and help, the demo, and text of strangers on the terminal."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import COMMAND, Stagecast, environment, started

from events.checkpoint.manifest import Manifest, Metric, encode_manifest
from events.messages import ObserverFailed
from events.wire import encode_json
from trainer.cli.main import main

COMMANDS = [
    "",
    "demo",
    "train",
    "checkpoints",
    "checkpoints list",
    "checkpoints verify",
    "checkpoints export",
    "replay",
    "watch",
    "report",
]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "arguments are required: COMMAND; see stagecast --help"),
        ("traim run.yaml", "'traim' is not a command; did you mean train?"),
        ("fly", "'fly' is not a command; see stagecast --help"),
        ("--versoin", "arguments are required: COMMAND"),
        ("demo --step 3", "demo: error: --step is not an option; did you mean --steps?"),
        ("demo --sed=3", "--sed=3 is not an option; did you mean --seed?"),
        ("demo --steps 0", "--steps: '0' is not an integer >= 1; see stagecast demo --help"),
        ("demo --seed -1", "--seed: '-1' is not an integer >= 0"),
        ("demo --seed 1_0", "--seed: '1_0' is not an integer >= 0"),
        ("demo --seed ³", "--seed: '³' is not an integer >= 0"),
        ("demo --steps", "--steps: expected one argument"),
        (f"demo --device cpu --seed {10**30}", "demo: error: TrainerArguments: seed = 1000000"),
        (f"demo --seed {'9' * 5_000}", "--seed: invalid integer value: '999"),
        ("demo --device cuda:99", "demo: error: "),
        ("train", "arguments are required: FILE"),
        ("train run.yaml --chek", "--chek is not an option; did you mean --check?"),
        ("train no.yaml", "train: error: no.yaml: cannot be read: No such file or directory"),
        ("checkpoints", "arguments are required: ACTION"),
        ("checkpoints lst run", "checkpoints: error: 'lst' is not a command; did you mean list?"),
        ("checkpoints list", "arguments are required: PATH"),
        ("checkpoints list run other", "list: error: 'other' is one argument too many; see"),
        ("checkpoints export", "arguments are required: PATH"),
        ("checkpoints verify run tensors", "'tensors' is not a checkpoint name; give one such as step-500.a1"),
        ("checkpoints export run out --name step-1", "'step-1' is not a checkpoint name"),
        ("replay run", "arguments are required: --to"),
        ("replay run --to memory --since x", "--since: 'x' is not an integer >= 0"),
        ("watch --orign=a", "--orign=a is not an option; did you mean --origin?"),
        ("watch . --port 70000", "127.0.0.1:70000 cannot be served: bind(): port must be 0-65535; choose another port"),
        ("watch . --no-token --host 0.0.0.0", "watch: error: "),
        ("report", "arguments are required: RUN"),
    ],
)
def test_wrong_arguments_end_with_2_and_a_sentence(stagecast: Stagecast, line: str, says: str) -> None:
    code, out, err = stagecast(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_fits_the_terminal(
    stagecast: Stagecast, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = stagecast(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    if command == "train":
        assert max(map(len, out.splitlines())) > columns - 10  # a wider one is used


def test_a_list_continues_after_an_option(stagecast: Stagecast, monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse itself refuses this, up to Python 3.12."""
    given: list[object] = []
    monkeypatch.setattr("trainer.cli.report.report", lambda folders, **options: given.append(folders) or 0)
    assert stagecast("report", "one", "--out", "x.html", "two", "--force", "three").code == 0
    assert given == [["one", "two", "three"]]


def test_a_shell_completes_commands_options_and_their_values(tmp_path: Path) -> None:
    for words, completed in {
        "stagecast ch": "checkpoints ",
        "stagecast checkpoints ": "-h\v--help\vlist\vverify\vexport",
        "stagecast train run.yaml --c": "--check ",
    }.items():
        out = tmp_path / "completions"
        shell = {"COMP_LINE": words, "COMP_POINT": str(len(words)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
        done = subprocess.run(COMMAND, env=environment(_ARGCOMPLETE="1", **shell), timeout=50)
        assert (done.returncode, out.read_text()) == (0, completed)


def test_the_demo_trains_and_shows_what_it_did(stagecast: Stagecast, tmp_path: Path) -> None:
    """A sample, the ledger and the run folder, which has a journal."""
    code, out, err = stagecast("demo", "--steps", "1", "--device", "cpu", "--run-dir", "run")
    assert code == 0, err
    assert "After 1 step it writes:" in out
    assert "compute" in out
    assert str(tmp_path / "run") in out
    assert list((tmp_path / "run" / "journal").glob("*.jsonl"))
    assert "epoch 1/1" in err
    assert "\x1b" not in err  # no terminal: plain lines


def test_a_reader_of_only_the_first_line_gets_no_traceback() -> None:
    """As `stagecast demo | head -1` does; the training ends as usual."""
    with started("demo", "--steps", "1", "--device", "cpu", "--run-dir", "run") as (demo, out, err):
        assert out.readline()
        out.close()
        errors = err.read()
        assert demo.wait(50) == 1
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
    (run / BAD).touch()
    for arguments in (
        ["checkpoints", "list", str(run)],
        ["checkpoints", "verify", str(run)],
        ["checkpoints", "export", str(run), str(tmp_path / "out")],
        ["checkpoints", "list", str(run / BAD)],
        ["report", str(run), "--out", str(tmp_path / BAD / "out")],
        ["replay", str(run / BAD), "--to", "memory"],
        ["replay", str(run), "--to", BAD],
        ["watch", str(run / BAD)],
        ["train", str(run / BAD)],
        [BAD],
        ["demo", f"--{BAD}"],
    ):
        with contextlib.suppress(SystemExit):
            main(arguments)
    sys.excepthook(RuntimeError, RuntimeError(BAD), None)
    said = "".join(capsys.readouterr())
    lines = said.split("\n")
    assert said.count("bad\\x1b[2J\\x9b1m\\u202e\\x07") >= 13
    assert [line for line in lines if not line.isprintable()] == []
    assert lines.count("stagecast: fine") == 1  # of the exception, which is shown as it is written


def test_python_without_a_terminal_runs_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """``pythonw`` has no stdout."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stdout", None)
    os.mkdir("empty")
    assert main(["checkpoints", "list", "empty"]) == 0
