"""``stagecast train``: a run from one file, errors of the file, and the help."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.command import Stagecast, run_process, started

from events.checkpoint.settings import Checkpoints
from events.field_docs import field_docs
from events.journal.history import read_history
from events.journal.writer import Journal
from events.messages import RunStarted
from sinks.registry import sink_names, sink_type
from trainer.arguments import TrainerArguments
from trainer.cli.run_config import RunConfig, load_run_config
from trainer.config import apply_overrides
from trainer.errors import ArgumentsError

JOBS = """
from torch import nn

from support.training import Net
from trainer import CallbackInterface, fenced


class Line(Net):
    def __init__(self, width: int = 1, hold: bool = False):
        super().__init__(rows=32, act=self.report if hold else None)
        self.wide = nn.Linear(1, width)

    def report(self, global_step):
        if global_step == 1:
            print("training", flush=True)


class Sample(CallbackInterface):
    def __init__(self, module, where: str = "sample.txt"):
        self.module, self.where = module, where

    @fenced
    def on_end_train_epoch(self, global_step, *outputs):
        with open(self.where, "a") as file:
            print(type(self.module).__name__, global_step, file=file)


def build(width: int, *, hold: bool = False):
    return Line(width, hold)


def no_module(**options):
    return "a string"


def broken():
    raise ZeroDivisionError("in the factory")


def lost():
    line = Line()
    line.train_step = lambda *_: open("no/such/file")
    return line


NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the user's package in it."""
    (tmp_path / "jobs").mkdir()
    for name, text in {
        "line": JOBS,
        "typo": "import os\nwidht\n",
        "script": "import sys\nsys.exit(0)\n",
        "needs": "import somewhere.else_entirely\n",
        "syntax": "def build(:\n",
    }.items():
        (tmp_path / "jobs" / f"{name}.py").write_text(text)
    return tmp_path


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text)
    return name


# ------------------------------------------------------------------------------- problems of a file, without torch


def problems_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ArgumentsError) as caught:
        load_run_config(folder / write(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arguments: {epochs: 3}", "module: is missing"),
        ("module: 3", "module = 3: must be a mapping with string keys"),
        ("module: 'a:b'\nargumnets: {}", "argumnets: is not known; did you mean arguments?"),
        (
            "module: 'a:b'\nepochs: 3\nlr: 1",
            "epochs: is not known; write arguments.epochs; lr: is not known; set it in",
        ),
        ("model: 'a:b'", "model: is not known; did you mean module?"),
        ("module: 'a:b'\narguments: {epoch: 1}", "arguments.epoch: is not known; did you mean arguments.epochs?"),
        ("module: 'a:b'\narguments: {epochs: '3'}", "arguments.epochs = '3': must be an integer >= 1"),
        ("module: 'a:b'\nsinks: console", "sinks = 'console': must be a list or None"),
        ("module: 'a:b'\nsinks: [3]", "got `int` - at `$[0]`"),
        ("module: 'a:b'\nsinks_in: cloud", "sinks_in = 'cloud': must be one of 'process', 'thread'"),
        ("module: 'a:b'\ncheckpoints: {every_steps: 0}", "checkpoints.every_steps = 0: must be an integer >= 1"),
        ("module: 'a:b'\ncheckpoints: often", "checkpoints = 'often': must be "),
        ("module: 'a:b'\nrun_id: 7", "run_id = 7: must be a string or None"),
        ("module: [", "is not valid YAML"),
    ],
)
def test_each_problem_is_named_by_its_path_with_the_allowed_values(folder: Path, text: str, says: str) -> None:
    """In one sentence that begins with the file."""
    problem = problems_of(folder, text)
    assert says in problem
    assert problem.startswith(f"{folder / 'run.yaml'}: ")


def test_all_problems_are_reported_at_once(folder: Path) -> None:
    """With the overrides."""
    problem = problems_of(folder, "module: 'a:b'\nsink: []\narguments: {seed: x}", "checkpoints.best_mode=most")
    assert "with checkpoints.best_mode=most" in problem
    for part in ("sink: is not known; did you mean sinks?", "arguments.seed = 'x'", "checkpoints.best_mode = 'most'"):
        assert part in problem


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sinks.2.path=a", "sinks is a list of 1: '2' is not an index from 0 to 1"),
        ("sinks.path=a", "sinks is a list of 1: 'path' is not an index from 0 to 1"),
        ("sinks.-1=a", "'-1' is not an index from 0 to 1"),
        ("arguments.epochs.a=1", "arguments.epochs is 1, not a group of values"),
        ("--check", "must look like 'name=value'"),
    ],
)
def test_an_override_with_an_impossible_path_is_an_error(override: str, says: str) -> None:
    """List items are indexed from 0; an index equal to the length appends."""
    problems: list[str] = []
    apply_overrides({"sinks": [{"sink": "csv"}], "arguments": {"epochs": 1}}, [override], problems)
    assert says in problems[0]


# ------------------------------------------------------------------------------------------------ the format


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "module: 'jobs.line:build'\nsinks: [memory, {sink: console, line_every_s: 1.0}]\njournal: true\n"),
        (
            "run.toml",
            'module = "jobs.line:build"\nsinks = ["memory", {sink = "console", line_every_s = 1.0}]\njournal = true\n',
        ),
        (
            "run.json",
            '{"module": "jobs.line:build", "sinks": ["memory", {"sink": "console", "line_every_s": 1.0}],'
            ' "journal": true}',
        ),
    ],
)
def test_the_three_languages_are_equivalent(folder: Path, name: str, text: str) -> None:
    """A string is short for a mapping with only the name, so overrides can set its options."""
    overrides = [
        "module.width=7",
        "arguments.epochs=2",
        "sinks.0.capacity=10",
        "sinks.2=csv",
        "checkpoints.every_epochs=1",
        "resume=auto",
    ]
    config = load_run_config(folder / write(folder, text, name), overrides)
    assert config == RunConfig(
        module={"factory": "jobs.line:build", "width": 7},
        arguments=TrainerArguments(epochs=2),
        sinks=[{"sink": "memory", "capacity": 10}, {"sink": "console", "line_every_s": 1.0}, {"sink": "csv"}],
        checkpoints=Checkpoints(every_epochs=1),
        resume="auto",
    )


def test_overrides_create_a_missing_list(folder: Path) -> None:
    config = load_run_config(
        folder / write(folder, "module: 'a:b'\n"), ["sinks.0=csv", "sinks.0.path=a.csv", "sinks.1=memory"]
    )
    assert config.sinks == [{"sink": "csv", "path": "a.csv"}, {"sink": "memory"}]


def test_true_selects_the_defaults(folder: Path) -> None:
    """Default checkpoints do not require a run folder; those with settings do."""
    config = load_run_config(folder / write(folder, "module: 'a:b'\ncheckpoints: true\njournal: false\n"))
    assert (config.checkpoints, config.journal) == (True, False)
    config = load_run_config(folder / "run.yaml", ["journal=true", "journal.segment_bytes=10", "checkpoints=false"])
    assert (config.checkpoints, config.journal) == (False, Journal(segment_bytes=10))


# --------------------------------------------------------------------------------------- problems, on the terminal


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("module: jobs.line", ["module.factory = 'jobs.line': must look like \"package.module:name\""]),
        ("module: {factory: 3}", ["module.factory = 3: must look like "]),
        (
            "module: nowhere.jobs:build",
            ["module.factory = 'nowhere.jobs:build': ", "there is no module nowhere, neither in"],
        ),
        ("module: jobs.nowhere:build", ["there is no module jobs.nowhere, neither in"]),
        ("module: jobs.needs:build", ["No module named 'somewhere' (", "needs.py, line 1)"]),
        ("module: jobs.typo:build", ["NameError: name 'widht' is not defined (", "typo.py, line 2)"]),
        ("module: jobs.script:build", ["SystemExit: 0 (", "script.py, line 2)"]),
        ("module: jobs.syntax:build", ["SyntaxError: ", "(syntax.py, line 1)"]),
        ("module: jobs.line:biuld", ["jobs.line (", "line.py) has no biuld"]),
        ("module: jobs.line:NUMBER", ["is 3, which cannot be called"]),
        (
            "module: 'jobs.line:build'",
            ["missing a required argument: 'width'; it takes (width: int, *, hold: bool = False)"],
        ),
        ("module: {factory: 'jobs.line:build', widht: 3}", ["unexpected keyword argument 'widht'; it takes (width"]),
        ("module: 'jobs.line:no_module'", ["returned 'a string', which is not a ModuleInterface"]),
        (
            "module: 'nowhere:build'\nsinks: [{path: a}, pigeon, {sink: memory, size: 3}]\ncallbacks: ['jobs.line:No']",
            [
                "there is no module nowhere",
                "sinks.0: the name, sink, is missing; installed are alert, console",
                "sinks.1: there is no sink 'pigeon'",
                "sinks.2: the sink 'memory': size: is not known; known are capacity",
                "callbacks.0.callback = 'jobs.line:No': jobs.line (",
            ],
        ),
        (
            "module: 'jobs.line:Line'\ncallbacks: [{callback: 'jobs.line:Sample', wher: a}]",
            ["callbacks.0.callback = 'jobs.line:Sample': got an", "argument 'wher'; it takes (module, "],
        ),
        (
            "module: 'jobs.line:Line'\ncallbacks: [{callback: 'jobs.line:Sample', module: 3}]",
            ["the option module is set by the run; remove it"],
        ),
        (
            "module: 'jobs.line:Line'\ncallbacks: ['jobs.line:no_module']",
            ["'a string', which is not a CallbackInterface"],
        ),
        ("module: 'jobs.line:Line'\narguments: {device: 'cuda:99'}", ["run.yaml: ", "cuda:99"]),
        ("module: 'jobs.line:Line'\nrun_id: a/b", ["run.yaml: Trainer: run_id must be a name without slashes"]),
    ],
)
def test_a_run_that_cannot_be_built_ends_with_status_2_and_a_sentence(
    stagecast: Stagecast, folder: Path, text: str, says: list[str]
) -> None:
    """All problems at once, with the place of a broken import; no traceback, and nothing is trained."""
    code, out, err = stagecast("train", write(folder, text))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("stagecast train: error: run.yaml: ")
    assert all(part in err for part in says), err
    assert not (folder / "runs").exists()


def test_an_error_of_the_users_own_code_comes_with_its_traceback(stagecast: Stagecast, folder: Path) -> None:
    """A sentence would not name its place, not even that of a file that a step has not found."""
    text = "module: 'jobs.line:{}'\nsinks: []\njournal: false\n"
    with pytest.raises(ZeroDivisionError, match="in the factory"):
        stagecast("train", write(folder, text.format("broken")))
    code, _, err = stagecast("train", write(folder, text.format("lost")))
    assert code == 1
    for part in ("Traceback", "line.py", "No such file or directory"):
        assert part in err


# ------------------------------------------------------------------------------------------------- the run


def test_a_file_trains_its_module_with_all_that_it_names(stagecast: Stagecast, folder: Path) -> None:
    """Arguments, overrides, a callback with the module, checkpoints; a second run resumes from there."""
    text = """
        module: {factory: "jobs.line:build", width: 2}
        arguments: {epochs: 2, train_batch_size: 8, seed: 3, device: cpu}
        sinks: []
        callbacks: ["jobs.line:Sample", {callback: "jobs.line:Sample", where: other.txt}]
        checkpoints: {every_epochs: 1}
        run_id: line
        resume: auto
        config: {note: first}
    """
    code, out, err = stagecast("train", write(folder, text), "module.width=5")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "finished after 8 steps",
        f"run folder: {folder}/runs/line",
        f"checkpoint: {folder}/runs/line/checkpoints/step-8.a1",
    ]
    assert (folder / "sample.txt").read_text() == "Line 4\nLine 8\n"
    assert (folder / "other.txt").exists()

    code, out, err = stagecast("train", "run.yaml", "module.width=5", "arguments.epochs=3", "config.width=given")
    assert code == 0, err
    assert out.startswith("finished after 12 steps\n")
    started = [event for event in read_history(folder / "runs/line/journal") if isinstance(event, RunStarted)]
    assert [event.arguments["epochs"] for event in started] == [2, 3]
    assert started[0].module == "jobs.line.Line"
    assert [event.config for event in started] == [{"width": 5, "note": "first"}, {"width": "given", "note": "first"}]


def test_a_sink_that_missed_events_is_reported_at_the_end(folder: Path) -> None:
    """Without the console, too: training is not touched, and so the exit code is that of success."""
    (folder / "taken").mkdir()
    text = (
        "module: 'jobs.line:Line'\narguments: {device: cpu, drain_timeout_s: 0.1}\nsinks: [{sink: csv, path: taken}]\n"
    )
    done = run_process("train", write(folder, text))
    assert done.code == 0
    named = r"^stagecast: warning: csv failed .* and is disabled \(\d+ events not delivered\): .*IsADirectoryError.*$"
    assert re.search(named, done.err, re.M)


def test_a_seed_is_that_of_the_weights_too(stagecast: Stagecast, folder: Path) -> None:
    """They are drawn when the module is built, before the run begins."""
    write(folder, "module: 'jobs.line:Line'\narguments: {seed: 3, device: cpu}\nsinks: []\n")
    for name in "ab":
        assert stagecast("train", "run.yaml", f"run_dir={name}").code == 0
    weights = [(folder / name / "weights.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_check_builds_everything_and_trains_nothing(stagecast: Stagecast, folder: Path) -> None:
    """It prints what would be trained, and leaves nothing behind."""
    file = write(folder, "module: 'jobs.line:Line'\nsinks: [memory]\ncallbacks: ['jobs.line:Sample']\n")
    code, out, err = stagecast(
        "train", file, "--check", "arguments.gpu_batch_size_limit=8", "arguments.batch_size_schedule.3=64"
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "run.yaml is valid; nothing was trained.",
        "module:     jobs.line.Line, 7 parameters",
        "steps:      32 rows each, in micro-batches of 8; 64 rows after 3 epoch(s)",
        "sinks:      memory",
        "callbacks:  jobs.line:Sample",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["jobs", "run.yaml"]
    code, _, err = stagecast("train", file, "--check", "resume=elsewhere")
    assert code == 1
    assert "resume='elsewhere': there is no checkpoint" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_cleanly_and_sets_the_exit_code(folder: Path, number: signal.Signals, code: int) -> None:
    """With a checkpoint, as `stagecast demo` does."""
    file = write(
        folder,
        "module: {factory: 'jobs.line:build', width: 1, hold: true}\nsinks: []\nrun_dir: run\n"
        "arguments: {epochs: 1000000, device: cpu}\n",
    )
    with started("train", file) as (process, stdout, _):
        assert stdout.readline() == "training\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=40)
    assert process.returncode == code, err
    assert re.search(rf"^stopped after \d+ steps? \({number.name}\)$", out, re.M)
    assert re.search(r"^checkpoint: .*step-\d+\.a1$", out, re.M)


def test_several_processes_train_one_run_and_print_its_result_once(stagecast: Stagecast, folder: Path) -> None:
    file = write(folder, "module: {factory: 'jobs.line:build', width: 1}\nsinks: []\nrun_dir: run\nrun_id: line\n")
    for word, says in (
        ("0", "'0' is not an integer >= 1"),
        ("two", "'two' is not an integer >= 1"),
    ):
        code, _, err = stagecast("train", file, "--processes", word)
        assert (code, says in err) == (2, True)
    code, _, err = stagecast("train", file, "--processes", "2", "arguments.strategy=single")
    assert code == 2
    assert "arguments.strategy: 'single' trains in each of the 2 processes for itself; set it to 'auto'" in err
    unused = ["arguments.strategy={type: ddp, find_unused_parameters: true}", "arguments.device=cpu"]
    short = ["arguments.epochs=2", "arguments.train_batch_size=8"]
    code, out, err = run_process("train", file, "--processes", "2", *unused, *short)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "finished after 8 steps",
        f"run folder: {folder}/run",
        f"checkpoint: {folder}/run/checkpoints/step-8.a1",
    ]


# ------------------------------------------------------------------------------------------------- the help


def test_the_help_lists_every_argument_with_type_default_and_meaning(stagecast: Stagecast) -> None:
    """Of the file, `TrainerArguments`, `Checkpoints`, the journal, and each sink that is installed."""
    code, out, err = stagecast("train", "--help")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    kinds: list[tuple[str, Any]] = [
        ("", RunConfig),
        ("arguments.", TrainerArguments),
        ("checkpoints.", Checkpoints),
        ("journal.", Journal),
    ]
    for name in sink_names():
        assert f"sink {name}:" in text
    kinds += [("sinks.N.", sink_type(name)) for name in ("console", "memory")]
    for prefix, kind in kinds:
        for field in msgspec.structs.fields(kind):
            assert f" {prefix}{field.name}: " in text
            doc = field_docs(kind).get(field.name, "").partition("`")[0]
            assert doc.replace("None", "null").replace("True", "true").replace("False", "false").strip() in text
    assert "arguments.max_grad_norm: a number > 0 (default: 1.0) The norm" in text
    assert "arguments.seed: an integer >= 0 and <= 9223372036854775807 or null (default: null) Seeds" in text
    assert "checkpoints.best_mode: one of 'max', 'min' (default: min)" in text


def test_a_sink_that_cannot_be_imported_does_not_hide_the_others(
    stagecast: Stagecast, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken package: the help names it with its exception. It cannot replace a name of ours."""
    info = folder / "pigeon-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon\nVersion: 1.0\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(7)\n")
    entries = "aardvark = nowhere_at_all:Aardvark\nleaver = leaves:Leaver\ncsv = nowhere_at_all:CSV\nmemory = leaves:M"
    (info / "entry_points.txt").write_text(f"[stagecast.sinks]\n{entries}\n")
    monkeypatch.syspath_prepend(folder)
    code, out, _ = stagecast("train", "--help")
    assert code == 0
    assert "sink aardvark:\n  the sink 'aardvark' (nowhere_at_all:Aardvark) cannot be imported" in out
    assert "the sink 'leaver' (leaves:Leaver) cannot be imported: SystemExit(7)" in out
    assert "sinks.N.line_every_s" in out
    assert "nowhere_at_all:CSV" not in out
    assert "leaves:M" not in out
